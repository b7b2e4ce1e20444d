"""A regularised linear classifier on features, its strength and its temperature.

`trainer.logistic` fits; which strength, and how sure the classifier may be, is found
here by cross-validation. NumPy alone: scikit-learn would take two seconds to import,
of the few that a feature-based job lasts.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from trainer.logistic import Doubles, Floats, Ints, Problem, Space, logits_of

Mask = npt.NDArray[np.bool_]

RELATIVE_L2 = tuple(float(x) for x in np.logspace(0, -6, 10))
"""Tried by cross-validation, strongest first, times the features' mean square norm."""
FALLBACK_RELATIVE_L2 = 1e-2
"""Where a class has too few images to cross-validate."""
FOLDS = 5
RANKED_IMAGES = 1000
"""Held-out images that are enough to rank strengths by: no more folds than hold so many."""
_PATIENCE = 2
_WORTH_IT = 0.99
"""A weaker strength must lower the loss to this part; the loss is flat where it is least."""
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
    out_of_fold: Doubles | None
    """Probabilities [n, classes] after the temperature, each from weights that did not
    see the image; None where a class was too small to cross-validate."""


def fit(
    features: Floats,
    targets: Ints,
    classes: int,
    l2: float | None,
    seed: int,
    on_progress: Callable[[float], None] = lambda _: None,
    *,
    views: Floats | None = None,
    threads: int = 0,
) -> Fitted:
    """Fits `mean cross-entropy + l2 / 2 |weight|^2`; the bias goes free.

    Without `l2` the strength with the least loss in a stratified 5-fold
    cross-validation is taken. The temperature (Guo et al. 2017) is fitted to the
    logits of the held-out folds, so on images that their weights did not see.
    `views`, float32 [v, n, d], are further features of the same images: learned
    from beside them, never measured on.
    """
    n = len(features)
    every = features if views is None else np.concatenate([features, *views])
    owners = np.arange(len(every)) % n
    cores = threads or len(os.sched_getaffinity(0))
    # BLAS's own threads spin for each other, which costs all who share the cores.
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="linear") as pool:
        space = Space(every)
        del every
        candidates = RELATIVE_L2 if l2 is None else (l2 / space.scale**2,)
        folds = _folds(targets, seed)
        temperature, loss, out_of_fold, start = 1.0, None, None, None
        if folds is None:
            chosen = FALLBACK_RELATIVE_L2 if l2 is None else candidates[0]
        else:
            search = _Search(space, targets, owners, classes, folds, pool)
            chosen, logits, start = search.best(candidates, on_progress)
            temperature = _temperature(logits, targets)
            logits /= temperature
            loss = _loss(logits, targets)
            out_of_fold = _softmax(logits)
        problem = Problem(space.x, space.variances, targets[owners], classes, pool)
        weight, bias = space.unrotated(problem.solve_exactly(chosen, start))
    return Fitted(weight, bias, chosen * space.scale**2, temperature, loss, out_of_fold)


class _Search:
    """Cross-validation: which strength, and what is said of images that were held out."""

    def __init__(
        self,
        space: Space,
        targets: Ints,
        owners: Ints,
        classes: int,
        folds: list[Mask],
        pool: Executor,
    ) -> None:
        self._pool = pool
        self._space = space
        self._targets = targets
        self._owners = owners
        self._classes = classes
        self._folds = folds

    def best(
        self, candidates: Sequence[float], on_progress: Callable[[float], None]
    ) -> tuple[float, Doubles, Floats]:
        """The best candidate, its out-of-fold logits [n, classes], and weights to start from.

        Goes from strong to weak, each fold from its solution before, and ends when two
        in a row were worse than the best. Where images are many, a part of the folds
        ranks, and the others are fitted with the best strength alone.
        """
        n = len(self._targets)
        ranking = min(len(self._folds), math.ceil(RANKED_IMAGES * len(self._folds) / n))
        problems = [self._problem(held) for held in self._folds[:ranking]]
        measured = np.logical_or.reduce(self._folds[:ranking])
        starts: list[Floats | None] = [None] * ranking
        best_loss, best, best_start, worse = math.inf, 0, None, 0
        logits, best_logits = (np.empty((n, self._classes)) for _ in range(2))
        for i, l2 in enumerate(candidates):
            for f, problem in enumerate(problems):
                starts[f] = w = problem.solve(l2, starts[f])
                self._hold_out(self._folds[f], w, logits)
            loss = self._loss(logits[measured], self._targets[measured])
            on_progress((i + 1) / (len(candidates) + 1))
            if loss < best_loss * _WORTH_IT:
                best_loss, best, best_start, worse = loss, i, starts[0], 0
                best_logits[measured] = logits[measured]
            elif (worse := worse + 1) == _PATIENCE:
                break
        assert best_start is not None
        del problems
        for held in self._folds[ranking:]:
            w = self._problem(held).solve(candidates[best], best_start)
            self._hold_out(held, w, best_logits)
        on_progress(1.0)
        return candidates[best], best_logits, best_start

    def _problem(self, held: Mask) -> Problem:
        learned = ~held[self._owners]
        return Problem(
            self._space.x[learned],
            self._space.variances,
            self._targets[self._owners[learned]],
            self._classes,
            self._pool,
        )

    def _loss(self, logits: Doubles, targets: Ints) -> float:
        """As the strength will be judged: after its own temperature."""
        return _loss(logits / _temperature(logits, targets), targets)

    def _hold_out(self, held: Mask, w: Floats, logits: Doubles) -> None:
        # The images themselves come before their views.
        logits[held] = logits_of(self._space.x[: len(held)][held], w)


def _folds(targets: Ints, seed: int) -> list[Mask] | None:
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


def _temperature(logits: Doubles, targets: Ints) -> float:
    """The temperature of the least cross-entropy, which is convex in its inverse."""
    n, k = logits.shape
    # One more image, of no known class (Platt 1999): without it, folds that
    # are all right would ask for endless confidence.
    wrong = 1 / (n + 1) * (k - 1) / k
    true = logits[np.arange(n), targets]
    others = (logits.sum(axis=1) - true) / (k - 1)
    wanted = float(((1 - wrong) * true + wrong * others).mean())
    low, high = 1 / _TEMPERATURE[1], 1 / _TEMPERATURE[0]
    inverse = 1.0
    for _ in range(60):
        p = _softmax(logits * inverse)
        mean = (p * logits).sum(axis=1)
        slope = float(mean.mean()) - wanted
        curvature = float(((p * logits**2).sum(axis=1) - mean**2).mean())
        if slope > 0:
            high = inverse
        else:
            low = inverse
        before, inverse = inverse, inverse - slope / max(curvature, 1e-300)
        if not low < inverse < high:
            inverse = math.sqrt(low * high)
        if abs(inverse - before) < 1e-6 * before:
            break
    return 1 / inverse


def _softmax(logits: Doubles) -> Doubles:
    p: Doubles = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def _loss(logits: Doubles, targets: Ints) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    true = shifted[np.arange(len(targets)), targets]
    return float((np.log(np.exp(shifted).sum(axis=1)) - true).mean())
