import numpy as np
import pytest

from trainer import outliers

DIM = 40


def images(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Features of two classes; `shift` moves them to where no class is."""
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % 2
    centres = np.ones((2, DIM))
    centres[0, :10] += 3
    centres[1, 10:20] += 3
    features = centres[targets] + 0.3 * rng.normal(size=(count, DIM))
    features[:, 20:30] += shift
    return features.astype(np.float32), targets.astype(np.int64)


def fit(
    train: np.ndarray, targets: np.ndarray, held_out: np.ndarray, seed: int = 0
) -> outliers.Outliers:
    fitted = outliers.fit(train, targets, held_out, seed)
    assert fitted is not None
    return fitted[0]


NONE = np.empty((0, DIM), np.float32)


def test_about_one_in_twenty_images_of_the_same_kind_lies_above_one() -> None:
    train, targets = images(300, 0)
    fresh, _ = images(2000, 1)
    fitted = fit(train, targets, fresh[:100])
    assert 0.02 < float((fitted.scores(fresh) > 1).mean()) < 0.09


def test_images_of_another_kind_lie_above_one() -> None:
    train, targets = images(300, 0)
    fitted = fit(train, targets, train[:50])
    strange, _ = images(200, 2, shift=2.0)
    assert float((fitted.scores(strange) > 1).mean()) > 0.99


def test_few_images_are_enough_to_tell_what_is_strange() -> None:
    train, targets = images(10, 0)
    fitted = fit(train, targets, NONE)
    strange, _ = images(200, 2, shift=3.0)
    assert float((fitted.scores(strange) > 1).mean()) > 0.95


def test_a_class_of_one_image_is_no_obstacle() -> None:
    train, targets = images(21, 0)
    targets[-1] = 2
    fitted = fit(train, targets, NONE)
    assert fitted.means.shape == (3, DIM)
    assert np.isfinite(fitted.scores(train)).all()


def test_scores_of_held_out_images_are_kept_ascending_and_bounded_in_number() -> None:
    train, targets = images(100, 0)
    held_out, _ = images(1000, 3)
    fitted = outliers.fit(train, targets, held_out, 0)
    assert fitted is not None
    kept = fitted[0].validation
    assert len(kept) == 256
    assert (np.diff(kept.astype(np.float32)) >= 0).all()
    np.testing.assert_allclose(fitted[1], fitted[0].scores(held_out), rtol=1e-2)
    assert float(kept[-1]) == pytest.approx(float(fitted[1].max()), rel=1e-2)


def test_where_nothing_is_held_out_each_image_is_scored_without_itself() -> None:
    train, targets = images(40, 0)
    fitted = outliers.fit(train, targets, NONE, 0)
    assert fitted is not None
    known, scores = fitted
    assert len(scores) == 40
    # Stranger than to what they were learned by; 19 of 20 lie below 1.
    assert scores.mean() > known.scores(train).mean()
    assert (scores <= 1).mean() == pytest.approx(0.95, abs=0.03)


def test_one_image_a_class_tells_nothing_of_how_much_they_differ() -> None:
    train, _ = images(3, 0)
    assert outliers.fit(train, np.arange(3), NONE, 0) is None


def test_the_same_data_and_seed_give_the_same_numbers() -> None:
    train, targets = images(60, 0)
    first, second = (fit(train, targets, train[:10], 7) for _ in range(2))
    np.testing.assert_array_equal(first.inverse_variance, second.inverse_variance)
    np.testing.assert_array_equal(first.means, second.means)
