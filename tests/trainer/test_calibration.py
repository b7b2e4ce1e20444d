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


def test_the_figures_before_the_temperature_are_those_of_the_logits_themselves() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (200, 4)), rng.integers(0, 4, 200)

    def softmax(z: np.ndarray) -> np.ndarray:
        raised = np.exp(z - z.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)

    found = calibration.measure(softmax(logits / 2.5).astype(np.float32), targets, 2.5)
    before = softmax(logits)
    assert found.error_before == pytest.approx(
        calibration.expected_error(before, targets), abs=1e-4
    )


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
    score = calibration.measure(probabilities, np.array([0, 1]), 1.0).brier
    assert score == pytest.approx((2 * 0.2**2 + 2 * 0.5**2) / 2)
    assert probabilities[0, 0] == 0.8


def test_bins_hold_every_image_once_and_about_as_many_each() -> None:
    for n, bins in ((60, 5), (200, 10), (3000, 15)):
        probabilities, targets = _answers(n, 1.0)
        found = calibration.measure(probabilities, targets, 1.0).bins
        assert len(found) == bins
        assert sum(b.count for b in found) == n
        assert max(b.count for b in found) - min(b.count for b in found) <= 1
        assert all(b.low <= b.confidence <= b.high for b in found)
        assert all(b.accuracy_low <= b.accuracy <= b.accuracy_high for b in found)


def test_answers_that_are_equally_sure_are_one_bin_whatever_their_order() -> None:
    half = np.array([[0.5 + 1e-9, 0.5 - 1e-9]] * 100)
    rising = np.arange(100) // 50
    assert calibration.expected_error(half, rising) == pytest.approx(0, abs=1e-6)
    assert calibration.expected_error(np.array([[1.0, 0.0]] * 100), rising) == pytest.approx(0.5)
    (only,) = calibration.measure(half, rising, 1.0).bins
    assert (only.count, only.accuracy) == (100, 0.5)


def _in_groups(groups: int, size: int, sharpened: float, seed: int) -> tuple[np.ndarray, ...]:
    """As `_answers`, all images of a group alike."""
    probabilities, targets = _answers(groups, sharpened, seed)
    places = np.repeat(np.arange(groups), size)
    return probabilities[places], targets[places], places


def test_perfect_probabilities_are_hardly_ever_called_off() -> None:
    off = sum(
        calibration.measure(*_answers(60, 1.0, seed), 1.0).verdict == "off" for seed in range(60)
    )
    assert off <= 3
    off = 0
    for seed in range(60):
        probabilities, targets, groups = _in_groups(60, 5, 1.0, seed)
        off += calibration.measure(probabilities, targets, 1.0, groups=groups).verdict == "off"
    assert off <= 4


def test_a_large_part_of_a_hundredth_is_no_fault_where_images_are_many() -> None:
    # Beyond chance on 100,000 images, and too little to matter.
    found = calibration.measure(*_answers(100_000, 1.1), temperature=1.0)
    assert found.error > found.error_by_chance
    assert found.verdict == "not_shown"


def test_being_calibrated_is_shown_or_people_are_told_why_not() -> None:
    assert calibration.judge(*_answers(1000, 1.0)) == ("not_shown", "")
    verdict, note = calibration.judge(*_answers(18, 1.0))
    assert verdict == "too_few_images"
    assert note.startswith("only 18 images could be measured on")
    verdict, note = calibration.judge(*_answers(1000, 4.0))
    assert verdict == "off"
    assert "points, mostly higher" in note
    verdict, note = calibration.judge(*_in_groups(40, 25, 1.0, 0))
    assert verdict == "too_few_images"
    assert "only 1000 images in 40 groups" in note


@pytest.mark.parametrize(("images", "groups"), [(1, 1), (30, 30), (300, 1), (400, 40)])
def test_few_images_cannot_show_what_a_model_that_is_sure_says_of_itself(
    images: int, groups: int
) -> None:
    sure = np.tile([0.999, 0.001], (images, 1))
    targets = np.zeros(images, np.int64)
    verdict, note = calibration.judge(sure, targets, np.arange(images) % groups)
    assert verdict == "too_few_images"
    assert note.startswith(f"only {images} image")
