"""The head's fit minimises what the contract says it does."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from trainer import linear


def problem(n: int, d: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    targets = np.arange(n) % classes
    centres = rng.normal(0, 1, (classes, d))
    return (centres[targets] + rng.normal(0, 2, (n, d)) + 5).astype(np.float32), targets


# More pictures than features, and fewer: the second is solved in a rotated space.
@pytest.mark.parametrize(("n", "d"), [(120, 10), (60, 200)])
def test_the_fit_is_the_penalised_minimum(n: int, d: int) -> None:
    features, targets = problem(n, d)
    l2 = 0.05
    fitted = linear.fit(features, targets, 3, l2, seed=0)
    # scikit-learn minimises C * sum of losses + |w|^2 / 2.
    reference = LogisticRegression(C=1 / (l2 * n), tol=1e-10, max_iter=10_000)
    reference.fit(features.astype(np.float64), targets)
    mine = features @ fitted.weight.T + fitted.bias
    theirs = reference.decision_function(features.astype(np.float64))
    difference = (mine - mine.mean(1, keepdims=True)) - (theirs - theirs.mean(1, keepdims=True))
    assert np.abs(difference).max() < 1e-2
    assert fitted.l2 == pytest.approx(l2)


def test_cross_validation_prefers_a_stronger_penalty_for_noisier_features() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(90) % 3
    signal = np.eye(3)[targets]
    clean = np.hstack([signal, rng.normal(0, 0.01, (90, 50))]).astype(np.float32)
    noise = rng.normal(0, 1, (90, 53)).astype(np.float32)
    weak = linear.fit(clean, targets, 3, None, seed=0)
    strong = linear.fit(noise, targets, 3, None, seed=0)
    assert strong.l2 / np.var(noise) > weak.l2 / np.var(clean)


def test_the_temperature_cools_what_is_overconfident() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(90) % 3
    features = rng.normal(0, 1, (90, 100)).astype(np.float32)
    features[:, :3] += np.eye(3)[targets]
    overfitted = linear.fit(features, targets, 3, 1e-6, seed=0)
    assert overfitted.temperature > 1.5
    assert overfitted.cross_validated_loss is not None
    # No worse than saying nothing, which a tenth of the temperature would be.
    assert overfitted.cross_validated_loss < np.log(3) + 0.01


def test_folds_that_are_all_right_do_not_ask_for_endless_confidence() -> None:
    targets = np.arange(30) % 3
    features = np.eye(3, dtype=np.float32)[targets] * 10
    fitted = linear.fit(features, targets, 3, None, seed=0)
    logits = (features @ fitted.weight.T + fitted.bias) / fitted.temperature
    confidence = np.exp(logits).max(1) / np.exp(logits).sum(1)
    assert 0.9 < confidence.max() < 0.99


def test_a_class_of_one_picture_is_fitted_without_cross_validation() -> None:
    features, _ = problem(7, 5)
    targets = np.array([0, 0, 0, 1, 1, 1, 2])
    fitted = linear.fit(features, targets, 3, None, seed=0)
    assert fitted.cross_validated_loss is None
    assert fitted.temperature == 1.0
