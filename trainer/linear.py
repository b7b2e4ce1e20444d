"""A regularised linear classifier on features, its strength and its temperature.

Multinomial logistic regression by L-BFGS (Liu and Nocedal 1989), with SciPy
alone: scikit-learn's would take two seconds more to import, of a few that a
feature-based job lasts. Features are centred, scaled by one number and, where
there are more of them than pictures, rotated into the pictures' own space; all
three leave the penalised problem what it is and make it fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, logsumexp
from threadpoolctl import threadpool_limits

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RELATIVE_L2 = tuple(float(x) for x in np.logspace(0, -5, 11))
"""Tried by cross-validation, strongest first, times the features' mean square norm."""
FALLBACK_RELATIVE_L2 = 1e-2
"""Where a class has too few pictures to cross-validate."""
FOLDS = 5
_PATIENCE = 2
_FINAL = {"maxiter": 2000, "gtol": 1e-7, "ftol": 1e-14}
_RANKING = {"maxiter": 60, "gtol": 1e-4, "ftol": 1e-6}
"""Enough to tell which strength is best, at a fraction of the cost."""
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
    # The matrices are small: more threads would cost more than they bring, and
    # torch's own wait for the same cores.
    with threadpool_limits(1):
        space = _Space(features)
        candidates = RELATIVE_L2 if l2 is None else (l2 / space.scale**2,)
        folds = _folds(targets, seed)
        if folds is None:
            chosen = FALLBACK_RELATIVE_L2 if l2 is None else candidates[0]
            temperature, loss = 1.0, None
        else:
            chosen, logits = _cross_validate(
                space.rotated, targets, classes, candidates, folds, on_progress
            )
            temperature = _temperature(logits, targets)
            loss = _loss(logits / temperature, targets)
        solution = _solve(space.rotated, targets, classes, chosen, None, _FINAL)
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
    rng = np.random.default_rng([seed % 2**64, 0xF01D])
    fold = np.empty(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        own = rng.permutation(np.flatnonzero(targets == label))
        fold[own] = np.arange(len(own)) % count
    return [fold == i for i in range(count)]


def _cross_validate(
    x: Doubles,
    targets: Ints,
    classes: int,
    candidates: Sequence[float],
    folds: list[npt.NDArray[np.bool_]],
    on_progress: Callable[[float], None],
) -> tuple[float, Doubles]:
    """The best candidate and its out-of-fold logits [n, classes].

    Goes from strong to weak, each fold from its solution before, and ends when
    two in a row were worse than the best.
    """
    starts: list[Doubles | None] = [None] * len(folds)
    best_loss, best, worse = np.inf, 0, 0
    best_logits = np.empty((len(x), classes))
    for i, l2 in enumerate(candidates):
        logits = np.empty((len(x), classes))
        for f, held in enumerate(folds):
            w = _solve(x[~held], targets[~held], classes, l2, starts[f], _RANKING)
            starts[f] = w
            logits[held] = x[held] @ w[:, :-1].T + w[:, -1]
        loss = _loss(logits, targets)
        on_progress((i + 1) / len(candidates))
        if loss < best_loss:
            best_loss, best, best_logits, worse = loss, i, logits, 0
        elif (worse := worse + 1) == _PATIENCE:
            break
    return candidates[best], best_logits


def _solve(
    x: Doubles,
    targets: Ints,
    classes: int,
    l2: float,
    start: Doubles | None,
    options: dict[str, float],
) -> Doubles:
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
    found = minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
    solution: Doubles = found.x.reshape(classes, d + 1)
    return solution


def _temperature(logits: Doubles, targets: Ints) -> float:
    n, k = logits.shape
    # One more picture, of no known class (Platt 1999): without it, folds that
    # are all right would ask for endless confidence.
    wrong = 1 / (n + 1) * (k - 1) / k
    soft = np.full((n, k), wrong / (k - 1))
    soft[np.arange(n), targets] = 1 - wrong

    def loss(log_t: float) -> float:
        return float(-(soft * log_softmax(logits / np.exp(log_t), axis=1)).sum(axis=1).mean())

    found = minimize_scalar(
        loss,
        bounds=tuple(np.log(_TEMPERATURE)),
        method="bounded",
    )
    return float(np.exp(found.x))


def _loss(logits: Doubles, targets: Ints) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean())
