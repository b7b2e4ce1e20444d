"""A regularised linear classifier on features, its strength and its temperature.

Multinomial logistic regression by L-BFGS (Liu and Nocedal 1989), with SciPy
alone: scikit-learn's would take two seconds more to import, of a few that a
feature-based job lasts. Features are centred, scaled by one number and, where
there are more of them than pictures, rotated into the pictures' own space; all
three leave the penalised problem what it is and make it fast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RELATIVE_L2 = tuple(float(x) for x in np.logspace(0, -5, 11))
"""Tried by cross-validation, strongest first, times the features' mean square norm."""
FALLBACK_RELATIVE_L2 = 1e-2
"""Where a class has too few pictures to cross-validate."""
FOLDS = 5
_MAX_STEPS = 500
_TEMPERATURE = (0.1, 10.0)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Weight float64 [classes, d], bias float64 [classes], for features as given."""

    weight: Doubles
    bias: Doubles
    l2: float
    temperature: float
    cross_validated_loss: float | None
    """Mean cross-entropy over the folds, nats, after the temperature."""


def fit(
    features: Floats,
    targets: Ints,
    classes: int,
    l2: float | None,
    seed: int,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Fitted:
    """Fits `mean cross-entropy + l2 / 2 |weight|^2`; the bias goes free.

    Without `l2` the strength with the least loss in a stratified 5-fold
    cross-validation is taken. The temperature (Guo et al. 2017) is fitted to the
    logits of the held-out folds, so on pictures that their weights did not see.
    """
    space = _Space(features)
    folds = _folds(targets, seed)
    candidates = [l2 / space.scale**2] if l2 is not None else list(RELATIVE_L2)
    temperature, loss = 1.0, None
    if folds is None:
        chosen = candidates[0] if l2 is not None else FALLBACK_RELATIVE_L2
    else:
        out_of_fold = _cross_validate(space, targets, classes, candidates, folds, on_progress)
        losses = [_loss(logits, targets) for logits in out_of_fold]
        best = int(np.argmin(losses))
        chosen = candidates[best]
        temperature = _temperature(out_of_fold[best], targets)
        loss = _loss(out_of_fold[best] / temperature, targets)
    solution = _solve(space.rotated, targets, classes, chosen, None)
    weight, bias = space.unrotated(solution)
    return Fitted(weight, bias, chosen * space.scale**2, temperature, loss)


class _Space:
    """Where the problem is solved; knows the way back."""

    def __init__(self, features: Floats) -> None:
        x = features.astype(np.float64)
        self.mean = x.mean(axis=0)
        x -= self.mean
        # One number for all features: the penalty keeps its meaning up to it.
        self.scale = float(np.sqrt((x * x).sum(axis=1).mean())) or 1.0
        x /= self.scale
        self._basis: Doubles | None = None
        n, d = x.shape
        if n < d:
            # x = u s v; weights outside the rows' span only cost penalty.
            u, s, self._basis = np.linalg.svd(x, full_matrices=False)
            x = u * s
        self.rotated: Doubles = x

    def unrotated(self, solution: Doubles) -> tuple[Doubles, Doubles]:
        weight, bias = solution[:, :-1], solution[:, -1]
        if self._basis is not None:
            weight = weight @ self._basis
        weight = weight / self.scale
        return weight, bias - weight @ self.mean


def _folds(targets: Ints, seed: int) -> list[npt.NDArray[np.bool_]] | None:
    """Masks of what is held out, each class spread evenly; None when a class is too small."""
    count = min(FOLDS, int(np.bincount(targets).min()))
    if count < 2:
        return None
    rng = np.random.default_rng([seed, 0xF01D])
    fold = np.empty(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        own = rng.permutation(np.flatnonzero(targets == label))
        fold[own] = np.arange(len(own)) % count
    return [fold == i for i in range(count)]


def _cross_validate(
    space: _Space,
    targets: Ints,
    classes: int,
    candidates: list[float],
    folds: list[npt.NDArray[np.bool_]],
    on_progress: Callable[[float], None],
) -> list[Doubles]:
    x = space.rotated
    out_of_fold = [np.empty((len(x), classes)) for _ in candidates]
    done = 0
    for held in folds:
        start: Doubles | None = None
        for logits, l2 in zip(out_of_fold, candidates, strict=True):
            # From strong to weak: each solution is close to the next.
            start = _solve(x[~held], targets[~held], classes, l2, start)
            logits[held] = x[held] @ start[:, :-1].T + start[:, -1]
            done += 1
            on_progress(done / (len(folds) * len(candidates)))
    return out_of_fold


def _solve(x: Doubles, targets: Ints, classes: int, l2: float, start: Doubles | None) -> Doubles:
    """The minimum, float64 [classes, d + 1], the bias last."""
    n, d = x.shape
    one_hot = np.zeros((n, classes))
    one_hot[np.arange(n), targets] = 1

    def objective(flat: Doubles) -> tuple[float, Doubles]:
        w = flat.reshape(classes, d + 1)
        logits = x @ w[:, :-1].T + w[:, -1]
        normaliser = logsumexp(logits, axis=1, keepdims=True)
        loss = float((normaliser[:, 0] - (logits * one_hot).sum(axis=1)).mean())
        residual = (np.exp(logits - normaliser) - one_hot) / n
        gradient = np.empty_like(w)
        gradient[:, :-1] = residual.T @ x + l2 * w[:, :-1]
        gradient[:, -1] = residual.sum(axis=0)
        return loss + l2 / 2 * float((w[:, :-1] ** 2).sum()), gradient.ravel()

    first = np.zeros(classes * (d + 1)) if start is None else start.ravel()
    found = minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": _MAX_STEPS})
    solution: Doubles = found.x.reshape(classes, d + 1)
    return solution


def _temperature(logits: Doubles, targets: Ints) -> float:
    found = minimize_scalar(
        lambda log_t: _loss(logits / np.exp(log_t), targets),
        bounds=tuple(np.log(_TEMPERATURE)),
        method="bounded",
    )
    return float(np.exp(found.x))


def _loss(logits: Doubles, targets: Ints) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean())
