"""Scores against the formulas that they are, written the slow way."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize

from trainer import transferability

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def make(n: int, d: int, classes: int, shift: float, seed: int = 0) -> tuple[Doubles, Ints]:
    """Positive features with a mean, as backbones give them; `shift` sets classes apart."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(n) % classes)
    features = rng.gamma(2.0, 1.0, (n, d)) * rng.uniform(0.2, 2.0, d)
    features[np.arange(n), targets] += shift
    return features, targets


def slow_log_me(f: Doubles, y: Ints) -> float:
    n = len(f)
    gram = f @ f.T
    total = 0.0
    for label in set(y.tolist()):
        z = (y == label).astype(float)

        def negative(logs: Doubles, z: Doubles = z) -> float:
            alpha, beta = np.exp(logs)
            covariance = gram / alpha + np.eye(n) / beta
            _, log_det = np.linalg.slogdet(covariance)
            return 0.5 * (
                n * np.log(2 * np.pi) + log_det + z @ np.linalg.solve(covariance, z)
            ) / n  # fmt: skip

        options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
        starts = ([0.0, 0.0], [4.0, 2.0], [8.0, 1.0])
        total -= min(
            minimize(negative, start, method="Nelder-Mead", options=options).fun for start in starts
        )
    return total / len(set(y.tolist()))


@pytest.mark.parametrize(
    ("n", "d", "classes", "shift"),
    [(40, 6, 2, 1.0), (30, 60, 3, 4.0), (50, 10, 4, 0.0), (24, 24, 2, 2.0)],
)
def test_log_me_is_the_evidence_at_its_maximum(n: int, d: int, classes: int, shift: float) -> None:
    f, y = make(n, d, classes, shift)
    assert transferability.log_me(f, y) == pytest.approx(slow_log_me(f, y), abs=2e-4)


def test_log_me_does_not_depend_on_the_features_scale_or_rotation() -> None:
    f, y = make(50, 8, 3, 2.0)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
    expected = transferability.log_me(f, y)
    assert transferability.log_me(f * 1e4, y) == pytest.approx(expected, abs=1e-5)
    assert transferability.log_me(f @ rotation, y) == pytest.approx(expected, abs=1e-5)


def test_log_me_charges_for_features_that_say_nothing() -> None:
    f, y = make(60, 10, 2, 3.0)
    noise = np.random.default_rng(1).normal(0, 2, (60, 2000))
    assert transferability.log_me(f, y) > transferability.log_me(np.hstack([f, noise]), y) + 0.1
    assert transferability.log_me(f, y) > transferability.log_me(noise, y) + 0.1


def test_features_that_are_all_the_same_score_low_and_fail_nothing() -> None:
    y = np.arange(20) % 2
    worthless = transferability.log_me(np.zeros((20, 5)), y)
    assert np.isfinite(worthless)
    assert worthless < transferability.log_me(np.eye(2)[y], y)


def test_features_that_repeat_each_other_say_what_they_say_once() -> None:
    f, y = make(60, 5, 3, 2.0)
    twice = np.hstack([f, f, np.zeros((60, 2))])
    assert transferability.log_me(twice, y) == pytest.approx(transferability.log_me(f, y))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(bad: float) -> None:
    f, y = make(20, 3, 2, 1.0)
    f[3, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        transferability.log_me(f, y)


def test_any_beginning_of_the_spread_order_is_stratified() -> None:
    targets = np.repeat([0, 1, 2], [600, 300, 3])
    order = transferability.spread(targets, 4)
    assert sorted(order) == list(range(903))
    assert np.bincount(targets[order[:6]]).tolist() == [2, 2, 2]
    for n in (30, 90, 450):
        counts = np.bincount(targets[order[:n]], minlength=3)
        assert counts[0] == pytest.approx(n * 600 / 903, abs=4)
        assert counts[2] >= 2
    assert not np.array_equal(order, transferability.spread(targets, 5))
