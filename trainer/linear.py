"""A regularised linear classifier on features, its strength and its temperature.

`trainer.logistic` fits; which strength, and how sure the classifier may be, is found
here by cross-validation. NumPy alone: scikit-learn would take two seconds to import,
of the few that a feature-based job lasts.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from trainer.folds import deal
from trainer.logistic import Doubles, Floats, Ints, Problem, Singles, Space, logits_of

RANKED_IMAGES = 1000
"""Held-out images that are enough to rank strengths by: no more folds than hold so many."""
FALLBACK_RELATIVE_L2 = 1.0
"""Where nothing can be measured: classes of one image. So strong a penalty leaves the
nearest class mean, which then classifies best."""
_FALLBACK_LEAD = 4.0
"""There, how far the logit of its own class lies above the mean of all, of images learned
from: between the best for classes that lie far apart (13) and close together (1)."""
_STEP = 10 ** (2 / 3)
"""From one penalty to the next."""
_PATIENCE = 3
"""Strengths in a row that do not lower the least loss, after which weaker ones are not tried."""
_LEARNED = 0.99
"""Below this part of the loss of knowing the classes' shares alone, something was learned."""
_AS_GOOD = 1.03
"""The weakest strength is taken whose loss is at most so many times the least: the loss is
flat there, and the more images are learned from, as by the head that is served, the weaker
the best."""
_LEAST_TEMPERATURE = 1e-6
_SHARPNESS = np.geomspace(0.02, 60, 24)
"""Tried for the temperature: how far the highest logit lies above the mean of all."""
_ROWS_AT_ONCE = 2**18
_MOST_COMPARED = 5000
"""Images: of more the scale of features matters less, and a second search takes long."""
_FLOOR = 0.1
"""Added to each variance, times their mean."""
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Fitted:
    """Weight float64 [classes, d], bias float64 [classes], for features as given."""

    weight: Doubles
    bias: Doubles
    l2: float
    temperature: float
    cross_validated_loss: float | None
    """Mean cross-entropy of `out_of_fold`, nats."""
    out_of_fold: Singles | None
    """Probabilities float32 [n, classes] of images by weights that did not see them, by a
    penalty and a temperature that the other folds chose; NaN for images that are never
    held out, None where nothing could be measured."""
    is_standardised: bool = False
    """Whether each feature was divided by its deviation while it was fitted."""


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
    folds: Ints | None = None,
) -> Fitted:
    """Fits `mean cross-entropy + l2 / 2 |weight|^2`; the bias goes free.

    Without `l2` a cross-validation chooses the strength, by `folds` (see `folds.deal`),
    int64 [n]; without them by folds dealt from the seed, each image its own group.
    The temperature (Guo et al. 2017, On Calibration of Modern Neural Networks) is
    fitted to the logits of the held-out folds, so on images that their weights did
    not see, and lowered a little for the head that learned from them all. Whether each
    feature is divided by its deviation first is chosen in the same way; weights are for
    features as given all the same. `views`, float32 [v, n, d], are further features of
    the same images: learned from beside them, never measured on. Raises ValueError
    where a fold leaves a class nothing to learn from.
    """
    n = len(features)
    every = features if views is None else np.concatenate([features, *views])
    owners = np.arange(len(every)) % n
    if folds is None:
        order = np.random.default_rng([seed % 2**64, 0xF01D]).random(n)
        folds = deal(targets, order=order)
    cores = threads or len(os.sched_getaffinity(0))
    # BLAS's own threads spin for each other, which costs all who share the cores.
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="linear") as pool:
        space, divisor = Space(every), None
        candidates = strengths(classes) if l2 is None else [l2 / space.scale**2]
        search = _Search(space, targets, owners, classes, folds, pool)
        is_compared = l2 is None and n <= _MOST_COMPARED and search.is_possible
        if not search.is_possible:
            found = _Found(FALLBACK_RELATIVE_L2 if l2 is None else candidates[0])
        elif not is_compared:
            found = search.best(candidates, on_progress)
        else:
            found = search.best(candidates, lambda done: on_progress(done / 2))
            deviation = _deviation(features)
            other = Space((every / deviation).astype(every.dtype))
            search = _Search(other, targets, owners, classes, folds, pool)
            scaled = search.best(candidates, lambda done: on_progress((1 + done) / 2))
            is_better, out_of_fold, loss = _chosen(found, scaled, folds, targets)
            if is_better:
                found, space, divisor = scaled, other, deviation
            found = replace(found, out_of_fold=out_of_fold, loss=loss)
        del every, search
        problem = Problem(space.x, space.variances, targets[owners], classes, pool)
        solution = problem.solve_exactly(found.strength, found.start)
    temperature = found.temperature
    if temperature is None:
        logits = logits_of(space.x[:n], solution)
        lead = logits[np.arange(n), targets] - logits.mean(axis=1)
        temperature = max(float(lead.mean()) / _FALLBACK_LEAD, _LEAST_TEMPERATURE)
    weight, bias = space.unrotated(solution)
    if divisor is not None:
        weight /= divisor
    return Fitted(
        weight,
        bias,
        found.strength * space.scale**2,
        temperature,
        found.loss,
        found.out_of_fold,
        is_standardised=divisor is not None,
    )


