import numpy as np
import pytest
from scipy.special import log_softmax

from trainer import folds, outliers
from trainer.outliers import Images

DIM = 40
CENTRES = np.ones((2, DIM))
CENTRES[0, :10] += 3
CENTRES[1, 10:20] += 3


def images(count: int, seed: int, shift: float = 0.0, doubt: float = 1.0) -> Images:
    """Features of two classes in turn; `shift` moves them to where no class is.

    The logits are what the means tell, with noise, divided by `doubt`.
    """
    rng = np.random.default_rng(seed)
    features = CENTRES[np.arange(count) % 2] + 0.3 * rng.normal(size=(count, DIM))
    features[:, 20:30] += shift
    logits = (features @ CENTRES.T / 10 + 0.3 * rng.normal(size=(count, 2))) / doubt
    return Images(features.astype(np.float32), log_softmax(logits, axis=1).astype(np.float32))


NONE = images(0, 0)


def fit(
    train: Images,
    held_out: Images = NONE,
    *,
    targets: np.ndarray | None = None,
    rate: float = 0.05,
    is_trained: bool = False,
) -> outliers.Fitted:
    if targets is None:
        targets = np.arange(len(train)) % 2
    dealt = folds.deal(targets, order=np.random.default_rng(0).random(len(targets)))
    fitted = outliers.fit(train, targets, dealt, held_out, false_alarms=rate, is_trained=is_trained)
    assert fitted is not None
    return fitted


def scores(fitted: outliers.Fitted, of: Images) -> np.ndarray:
    return fitted.outliers.scores(of.features, of.log_probabilities)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("is_trained", [False, True])
def test_as_many_images_of_the_same_kind_lie_above_one_as_were_allowed(
    rate: float, is_trained: bool
) -> None:
    fitted = fit(images(500, 0), images(600, 3), rate=rate, is_trained=is_trained)
    assert fitted.references == (600 if is_trained else 500)
    alarms = float((scores(fitted, images(20_000, 1)) > 1).mean())
    assert alarms == pytest.approx(rate, rel=0.5)


def test_images_of_another_kind_lie_above_one() -> None:
    assert float((scores(fit(images(300, 0)), images(200, 2, shift=2.0)) > 1).mean()) > 0.99


def test_images_that_the_head_finds_little_in_lie_above_one_though_they_look_alike() -> None:
    fitted, doubtful = fit(images(300, 0)), images(200, 2, doubt=10)
    assert float((scores(fitted, doubtful) > 1).mean()) > 0.5
    assert float((scores(fitted, images(200, 2)) > 1).mean()) < 0.1


def test_no_image_is_more_familiar_by_what_the_head_says_than_the_most_familiar_known_one() -> None:
    # Far from all that is known, and the surest of all.
    fitted, strange = fit(images(300, 0)), images(200, 2, shift=2.0, doubt=0.01)
    assert float((scores(fitted, strange) > 1).mean()) > 0.99


def test_few_images_are_enough_to_tell_what_is_strange() -> None:
    assert float((scores(fit(images(10, 0)), images(200, 2, shift=3.0)) > 1).mean()) > 0.95


def test_a_score_is_in_units_of_the_images_own_spread_from_the_least_to_the_threshold() -> None:
    held_out = images(400, 3)
    fitted = fit(images(200, 0), held_out, rate=0.1, is_trained=True)
    raw = outliers._estimated(images(200, 0).features, np.arange(200) % 2)
    # The formula once more, plainly: standardised, added up, and stretched.
    distance = raw.distances(held_out.features).astype(np.float64)
    energy = held_out.log_probabilities.astype(np.float64).mean(axis=1)
    joined = (distance - distance.mean()) / distance.std() + (energy - energy.mean()) / energy.std()
    threshold = np.quantile(joined, 0.9)
    expected = (joined - joined.min()) / (threshold - joined.min())
    np.testing.assert_allclose(fitted.scores, expected, atol=2e-3)
    np.testing.assert_allclose(scores(fitted, held_out), expected, atol=2e-3)


def test_a_class_of_one_image_is_no_obstacle() -> None:
    train, targets = images(21, 0), np.arange(21) % 2
    targets[-1] = 2
    fitted = fit(train, targets=targets)
    assert fitted.outliers.means.shape == (3, DIM)
    assert fitted.references == 20
    assert np.isfinite(scores(fitted, train)).all()


def test_scores_of_held_out_images_are_kept_ascending_and_bounded_in_number() -> None:
    held_out = images(1000, 3)
    fitted = fit(images(100, 0), held_out)
    kept = fitted.outliers.validation
    assert len(kept) == 256
    assert (np.diff(kept.astype(np.float32)) >= 0).all()
    np.testing.assert_allclose(fitted.scores, scores(fitted, held_out), atol=2e-3)
    assert float(kept[-1]) == pytest.approx(float(fitted.scores.max()), rel=1e-2)


def test_where_nothing_is_held_out_each_image_is_scored_without_itself() -> None:
    train = images(40, 0)
    fitted = fit(train)
    assert len(fitted.scores) == 40
    # Stranger than to what they were learned by; 19 of 20 lie below 1.
    assert fitted.scores.mean() > scores(fitted, train).mean()
    assert (fitted.scores <= 1).mean() == pytest.approx(0.95, abs=0.03)


def test_images_that_no_head_answered_set_no_threshold() -> None:
    train, targets = images(3, 0), np.arange(3)
    nobody = np.full(3, -1)
    assert outliers.fit(train, targets, nobody, NONE, false_alarms=0.05) is None
    unanswered = Images(train.features, np.full((3, 2), np.nan, np.float32))
    own = np.array([0, 1, 0])
    assert outliers.fit(unanswered, np.array([0, 0, 1]), own, NONE, false_alarms=0.05) is None


def test_images_that_are_all_alike_divide_by_nothing() -> None:
    train = Images(np.ones((8, DIM), np.float32), np.full((8, 2), np.log(0.5), np.float32))
    fitted = fit(train)
    assert (fitted.scores <= 1).all()
    assert float(scores(fitted, images(1, 0, shift=5.0))[0]) > 1


def test_a_rate_that_is_rarer_than_one_of_the_images_is_said_to_be() -> None:
    few = fit(images(20, 0), rate=0.01)
    assert "20 images set the threshold" in few.warning
    assert "one image in 21" in few.warning
    assert "100 images tell" in few.warning
    assert fit(images(20, 0)).warning == ""


def test_of_many_images_a_sample_with_every_class_is_fitted_to() -> None:
    targets = np.zeros(20_000, np.int64)
    targets[-1] = 1
    places = outliers.sample(targets, 3)
    assert 5000 <= len(places) <= 5001
    assert places[-1] == 19_999
    np.testing.assert_array_equal(places, outliers.sample(targets, 3))
    np.testing.assert_array_equal(outliers.sample(targets[:9], 3), np.arange(9))


def test_logarithms_keep_what_is_not_known_and_stay_finite() -> None:
    found = outliers.logarithms(np.array([[0.0, 1.0], [np.nan, np.nan]], np.float32))
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
