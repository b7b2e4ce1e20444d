"""Domain adaptation: what is served, measured and said; the techniques are tested elsewhere."""

from pathlib import Path

import numpy as np
import pytest

from service.contract import DomainAdaptation, Note, Record
from service.domain import ReadSummary
from service.engine.head import Head
from service.ingest.packs import Location
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.small_network import parts_of, small_backbone
from trainer import linear
from trainer.data import Unlabelled
from trainer.methods import domain_adaptation, network_adaptation
from trainer.methods.domain_adaptation import Target

CLASSES = ("a", "b", "c")
Rows = tuple[np.ndarray, np.ndarray]


def drawn(counts: tuple[int, ...], *, moved: bool = False, seed: int = 0) -> Rows:
    """Features about three centres; moved, they lie nearer to the first."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(0, 1, (3, 40))
    targets = np.repeat(np.arange(3), counts)
    rows = centres[targets] + rng.normal(0, 1.2, (len(targets), 40))
    if moved:
        rows = 1.5 * rows + (centres[0] - centres.mean(axis=0))
    return rows.astype(np.float32), targets


def source_only(source: Rows) -> Head:
    found = linear.fit(*source, 3, None, 0, threads=1)
    weight, bias = found.weight.astype(np.float32), found.bias.astype(np.float32)
    return Head(weight, bias, CLASSES, found.temperature)


def target_of(rows: Rows, known: int) -> Target:
    """Of which the first `known` of every ten images are labelled."""
    features, classes = rows
    n = len(features)
    targets = np.where(np.arange(n) % 10 < known, classes, -1) if known else None
    locations = tuple(Location(Path(f"{i}.png")) for i in range(n))
    images = Unlabelled(
        locations,
        tuple(map(str, range(n))),
        targets=targets,
        summary=ReadSummary(),
        digest="",
        erased_count=0,
    )
    return Target(images, features)


def adapted(
    method: DomainAdaptation, rows: Rows, known: int
) -> tuple[domain_adaptation.AdaptedHead, list[Note]]:
    told: list[Record] = []
    source, target = drawn((25, 25, 25)), target_of(rows, known)
    groups = np.arange(len(rows[0]))
    found = domain_adaptation.adapt_head(
        method, source, source_only(source), target, groups, 0, 1, told.append
    )
    return found, [record for record in told if isinstance(record, Note)]


def test_labelled_images_measure_the_adaptation_and_fit_its_temperature() -> None:
    rows = drawn((30, 30, 30), moved=True, seed=1)
    found, notes = adapted(DomainAdaptation(evaluate_on_target=True), rows, known=5)
    assert found.has_adapted
    (measured,) = found.measured
    assert measured.measured_on == "target" and len(measured.part) == 45
    np.testing.assert_array_equal(measured.part.targets, rows[1][np.arange(90) % 10 < 5])
    compared = found.adaptation.comparison
    assert compared is not None and compared.difference > 0
    assert [(n.level, "for images of the target alone" in n.text) for n in notes] == [
        ("info", True)
    ]
    without, _ = adapted(DomainAdaptation(), rows, known=0)
    assert without.measured == [] and without.adaptation.comparison is None
    np.testing.assert_array_equal(without.head.weight, found.head.weight)
    assert without.head.temperature != found.head.temperature


@pytest.mark.parametrize("always_adapt", [False, True])
def test_a_target_of_one_class_is_warned_of(always_adapt: bool) -> None:
    rows = drawn((0, 40, 0), seed=1)
    found, notes = adapted(DomainAdaptation(always_adapt=always_adapt), rows, known=0)
    assert found.adaptation.doubt == "one_class"
    assert found.has_adapted == always_adapt
    (note,) = notes
    assert note.level == "warning" and "images into one class" in note.text
    assert ("always_adapt was asked for" in note.text) == always_adapt
    if not always_adapt:
        assert found.head.temperature == source_only(drawn((25, 25, 25))).temperature


def test_images_held_out_of_a_network_are_labelled_and_whole_groups() -> None:
    target = target_of(drawn((50, 50, 50)), known=8)
    groups = np.arange(150) // 3
    held = domain_adaptation.held_out(target, groups, 0.2, 0)
    assert 15 <= held.sum() <= 35 and not held[~target.is_labelled].any()
    for group in range(50):
        own = held[(groups == group) & target.is_labelled]
        assert own.all() or not own.any()
    assert not domain_adaptation.held_out(target_of(drawn((9, 9, 9)), 0), groups[:27], 0.2, 0).any()


@pytest.mark.parametrize("is_good", [True, False])
def test_a_network_that_does_not_look_better_gives_way_to_source_only(is_good: bool) -> None:
    source, rows = drawn((25, 25, 25)), drawn((30, 30, 30), moved=True, seed=1)
    target, before = target_of(rows, known=10), source_only(source)
    # A network whose features are the answers, right or drawn by lot.
    answers = rows[1] if is_good else np.random.default_rng(0).integers(0, 3, 90)
    features = np.eye(3, dtype=np.float32)[answers]
    head = Head(4 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32), CLASSES)
    held = np.arange(90) % 3 == 0
    found = domain_adaptation.judge_network(
        DomainAdaptation(technique="cdan"), source, before, target, np.arange(90), held,
        (head, features), 0, lambda _: None,
    )  # fmt: skip
    assert found.has_adapted == is_good
    assert found.adaptation.doubt == ("" if is_good else "not_better")
    assert found.adaptation.published == ("cdan" if is_good else "source_only")
    np.testing.assert_array_equal(found.head.weight, (head if is_good else before).weight)
    (measured,) = found.measured
    np.testing.assert_array_equal(measured.part.targets, rows[1][held])
    right = (measured.probabilities.argmax(axis=1) == rows[1][held]).mean()
    asked = features if is_good else rows[0]
    assert right == (found.head.logits(asked[held]).argmax(axis=1) == rows[1][held]).mean()


def test_a_network_is_trained_with_the_targets_images(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    folder = make_folder("source", per_class=6)
    learned, held_out, classes = parts_of(folder, held_out=2)
    method = DomainAdaptation(technique="cdan", epochs=2, batch_size=4, learning_rate=0.05)
    spec = make_spec(folder, method=method)
    weights = []
    for target in (parts_of(make_folder("target", per_class=4, seed=1))[0], learned):
        backbone = small_backbone()
        trained = network_adaptation.train(
            spec, method, learned, held_out, classes, target, backbone,
            lambda: Head(np.zeros((2, 16), np.float32), np.zeros(2, np.float32), classes),
            None, told.append,
        )  # fmt: skip
        assert trained.hyperparameters["technique"] == "cdan"
        assert np.isfinite(trained.head.weight).all()
        weights.append(trained.head.weight)
    assert not np.array_equal(*weights)
