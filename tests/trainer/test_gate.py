"""What gates let through, by simulation where it is a matter of chance."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from service.contract import Gate
from service.domain import GateCheck, Parity
from trainer import evaluate, gate
from trainer.gate import Paired

CLASSES = ("a", "b", "c")
N = 40
MARGIN = 0.03


def rights(wrong: int, after: int = 0, of: int = N) -> np.ndarray:
    """All right but so many."""
    places = np.arange(of)
    return (places < after) | (places >= after + wrong)


def paired(lost: int, won: int, of: int = N, groups: np.ndarray | None = None) -> Paired:
    numbers = np.arange(of) if groups is None else groups
    return Paired(rights(lost, of=of), rights(won, lost, of), numbers)


def measured(wrong: int = 0) -> evaluate.Metrics:
    """Of N images of class a, some of them answered as b; none of class c."""
    probabilities = np.where(rights(wrong)[:, None], [[0.9, 0.1, 0]], [[0.2, 0.8, 0]])
    targets = np.zeros(N, dtype=np.int64)
    more, theirs = np.tile([[0.1, 0.9, 0]], (N, 1)), np.ones(N, dtype=np.int64)
    return evaluate.measure(
        np.concatenate([probabilities, more]), np.concatenate([targets, theirs]), CLASSES
    )


def checked(
    asked: Gate,
    metrics: evaluate.Metrics | None = None,
    compared: Paired | None = None,
    problem: str = "",
) -> GateCheck:
    parity = Parity(1e-4, 1.0, 32)
    (found,) = gate.checks(asked, metrics, parity, compared, lambda: 10.0, problem)
    return found


def test_a_gate_that_asks_for_nothing_checks_nothing() -> None:
    assert gate.checks(Gate(), measured(), Parity(0, 1, 1), None, lambda: 1.0) == []


@pytest.mark.parametrize(("bound", "verdict"), [(0.975, "passed"), (0.976, "failed")])
def test_accuracy_passes_at_its_bound_and_not_below(bound: float, verdict: str) -> None:
    found = checked(Gate(min_accuracy=bound), measured(2))
    assert (found.verdict, found.passed) == (verdict, verdict == "passed")
    assert found.value == pytest.approx(78 / 80)


@pytest.mark.parametrize(("bound", "passes"), [(2e-4, True), (5e-5, False)])
def test_parity_is_bounded(bound: float, passes: bool) -> None:
    assert checked(Gate(max_parity_difference=bound)).passed == passes


@pytest.mark.parametrize(("bound", "passes"), [(12.0, True), (9.0, False)])
def test_latency_is_bounded(bound: float, passes: bool) -> None:
    assert checked(Gate(max_latency_ms=bound)).passed == passes


def test_every_class_has_its_own_least_recall() -> None:
    metrics = measured(8)
    passed = checked(Gate(class_recalls={"a": 0.8, "b": 0.9}), metrics)
    assert (passed.verdict, passed.value, passed.bound) == ("passed", 0.8, 0.8)
    failed = checked(Gate(min_class_recall=0.85, class_recalls={"c": 0.0}), metrics)
    assert (failed.verdict, failed.value, failed.bound) == ("failed", 0.8, 0.85)
    assert "recall of 'a' 0.8000" in failed.detail
    # Its own bound goes before that of all.
    own = Gate(min_class_recall=0.85, class_recalls={"a": 0.7})
    assert checked(own, metrics).verdict == "undecided"
    stranger = checked(Gate(class_recalls={"d": 0.1}), metrics)
    assert (stranger.verdict, stranger.value) == ("failed", None)
    assert "no class of the version is called 'd'" in stranger.detail


@pytest.mark.parametrize(
    "asked", [Gate(min_accuracy=0.5), Gate(min_class_recall=0.5), Gate(class_recalls={"c": 0.5})]
)
def test_what_no_image_was_measured_on_is_undecided(asked: Gate) -> None:
    metrics = measured() if asked.class_recalls else None
    found = checked(asked, metrics)
    assert (found.verdict, found.passed, found.value) == ("undecided", False, None)
    assert "could be measured on" in found.detail


def test_a_first_version_is_not_worse_than_none() -> None:
    assert checked(Gate(not_worse_than="prod")).verdict == "passed"


def test_a_version_that_cannot_be_compared_with_has_failed_the_gate() -> None:
    asked = Gate(not_worse_than="prod", when_uncertain="promote")
    found = checked(asked, compared=paired(0, 0), problem="it is gone")
    assert (found.verdict, found.passed, found.value) == ("failed", False, None)
    assert "it is gone" in found.detail


@pytest.mark.parametrize("of", [1, 4, 10_000])
def test_the_same_answers_pass_at_any_number_of_images(of: int) -> None:
    same = replace(paired(0, 0, of), is_identical=True)
    found = checked(Gate(not_worse_than="prod"), compared=same)
    assert found.verdict == "passed"
    assert "Both answer identically" in found.detail


def test_that_the_same_few_images_are_right_does_not_show_that_the_answers_are_the_same() -> None:
    asked = Gate(not_worse_than="prod")
    assert checked(asked, compared=paired(0, 0, 40)).verdict == "undecided"
    assert checked(asked, compared=paired(0, 0, 100)).verdict == "passed"


def test_what_is_undecided_is_held_unless_asked_otherwise() -> None:
    for when, passes in (("hold", False), ("promote", True)):
        asked = Gate(not_worse_than="prod", when_uncertain=when)  # type: ignore[arg-type]
        found = checked(asked, compared=paired(1, 1))
        assert (found.verdict, found.passed) == ("undecided", passes)
        assert found.value < -MARGIN == found.bound
        assert found.images_needed > N
        assert f": about {found.images_needed} would be enough if both" in found.detail
        nothing = checked(asked, compared=paired(0, 0, 0))
        assert (nothing.verdict, nothing.passed, nothing.value) == ("undecided", passes, None)


def test_a_comparison_is_told_in_full() -> None:
    groups = np.arange(N) // 2
    compared = Paired(rights(8), rights(0), groups, 12, np.array([True, False, True]))
    found = checked(Gate(not_worse_than="prod", when_uncertain="promote"), compared=compared)
    assert (found.verdict, found.passed, found.images_needed) == ("failed", False, 0)
    assert "accuracy 0.8000 against 1.0000 of the version behind prod" in found.detail
    assert "40 images of 20 groups: 8 lost, 0 won" in found.detail
    assert "12 images could not be compared on fairly" in found.detail
    assert "2 of 3 images of classes that it does not know" in found.detail


def outcomes(lost: float, won: float, of: int, draws: int = 20_000) -> dict[str, float]:
    """How often each verdict is come to, of images that stand alone."""
    rng = np.random.default_rng([of, round(1000 * lost), round(1000 * won)])
    counts = rng.multinomial(of, [lost, won, 1 - lost - won], draws)[:, :2]
    found: Counter[str] = Counter()
    for (a, b), times in Counter(map(tuple, counts.tolist())).items():
        pair = paired(a, b, of)
        verdict = gate.non_inferiority(
            pair.right, pair.incumbent_right, pair.groups, MARGIN
        ).verdict
        found[verdict] += times / draws
    return found


@pytest.mark.parametrize("changed", [0.0, 0.02, 0.04, 0.08])
def test_a_version_that_is_five_points_worse_hardly_ever_passes(changed: float) -> None:
    # So many changed besides, or in all.
    for share in (0.05 + changed, max(0.05, changed)):
        assert outcomes((share + 0.05) / 2, (share - 0.05) / 2, 100)["passed"] <= 0.02
        assert outcomes((share + 0.05) / 2, (share - 0.05) / 2, 400)["passed"] <= 0.01


@pytest.mark.parametrize(("changed", "least"), [(0.02, 0.95), (0.04, 0.85), (0.08, 0.62)])
def test_a_version_as_good_passes_where_images_are_enough(changed: float, least: float) -> None:
    assert outcomes(changed / 2, changed / 2, 400)["passed"] >= least


@pytest.mark.parametrize("changed", [0.0, 0.02, 0.04])
def test_a_version_that_is_worse_by_just_the_margin_passes_once_in_twenty(changed: float) -> None:
    assert outcomes(MARGIN + changed / 2, changed / 2, 400)["passed"] <= 0.055


@pytest.mark.parametrize("changed", [0.02, 0.04, 0.08])
def test_as_many_images_as_are_said_to_settle_it_do(changed: float) -> None:
    # Seen on fifty images, of which as many are lost as won.
    each = round(50 * changed / 2) or 1
    pair = paired(each, each, 50)
    found = gate.non_inferiority(pair.right, pair.incumbent_right, pair.groups, MARGIN)
    settled = outcomes(each / 50, each / 50, found.images_needed, 4000)["passed"]
    assert 0.75 <= settled <= 0.9


@pytest.mark.parametrize("alike", [0.3, 0.7, 1.0])
def test_images_of_a_group_do_not_let_a_worse_version_through(alike: float) -> None:
    """Groups of four, in part of which all images change together."""
    rng = np.random.default_rng(round(10 * alike))
    groups, passed = np.repeat(np.arange(100), 4), 0
    for _ in range(1000):
        together = (rng.random(100) < alike)[groups]
        fate = np.where(together, rng.random(100)[groups], rng.random(400))
        lost, won = fate < 0.06, (fate >= 0.06) & (fate < 0.07)
        passed += gate.non_inferiority(~lost, ~won, groups, MARGIN).verdict == "passed"
    assert passed <= 0.03 * 1000


def test_latency_is_the_median_of_single_images_decoding_included(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(gate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow:
        feature_dim, nbytes, precision, max_batch, infer_s = 3, 0, "fp32", 1, 0.0

        def __init__(self) -> None:
            self.shapes: list[tuple[int, ...]] = []

        def run(self, images: np.ndarray, cores: int = 0) -> np.ndarray:
            # The first takes long, and some others do.
            now[0] += 0.01 if len(self.shapes) % 3 else 9.0
            self.shapes.append(images.shape)
            return np.zeros((len(images), 3), np.float32)

    session, decoded = Slow(), []

    def decode() -> np.ndarray:
        now[0] += 0.02
        decoded.append(1)
        return np.zeros((224, 224, 3), np.uint8)

    taken_ms = gate.measure_latency_ms([decode], session, lambda features: features)
    assert taken_ms == pytest.approx(30)
    assert set(session.shapes) == {(1, 224, 224, 3)}
    assert len(decoded) == len(session.shapes)


def test_a_version_before_that_is_below_chance_tells_of_classes_that_are_mixed_up() -> None:
    own = paired(0, 0, 60)
    swapped = replace(
        own, right=np.ones(60, np.bool_), incumbent_right=np.arange(60) < 3, chance=0.5
    )
    found = checked(Gate(not_worse_than="prod"), compared=swapped)
    assert (found.verdict, found.passed) == ("undecided", False)
    assert "see that the classes are not mixed up" in found.detail
