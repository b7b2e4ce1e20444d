"""What more images would bring: on made-up features whose answer is known."""

import numpy as np
import pytest

from trainer.reporting import learning_curve, power_law

SIZES = (25, 50, 100, 175, 250)


def _clouds(n: int, noise: float, seed: int, d: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    middles = np.random.default_rng(99).normal(size=(3, d))
    targets = np.arange(n) % 3
    return (middles[targets] + rng.normal(0, noise, (n, d))).astype(np.float32), targets


def _right(errors: list[float], images: int = 4000) -> dict[int, np.ndarray]:
    """Each validation image has a difficulty, so that sizes err on the same ones."""
    hard = (np.arange(images) + 0.5) / images
    return {s: (hard >= e)[None] for s, e in zip(SIZES, errors, strict=True)}


@pytest.mark.parametrize(("n", "d"), [(90, 200), (300, 40)])
def test_the_quick_classifier_is_ridge_regression_of_the_one_hot_classes(n: int, d: int) -> None:
    x, targets = _clouds(n, 3.0, 0, d)
    asked, wanted = _clouds(60, 3.0, 1, d)
    curve = learning_curve.measure(x, targets, asked, wanted, 3, seed=0)
    centred = x - x.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((centred**2).sum(axis=1).mean())
    a, b = centred / scale, (asked - x.mean(axis=0, dtype=np.float64)) / scale
    y = np.eye(3)[targets]
    weight = np.linalg.solve(a.T @ a + 0.01 * n * np.eye(d), a.T @ (y - y.mean(axis=0)))
    expected = ((b @ weight + y.mean(axis=0)).argmax(axis=1) == wanted).mean()
    assert curve.points[-1].images == n
    assert curve.points[-1].accuracy == pytest.approx(expected)


def test_the_same_seed_gives_the_same_curve() -> None:
    x, targets = _clouds(120, 3.0, 0)
    asked, wanted = _clouds(90, 3.0, 1)
    first = learning_curve.measure(x, targets, asked, wanted, 3, seed=4)
    assert first == learning_curve.measure(x, targets, asked, wanted, 3, seed=4)
    assert first != learning_curve.measure(x, targets, asked, wanted, 3, seed=5)


def test_subsets_are_nested_and_keep_every_class() -> None:
    targets = np.array([0] * 40 + [1] * 3)
    steps = learning_curve._nested(targets, np.random.default_rng(0))
    everything = np.concatenate(steps)
    assert sorted(everything.tolist()) == list(range(43))
    assert set(targets[steps[0]].tolist()) == {0, 1}
    assert len(steps[0]) == 5


def test_the_extrapolation_holds_where_twice_the_images_are_there_to_try() -> None:
    x, targets = _clouds(600, 3.5, 0)
    asked, wanted = _clouds(1500, 3.5, 1)
    half = learning_curve.measure(x[:300], targets[:300], asked, wanted, 3, seed=0)
    whole = learning_curve.measure(x, targets, asked, wanted, 3, seed=0)
    gained = whole.points[-1].accuracy - half.points[-1].accuracy
    assert half.verdict == "more_helps"
    assert half.gain is not None
    assert half.gain == pytest.approx(gained, abs=0.02)
    assert half.fitted[-1].images == 600


def test_a_power_law_is_found_again() -> None:
    errors = [0.02 + 0.05 * (s / 250) ** -0.5 for s in SIZES]
    curve = power_law.extrapolate(_right(errors, 40_000), seed=0)
    assert curve.gain == pytest.approx(0.05 * (1 - 2**-0.5), abs=0.001)
    assert curve.gain_low is not None
    assert curve.gain_high is not None
    assert curve.gain_low < 0.05 * (1 - 2**-0.5) < curve.gain_high
    assert curve.verdict == "more_helps"
    assert "500 instead of 250" in curve.words


def test_a_flat_curve_says_that_more_brings_little() -> None:
    curve = power_law.extrapolate(_right([0.05] * 5), seed=0)
    assert curve.verdict == "little"
    assert "would bring little" in curve.words
    assert curve.gain == pytest.approx(0, abs=1e-3)


def test_errors_that_grow_with_the_data_are_no_gain() -> None:
    curve = power_law.extrapolate(_right([0.04, 0.045, 0.05, 0.055, 0.06]), seed=0)
    assert curve.gain == 0
    assert all(p.accuracy == pytest.approx(0.95) for p in curve.fitted)


def test_few_validation_images_and_none_wrong_are_said_honestly() -> None:
    few = power_law.extrapolate(_right([0.5, 0.4, 0.3, 0.3, 0.2], 20), seed=0)
    assert (few.verdict, few.gain, few.fitted) == ("unknown", None, [])
    assert "cannot be said from 20 validation images" in few.words
    assert len(few.points) == 5
    none_wrong = power_law.extrapolate(_right([0.2, 0.1, 0.1, 0.05, 0.0]), seed=0)
    assert none_wrong.gain is None
    assert "no validation image is answered wrong" in none_wrong.words


def test_a_wide_interval_is_no_promise() -> None:
    noisy = power_law.extrapolate(_right([0.6, 0.55, 0.35, 0.4, 0.2], 40), seed=0)
    assert noisy.verdict == "unknown"
    assert "cannot be said" in noisy.words


@pytest.mark.parametrize(
    ("gain", "low", "high", "told"),
    [
        (0.0312, 0.0104, 0.0481, "about 3 points of accuracy (between 1 and 5 points)"),
        (0.0123, 0.0104, 0.0151, "about 1.2 points of accuracy (between 1.0 and 1.5 points)"),
    ],
)
def test_a_gain_is_rounded_by_how_well_it_is_known(
    gain: float, low: float, high: float, told: str
) -> None:
    verdict, words = power_law._judged(250, 100, gain, low, high)
    assert verdict == "more_helps"
    assert told in words
    assert "quick classifier" in words


def test_a_gain_of_less_than_an_image_was_not_measured() -> None:
    verdict, words = power_law._judged(178, 44, 0.008, 0.003, 0.033)
    assert verdict == "unknown"
    assert "44 validation images, of which one is 2.3 points" in words
    assert power_law._judged(178, 440, 0.008, 0.003, 0.033)[0] == "more_helps"


def test_two_images_a_class_still_give_a_report() -> None:
    x, targets = _clouds(6, 3.0, 0)
    asked, wanted = _clouds(6, 3.0, 1)
    curve = learning_curve.measure(x, targets, asked, wanted, 3, seed=0)
    assert curve.verdict == "unknown"
    assert curve.points[-1].images == 6


def test_copies_of_one_feature_do_not_break_the_fit() -> None:
    x = np.ones((40, 64), dtype=np.float32)
    targets = np.arange(40) % 2
    curve = learning_curve.measure(x, targets, x, targets, 2, seed=0)
    assert all(0 <= p.accuracy <= 1 for p in curve.points)
