"""The measures of a gap between domains are what their papers define."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from trainer.adaptation import gap


def samples(n: int, m: int, d: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (n, d)), rng.normal(shift, 1.5, (m, d))


def test_mmd_is_the_mean_over_pairs_of_different_images() -> None:
    a, b = samples(7, 9, 3, 0.5)
    every = np.concatenate([a, b])
    distances = [np.linalg.norm(x - y) for i, x in enumerate(every) for y in every[:i]]
    # The root and the median exchange only where the median is one of the distances.
    assert len(distances) % 2 == 0
    bandwidth = np.sqrt(np.median(np.square(distances)))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-np.sum((x - y) ** 2) / (2 * bandwidth**2)))

    inside_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    inside_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert gap.mmd(a, b) == pytest.approx(inside_a + inside_b - 2 * across, abs=1e-12)


def test_mmd_of_one_distribution_is_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [gap.mmd(*rng.normal(0, 1, (2, 30, 4))) for _ in range(100)]
    assert abs(np.mean(values)) < 2 * np.std(values) / 10
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 6), (40, 45, 40)])
def test_the_frechet_distance_is_the_one_with_the_root_of_the_product(
    n: int, m: int, d: int
) -> None:
    a, b = samples(n, m, d, 0.3)
    c, c2 = np.cov(a.T), np.cov(b.T)
    root = np.trace(np.real(sqrtm(c @ c2)))
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c) + np.trace(c2) - 2 * root
    assert gap.frechet_distance(a, b) == pytest.approx(slow, rel=1e-4)


def test_the_frechet_distance_of_fewer_images_than_features_has_the_roots_eigenvalues() -> None:
    a, b = samples(10, 12, 40, 0.3)
    values = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real
    root = np.sqrt(values[values > 1e-9]).sum()
    slow = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert gap.frechet_distance(a, b) == pytest.approx(slow - 2 * root, rel=1e-9)


def test_the_frechet_distance_of_a_sample_from_itself_is_zero() -> None:
    a, _ = samples(20, 2, 30, 0)
    assert gap.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(100, 100), (200, 20)])
@pytest.mark.parametrize("d", [5, 300])
def test_the_proxy_a_distance_is_two_for_separable_and_near_zero_for_equal_domains(
    n: int, m: int, d: int
) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (n, d)), rng.normal(0, 1, (m, d))
    assert gap.proxy_a_distance(a, b, seed=0) < 0.5
    b[:, 0] += 40
    assert gap.proxy_a_distance(a, b, seed=0) == 2


def test_the_proxy_a_distance_comes_of_the_cross_validated_ridge_classifier() -> None:
    a, b = samples(30, 20, 4, 0.4)
    rows, sign = np.concatenate([a, b]), np.repeat([-1.0, 1.0], [30, 20])
    rng = np.random.default_rng([3, 0xAD])
    fold = np.concatenate([rng.permutation(30), rng.permutation(20)]) % 5
    scores = np.empty(50)
    for f in range(5):
        train = fold != f
        w = np.where(sign < 0, 1 / 30, 1 / 20)[train]
        w /= w.sum()
        centre, middle = w @ rows[train], w @ sign[train]
        x = rows[train] - centre
        covariance = x.T @ (w[:, None] * x)
        l2 = 1e-2 * np.trace(covariance) / len(w)
        slope = np.linalg.solve(covariance + l2 * np.eye(4), x.T @ (w * (sign[train] - middle)))
        scores[~train] = (rows[~train] - centre) @ slope + middle
    error = ((scores[:30] >= 0).mean() + (scores[30:] < 0).mean()) / 2
    assert 0.05 < error < 0.45
    assert gap.proxy_a_distance(a, b, seed=3) == pytest.approx(2 * (1 - 2 * error))


def test_the_unit_of_the_features_does_not_matter() -> None:
    a, b = samples(30, 25, 6, 0.5)
    one, other = gap.measure(a, b, 0), gap.measure(a * 100 + 7, b * 100 + 7, 0)
    assert one == pytest.approx(other)
    assert one["proxy_a_distance"] == other["proxy_a_distance"]


def test_of_many_images_a_sample_is_drawn_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "SAMPLE", 20)
    a, b = samples(60, 50, 3, 0.2)
    assert gap.measure(a, b, 1) == gap.measure(a, b, 1)
    assert gap.measure(a, b, 1) != gap.measure(a, b, 2)
