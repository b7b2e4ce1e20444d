"""Confidence against accuracy, against values worked out by hand and simulated answers."""

import numpy as np
import pytest

from trainer.reporting import calibration


def _answers(
    n: int, sharpened: float, seed: int = 0
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float64]], np.ndarray]:
    """Probabilities of two classes that are right as often as they say before `sharpened`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, n)
    honest = 1 / (1 + np.exp(-logits))
    targets = (rng.random(n) < honest).astype(np.int64)
    said = 1 / (1 + np.exp(-logits * sharpened))
    return np.stack([1 - said, said], axis=1), targets


def test_the_probabilities_before_the_temperature_follow_from_those_after() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (20, 4))

    def softmax(z: np.ndarray) -> np.ndarray:
        raised = np.exp(z - z.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)

    before = calibration.untempered(softmax(logits / 2.5).astype(np.float32), 2.5)
    assert before == pytest.approx(softmax(logits), abs=1e-5)


def test_honest_probabilities_are_within_chance_and_sharpened_ones_are_not() -> None:
    honest = calibration.measure(*_answers(300, 1.0), temperature=1.0)
    assert honest.verdict == "not_shown"
    sharp = calibration.measure(*_answers(300, 4.0), temperature=1.0)
    assert sharp.verdict == "off"
    assert sharp.error > 2 * honest.error


def test_a_temperature_that_mends_shows_as_less_error_than_before() -> None:
    # What a temperature of 4 made of logits that were four times too large.
    found = calibration.measure(*_answers(1000, 1.0), temperature=4.0)
    assert found.error < found.error_before
    assert found.brier < found.brier_before
    assert found.temperature == 4.0
    assert not found.is_worse_than_before


def test_a_temperature_that_harms_is_told() -> None:
    found = calibration.measure(*_answers(1000, 0.3), temperature=3.0)
    assert found.is_worse_than_before


def test_a_handful_of_images_shows_nothing_unless_it_is_far_off() -> None:
    assert calibration.measure(*_answers(12, 1.0), temperature=1.0).verdict == "too_few_images"
    probabilities = np.tile([0.99, 0.01], (12, 1))
    assert calibration.measure(probabilities, np.ones(12, np.int64), 1.0).verdict == "off"


def test_chance_allows_fewer_images_more_error() -> None:
    few = calibration.measure(*_answers(30, 1.0), temperature=1.0)
    many = calibration.measure(*_answers(3000, 1.0), temperature=1.0)
    assert few.error_by_chance > 3 * many.error_by_chance


def test_the_brier_score_is_summed_over_the_classes() -> None:
    probabilities = np.array([[0.8, 0.2], [0.5, 0.5]])
    score = calibration.brier_score(probabilities, np.array([0, 1]))
    assert score == pytest.approx((2 * 0.2**2 + 2 * 0.5**2) / 2)
    assert probabilities[0, 0] == 0.8


def test_bins_hold_every_image_once_and_empty_ones_say_nothing() -> None:
    probabilities, targets = _answers(200, 1.0)
    bins = calibration.reliability(probabilities, targets)
    assert sum(b.count for b in bins) == 200
    assert all((b.accuracy is None) == (b.count == 0) for b in bins)
    assert all(b.low - 1e-9 <= b.confidence <= b.high + 1e-9 for b in bins if b.confidence)
    certain = calibration.reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert certain[-1].count == 1