def cross_validated(
    features: Floats, targets: Ints, classes: int, folds: Ints, threads: int = 0
) -> Singles:
    """Returns probabilities float32 [n, classes] of each image by a quick head that did not see it.

    To compare features by, not to serve: like `Fitted.out_of_fold`, with features as they are and
    every second strength, in a quarter of the time. NaN where no fold holds an image out, and for
    all where there are no two folds and classes.
    """
    cores = threads or len(os.sched_getaffinity(0))
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="linear") as pool:
        owners = np.arange(len(targets))
        search = _Search(Space(features), targets, owners, classes, folds, pool)
        if not search.is_possible:
            return np.full((len(targets), classes), np.nan, np.float32)
        # The strongest hardly leaves more than the classes' shares.
        found = search.best(strengths(classes)[2::2], lambda _: None).out_of_fold
    assert found is not None
    return found


def _deviation(features: Floats) -> Doubles:
    """Deviations float64 [d] of features [n, d]; of what hardly varies, as if it did a little."""
    variance = features.var(axis=0, dtype=np.float64)
    floor = max(_FLOOR * float(variance.mean()), _TINY)
    deviation: Doubles = np.sqrt(variance + floor)
    return deviation


def _chosen(
    found: "_Found", scaled: "_Found", folds: Ints, targets: Ints
) -> tuple[bool, Singles, float]:
    """Chooses between two scales, a fold's answers by the others'; returns those with their loss.

    The first answer is whether `scaled` is to serve: it must be better by a hundredth.
    """
    assert found.out_of_fold is not None
    assert scaled.out_of_fold is not None
    rows = np.flatnonzero(folds >= 0)
    both = [each.out_of_fold[rows, targets[rows]] for each in (found, scaled)]  # type: ignore[index]
    losses = [-np.log(np.maximum(true, _TINY), dtype=np.float64) for true in both]

    def is_better(by: npt.NDArray[np.bool_]) -> bool:
        return float(losses[1][by].mean()) < _LEARNED * float(losses[0][by].mean())

    out_of_fold, told = found.out_of_fold.copy(), losses[0].copy()
    for fold in np.unique(folds[rows]):
        own = folds[rows] == fold
        if is_better(~own):
            out_of_fold[rows[own]] = scaled.out_of_fold[rows[own]]
            told[own] = losses[1][own]
    return is_better(np.ones(len(rows), np.bool_)), out_of_fold, float(told.mean())


def strengths(classes: int) -> list[float]:
    """Penalties to try, strongest first, times the features' mean square norm.

    A class's share of the loss falls with the number of classes, and so does the
    penalty that it bears.
    """
    count = 10 + math.ceil(math.log(max(classes, 2) / 2, _STEP))
    return [_STEP**-i for i in range(count)]


@dataclass(frozen=True, eq=False)
class _Found:
    strength: float
    temperature: float | None = None
    start: Floats | None = None
    loss: float | None = None
    out_of_fold: Singles | None = None


