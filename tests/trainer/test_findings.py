"""What is worked out from answers to images that were not learned from."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from service.ingest.packs import Location
from trainer.data import Part
from trainer.groups import Groups
from trainer.measuring import Measured
from trainer.reporting import findings
from trainer.reporting.measured_on import headline

TARGETS = np.arange(120) % 3


def _set(wrong: tuple[int, ...] = (), **about: object) -> Measured:
    """Training images that are answered right, and surely, but for some."""
    answers = TARGETS.copy()
    answers[list(wrong)] = (answers[list(wrong)] + 1) % 3
    part = Part((Location(Path("image.png")),) * len(TARGETS), ("",) * len(TARGETS), TARGETS)
    probabilities = np.eye(3)[answers] * 0.9 + 0.1 / 3
    made = Measured("cross_validation", part, np.arange(len(TARGETS)), probabilities)
    return replace(made, **about)  # type: ignore[arg-type]


def test_suspects_come_from_all_sets() -> None:
    found = findings.suspects([_set((7,), measured_on="test"), _set((5,))], 3).found
    assert [s.place for s in found["test"]] == [7]
    assert [s.place for s in found["cross_validation"]] == [5]
    nothing = findings.suspects([], 3)
    assert (len(nothing), nothing.unjudged) == (0, ())


def test_the_headline_is_never_of_the_source() -> None:
    source, usual = _set(measured_on="source"), _set()
    assert headline([source]) is None
    assert headline([source, usual]) is usual


def test_groups_are_counted_and_pairs_under_two_classes_listed() -> None:
    groups = Groups(
        of=np.array([0, 0, 1, 2, 2]),
        pairs=np.array([[3, 4], [0, 1]]),
        similarities=np.array([0.95, 0.9], dtype=np.float32),
        twin_share=0.8,
    )
    told, across = findings.grouped(groups, np.array([0, 0, 0, 0, 1]), is_given=False)
    assert (told.images, told.groups, told.copied) == (5, 3, 4)
    assert [(t.first, t.second) for t in across] == [(3, 4)]


def test_scores_are_binned_with_the_threshold_inside() -> None:
    scores = np.array([0.2, 0.4, 0.6, 1.4, np.nan])
    found = findings.out_of_distribution(scores, 1.0, 0.05, "method", "target images", "others")
    assert (found.flagged, found.count) == (1, 5)
    assert (found.images, found.reference) == ("target images", "others")
    assert sum(b.count for b in found.bins) == 4
    assert found.bins[0].low <= 0.2
    assert found.bins[-1].high >= 1.4
    none = findings.out_of_distribution(np.array([0.1, 0.2]), 1.0, 0.05, "method", "a", "b")
    assert none.bins[-1].high > 1.0


def test_no_label_is_doubted_of_a_class_that_is_recognised_too_badly() -> None:
    # Image 5 is of class 2, of which hardly another one is recognised.
    found = findings.suspects([_set(tuple(np.flatnonzero(TARGETS == 2).tolist()))], 3)
    assert found.unjudged == (2,)
    assert len(found) == 0
