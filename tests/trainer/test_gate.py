from math import comb
from types import SimpleNamespace

import numpy as np
import pytest

from service.domain import Parity
from service.jobs.contract import Gate
from trainer import evaluate, gate

CLASSES = ("a", "b")
N = 40


def rights(wrong: set[int]) -> np.ndarray:
    return np.array([place not in wrong for place in range(N)])


def checked(
    asked: Gate,
    wrong: set[int] = frozenset(),  # type: ignore[assignment]
    incumbent_wrong: set[int] | None = None,
    latency_ms: float = 10.0,
) -> dict[str, bool]:
    targets = np.zeros(N, dtype=np.int64)
    right = rights(wrong)
    probabilities = np.where(right[:, None], [[0.9, 0.1]], [[0.2, 0.8]])
    metrics = evaluate.measure(probabilities, targets, CLASSES)
    incumbent = None if incumbent_wrong is None else rights(incumbent_wrong)
    parity = Parity(1e-4, 1.0, 32)
    found = gate.checks(asked, metrics, parity, right, incumbent, lambda: latency_ms)
    return {check.name: check.passed for check in found}


def test_a_gate_that_asks_for_nothing_checks_nothing() -> None:
    assert checked(Gate()) == {}


@pytest.mark.parametrize(("bound", "passes"), [(0.95, True), (0.951, False)])
def test_accuracy_passes_at_its_bound_and_not_below(bound: float, passes: bool) -> None:
    assert checked(Gate(min_accuracy=bound), {0, 1}) == {"accuracy": passes}


@pytest.mark.parametrize(("bound", "passes"), [(2e-4, True), (5e-5, False)])
def test_parity_is_bounded(bound: float, passes: bool) -> None:
    assert checked(Gate(max_parity_difference=bound)) == {"parity": passes}


@pytest.mark.parametrize(("bound", "passes"), [(12.0, True), (9.0, False)])
def test_latency_is_bounded(bound: float, passes: bool) -> None:
    assert checked(Gate(max_latency_ms=bound)) == {"latency": passes}


def test_a_first_version_is_not_worse_than_none() -> None:
    assert checked(Gate(not_worse_than="prod"), {0, 1}) == {"not_worse": True}


@pytest.mark.parametrize(("lost", "won"), [(3, 0), (4, 0), (5, 0), (6, 1), (8, 1), (9, 5)])
def test_not_worse_is_the_exact_one_sided_test_on_the_images_that_differ(
    lost: int, won: int
) -> None:
    p = sum(comb(lost + won, k) for k in range(lost, lost + won + 1)) / 2 ** (lost + won)
    new_wrong, incumbent_wrong = set(range(lost)), set(range(20, 20 + won))
    assert checked(Gate(not_worse_than="prod"), new_wrong, incumbent_wrong) == {
        "not_worse": p > 0.05
    }


def test_a_better_version_is_not_worse() -> None:
    assert checked(Gate(not_worse_than="prod"), set(), set(range(10))) == {"not_worse": True}


def test_what_was_not_reached_says_so_in_words() -> None:
    targets = np.zeros(N, dtype=np.int64)
    metrics = evaluate.measure(np.tile([[0.9, 0.1]], (N, 1)), targets, CLASSES)
    (found,) = gate.checks(
        Gate(not_worse_than="prod"), metrics, Parity(0, 1, 1), rights(set(range(8))), rights(set()),
        lambda: 0.0,
    )  # fmt: skip
    assert not found.passed
    assert "prod" in found.detail
    assert "8 lost, 0 won" in found.detail


def test_latency_is_the_median_of_single_images_decoding_included(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(gate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow:
        feature_dim, nbytes, precision, max_batch, image_s = 3, 0, "fp32", 1, 0.0
        damage = None

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