class _Search:
    """Cross-validation: which strength, and what is said of images that were held out.

    What is said of a fold's images is by a strength and a temperature that the other
    folds' images chose, so that nothing that is measured on chose anything (Varma and
    Simon 2006, Bias in error estimation when using cross-validation for model selection).
    """

    def __init__(
        self,
        space: Space,
        targets: Ints,
        owners: Ints,
        classes: int,
        folds: Ints,
        pool: Executor,
    ) -> None:
        self._space = space
        self._targets = targets
        self._owners = owners
        self._classes = classes
        self._pool = pool
        self._shares = np.bincount(targets, minlength=classes)
        self._folds = folds
        self._held = [np.flatnonzero(folds == f) for f in np.unique(folds[folds >= 0])]

    @property
    def is_possible(self) -> bool:
        """Whether enough is held out to choose by: two folds and two classes."""
        return len(self._held) > 1 and len(np.unique(self._targets[self._folds >= 0])) > 1

    def best(self, candidates: Sequence[float], on_progress: Callable[[float], None]) -> _Found:
        """Goes from strong to weak, each fold from its solution before.

        Ends when for every voter two in a row were worse than the best. Where images
        are many, a part of the folds ranks, and the others are fitted with the best
        strength alone.
        """
        sizes = np.cumsum([len(held) for held in self._held])
        ranking = max(2, int(np.searchsorted(sizes, RANKED_IMAGES)) + 1)
        ranking = min(ranking, len(self._held))
        problems = [self._problem(held) for held in self._held[:ranking]]
        starts: list[Floats | None] = [None] * ranking
        rows = np.concatenate(self._held)
        ends = sizes.tolist()
        parts = [slice(end - len(held), end) for end, held in zip(ends, self._held, strict=True)]
        ranked = rows[: ends[ranking - 1]]
        logits = np.empty((len(ranked), self._classes), np.float32)
        crossed = np.empty((len(rows), self._classes), np.float32)
        served = np.empty_like(crossed)
        inverses = np.empty(len(self._held))
        voters = _Voters([len(held) for held in self._held[:ranking]], self._prior_entropy())
        served_start = starts[0]
        for i, l2 in enumerate(candidates):
            for f, problem in enumerate(problems):
                starts[f] = w = problem.solve(l2, starts[f])
                logits[parts[f]] = self._answers(self._held[f], w)
            preferred = voters.vote(i, logits, self._targets[ranked])
            for f in preferred[preferred < ranking]:
                crossed[parts[f]] = logits[parts[f]]
            if ranking in preferred:
                served[: len(ranked)], served_start = logits, starts[0]
            on_progress((i + 1) / (len(candidates) + 1))
            if voters.is_over:
                break
        del problems
        best = candidates[voters.choices[-1]]
        inverses[:ranking], inverses[ranking:] = voters.inverses[:-1], voters.inverses[-1]
        inverse = float(voters.inverses[-1])
        for f in range(ranking, len(self._held)):
            w = self._problem(self._held[f]).solve(best, served_start)
            served[parts[f]] = crossed[parts[f]] = self._answers(self._held[f], w)
        if ranking < len(self._held):
            inverse = temperature_of(served, self._targets[rows]) ** -1
        on_progress(1.0)
        # The served head learned from more images than the folds' heads and may be surer:
        # by the root of that, as noise falls, which lowered the loss of new images of six
        # sets of data, with 2 to 50 images a class.
        inverse /= math.sqrt(1 - float(np.mean(np.diff(ends, prepend=0))) / len(self._targets))
        for f, part in enumerate(parts):
            crossed[part] *= inverses[f]
        loss = _log_normalise(crossed, self._targets[rows])
        out_of_fold = np.full((len(self._targets), self._classes), np.nan, np.float32)
        out_of_fold[rows] = np.exp(crossed, out=crossed)
        return _Found(best, 1 / inverse, served_start, loss, out_of_fold)

    def _problem(self, held: Ints) -> Problem:
        is_held = np.zeros(len(self._targets), dtype=bool)
        is_held[held] = True
        learned = ~is_held[self._owners]
        left = self._shares - np.bincount(self._targets[held], minlength=self._classes)
        if (left[self._shares > 0] == 0).any():
            raise ValueError("a fold holds out all images of a class: nothing is left to learn")
        # Else the fewer the images, the less probable would be the very classes that
        # are held out, and folds would tell what is in them.
        weights = self._shares / np.maximum(left, 1)
        is_even = np.ptp(weights[self._shares > 0]) == 0
        return Problem(
            self._space.x[learned],
            self._space.variances,
            self._targets[self._owners[learned]],
            self._classes,
            self._pool,
            None if is_even else weights,
        )

    def _answers(self, held: Ints, w: Floats) -> Floats:
        # The images themselves come before their views.
        return logits_of(self._space.x[held], w)

    def _prior_entropy(self) -> float:
        share = self._shares[self._shares > 0] / self._shares.sum()
        return float(-(share * np.log(share)).sum())


