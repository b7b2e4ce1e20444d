"""What is worked out from answers to images that were not learned from."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.data import Part
from trainer.reporting import comparisons, findings
from trainer.reporting.measured import Measured, headline

TARGETS = np.arange(120) % 3


def _set(wrong: tuple[int, ...] = (), **about: object) -> Measured:
    """Training images that are answered right, and surely, but for some."""
    answers = TARGETS.copy()
    answers[list(wrong)] = (answers[list(wrong)] + 1) % 3
    part = Part((Path("image.png"),) * len(TARGETS), ("",) * len(TARGETS), TARGETS)
    probabilities = np.eye(3)[answers] * 0.9 + 0.1 / 3
    made = Measured("cross_validation", part, probabilities, np.arange(len(TARGETS)), rounds=5)
    return replace(made, **about)  # type: ignore[arg-type]


def test_baselines_are_compared_on_the_headlines_images_and_come_first() -> None:
    first, second = _set((0,), measured_on="test"), _set((0, 1, 2))
    # An image without an answer is left out of all.
    first.probabilities[5] = np.nan
    probe = comparisons.Measured("linear_probe", second.probabilities, seconds=2.0)
    found = findings.examine([first, second], TARGETS, 3, [probe])
    assert [(c.name, c.seconds) for c in found.comparisons] == [
        ("linear_probe", 2.0),
        ("majority_class", None),
    ]
    assert (found.comparisons[0].only_served, found.comparisons[0].only_other) == (2, 0)
    assert found.comparisons[0].accuracy == 116 / 119


def test_suspects_come_from_all_sets_by_their_places() -> None:
    of_test, of_training = _set((7,), measured_on="test"), _set((5,))
    of_training.probabilities[:3] = np.nan
    found = findings.examine([of_test, of_training], TARGETS, 3).suspects.found
    assert [s.place for s in found["test"]] == [7]
    assert [s.place for s in found["cross_validation"]] == [5]


def test_where_nothing_was_measured_nothing_is_found() -> None:
    unanswered = _set(probabilities=np.full((120, 3), np.nan))
    for sets in ([], [unanswered]):
        found = findings.examine(sets, TARGETS, 3)
        assert found.comparisons == []
        assert len(found.suspects) == 0
        assert found.suspects.unjudged == ()


def test_the_headline_is_never_of_the_source_nor_without_an_answer() -> None:
    source = _set(measured_on="source")
    unanswered = _set(measured_on="test", probabilities=np.full((120, 3), np.nan))
    usual = _set()
    assert headline([source]) is None
    assert headline([unanswered, source, usual]) is usual


def test_scores_are_binned_with_the_threshold_inside() -> None:
    scores = np.array([0.2, 0.4, 0.6, 1.4, np.nan])
    found = findings.out_of_distribution(scores, 1.0, "method", "target images", "others")
    assert (found.flagged, found.count) == (1, 5)
    assert (found.images, found.reference) == ("target images", "others")
    assert sum(b.count for b in found.bins) == 4
    assert found.bins[0].low <= 0.2
    assert found.bins[-1].high >= 1.4
    none = findings.out_of_distribution(np.array([0.1, 0.2]), 1.0, "method", "a", "b")
    assert none.bins[-1].high > 1.0


def test_no_label_is_doubted_where_the_model_was_adapted_or_knows_a_class_too_badly() -> None:
    assert len(findings.examine([_set((5,))], TARGETS, 3, is_adapted=True).suspects) == 0
    # Image 5 is of class 2, of which hardly another one is recognised now.
    of_class = tuple(np.flatnonzero(TARGETS == 2).tolist())
    found = findings.examine([_set(of_class)], TARGETS, 3)
    assert found.suspects.unjudged == (2,)
    assert len(found.suspects) == 0