class _Voters:
    """Choose a strength and a temperature, each by the held-out answers of its own folds.

    All folds but one for each fold, then all; by what is theirs alone.
    """

    def __init__(self, sizes: Sequence[int], prior_entropy: float) -> None:
        count = len(sizes)
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._ballots = 1 - np.eye(count + 1, count)
        self._images = self._ballots @ sizes
        self._least = np.full(count + 1, np.inf)
        self._worse = np.zeros(count + 1, dtype=np.int64)
        self._is_done = np.zeros(count + 1, dtype=bool)
        self._has_learned = np.zeros(count + 1, dtype=bool)
        self._prior_entropy = prior_entropy
        self.choices = np.zeros(count + 1, dtype=np.int64)
        self.inverses: Doubles = np.ones(count + 1)
        """Of the temperatures."""

    @property
    def is_over(self) -> bool:
        return bool(self._is_done.all())

    def vote(self, strength: int, logits: Singles, targets: Ints) -> Ints:
        """Notes and tells which voters prefer this strength to those before."""
        inverses, losses, lead = _by_inverse(logits, targets)
        found, loss = _least(
            inverses,
            self._ballots @ np.add.reduceat(losses, self._starts, axis=0),
            self._ballots @ np.add.reduceat(lead, self._starts),
            self._images,
            logits.shape[1],
        )
        # On a plateau patience would end before anything is learned: strong penalties
        # may leave hardly more than the classes' shares.
        self._has_learned |= loss < self._prior_entropy * _LEARNED
        bound = np.where(self._has_learned, _AS_GOOD, _LEARNED) * self._least
        preferred = (loss < bound) & ~self._is_done
        # Flat is not worth the time of more and more weak strengths, each slower.
        is_progress = (loss < self._least * _LEARNED) | ~self._has_learned
        self._worse = np.where(is_progress, 0, self._worse + 1)
        self._is_done |= self._worse == _PATIENCE
        self._least = np.minimum(self._least, loss)
        self.choices[preferred] = strength
        self.inverses[preferred] = found[preferred]
        return np.flatnonzero(preferred)


def temperature_of(logits: Singles, targets: Ints) -> float:
    """The temperature of the least cross-entropy of logits [n, classes]."""
    inverses, losses, lead = _by_inverse(logits, targets)
    n, k = logits.shape
    found, _ = _least(inverses, losses.sum(axis=0)[None], lead.sum()[None], np.array([n]), k)
    return 1 / float(found[0])


def _by_inverse(logits: Singles, targets: Ints) -> tuple[Doubles, Doubles, Doubles]:
    """Inverse temperatures [j], each image's loss by them [n, j], and its lead [n].

    The lead is how far the logit of its own class lies above the mean of the others.
    """
    n, k = logits.shape
    above = float((logits.max(axis=1) - logits.mean(axis=1)).mean(dtype=np.float64))
    inverses = _SHARPNESS / max(above, _LEAST_TEMPERATURE * _SHARPNESS[-1])
    losses, lead = np.empty((n, len(inverses))), np.empty(n)
    size = max(1, _ROWS_AT_ONCE // k)
    for start in range(0, n, size):
        here = slice(start, start + size)
        z = logits[here] - logits[here].max(axis=1, keepdims=True)
        true = z[np.arange(len(z)), targets[here]].astype(np.float64)
        lead[here] = (true - z.mean(axis=1, dtype=np.float64)) * (k / (k - 1))
        scaled = np.empty_like(z)
        for j, inverse in enumerate(inverses):
            np.multiply(z, np.float32(inverse), out=scaled)
            np.exp(scaled, out=scaled)
            losses[here, j] = np.log(scaled.sum(axis=1)) - inverse * true
    return inverses, losses, lead


def _least(
    inverses: Doubles, losses: Doubles, lead: Doubles, images: Doubles | Ints, classes: int
) -> tuple[Doubles, Doubles]:
    """For each voter [v] the inverse temperature of the least loss, and that loss a image.

    `losses` [v, j] and `lead` [v] are sums over the voter's `images` [v].
    """
    # One more image, of no known class (Platt 1999): without it, folds that
    # are all right would ask for endless confidence.
    wrong = (classes - 1) / classes / (images + 1)
    smooth = (losses + (wrong * lead)[:, None] * inverses) / images[:, None]
    # A parabola through the least and its neighbours.
    rows = np.arange(len(smooth))
    at = np.clip(smooth.argmin(axis=1), 1, len(inverses) - 2)
    left, middle, right = (smooth[rows, at + i] for i in (-1, 0, 1))
    bend = np.maximum(left - 2 * middle + right, 1e-300)
    shift = np.clip((left - right) / (2 * bend), -1, 1)
    loss = middle - (left - right) * shift / 4
    return inverses[at] * (inverses[1] / inverses[0]) ** shift, loss


def _log_normalise(logits: Singles, targets: Ints) -> float:
    """Turns logits into logarithms of probabilities, in place; their mean loss, nats."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -float(logits[np.arange(len(targets)), targets].mean(dtype=np.float64))
