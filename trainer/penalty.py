"""Chooses the penalty of a linear classifier, and its temperature, by cross-validation.

NumPy alone, as `trainer.linear`, which fits the classifier that serves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from trainer.arrays import Doubles, Ints, Singles
from trainer.logistic import Floats, Problems, Space, logits_of

LEARNED = 0.99
"""Below this part of the loss of knowing the classes' shares alone, something was learned."""
LEAST_TEMPERATURE = 1e-6
RANKED_IMAGES = 1000
"""Held-out images that are enough to rank strengths by: no more folds than hold so many."""
_STEP = 10 ** (2 / 3)
"""From one penalty to the next."""
_AS_GOOD = 1.03
"""The weakest strength is taken whose loss is at most so many times the least: the loss is
flat there, and the more images are learned from, as by the head that is served, the weaker
the best."""
_PATIENCE = 2
"""A search ends when so many strengths in a row were no better by a hundredth."""
_SHARPNESS = np.geomspace(0.02, 60, 24)
"""Tried for the temperature: how far the highest logit lies above the mean of all."""
_ROWS_AT_ONCE = 2**18
_AT_ONCE = 2**21
"""Probabilities that are computed together, of which a few copies are in memory."""


def strengths(classes: int) -> list[float]:
    """Penalties to try, strongest first, times the features' mean square norm.

    A class's share of the loss falls with the number of classes, and so does the
    penalty that it bears. Much stronger ones all leave the nearest class mean, a plateau
    on which a search would end.
    """
    weaker = math.log(max(classes, 2) / 2, _STEP)
    return [_STEP**-i for i in range(math.floor(weaker), 10 + math.ceil(weaker))]


@dataclass(frozen=True, eq=False)
class Found:
    strength: float
    temperature: float | None = None
    start: Floats | None = None
    loss: float | None = None
    out_of_fold: Singles | None = None


class Search:
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
        self._held = [np.flatnonzero(folds == f) for f in np.unique(folds[folds >= 0])]

    def best(self, candidates: Sequence[float], on_progress: Callable[[float], None]) -> Found:
        """Goes from strong to weak, each fold from its solution before.

        Ends when for every voter `_PATIENCE` in a row were no better. Where images
        are many, a part of the folds ranks, and the others are fitted with the best
        strength alone.
        """
        sizes = np.cumsum([len(held) for held in self._held])
        ranking = max(2, int(np.searchsorted(sizes, RANKED_IMAGES)) + 1)
        ranking = min(ranking, len(self._held))
        problems = list(self._problems(range(ranking)))
        starts: list[Floats | None] = [None] * len(problems)
        rows = np.concatenate(self._held)
        ends = sizes.tolist()
        parts = [slice(end - len(held), end) for end, held in zip(ends, self._held, strict=True)]
        ranked = rows[: ends[ranking - 1]]
        logits = np.empty((len(ranked), self._classes), np.float32)
        crossed = np.empty((len(rows), self._classes), np.float32)
        served = np.empty_like(crossed)
        inverses = np.empty(len(self._held))
        voters = _Voters([len(held) for held in self._held[:ranking]], self._prior_entropy())
        served_start: Floats | None = None
        """The solution of the first fold, [1, classes, r + 1], from which all others begin."""
        for i, l2 in enumerate(candidates):
            for at, (own, problem) in enumerate(problems):
                starts[at] = solved = problem.solve(l2, starts[at])
                for f, w in zip(own, solved, strict=True):
                    logits[parts[f]] = self._answers(self._held[f], w)
            preferred = voters.vote(i, logits, self._targets[ranked])
            for f in preferred[preferred < ranking]:
                crossed[parts[f]] = logits[parts[f]]
            if ranking in preferred:
                served[: len(ranked)] = logits
                served_start = None if (first := starts[0]) is None else first[:1]
            on_progress((i + 1) / (len(candidates) + 1))
            if voters.is_over:
                break
        del problems
        best = candidates[voters.choices[-1]]
        inverses[:ranking], inverses[ranking:] = voters.inverses[:-1], voters.inverses[-1]
        inverse = float(voters.inverses[-1])
        for own, problem in self._problems(range(ranking, len(self._held))):
            start = served_start if served_start is None else served_start.repeat(len(own), axis=0)
            for f, w in zip(own, problem.solve(best, start), strict=True):
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
        return Found(best, 1 / inverse, served_start, loss, out_of_fold)

    def _problems(self, folds: range) -> Iterator[tuple[range, Problems]]:
        """Yields the problems of some folds, as many together as take little memory."""
        together = max(1, _AT_ONCE // (len(self._owners) * self._classes))
        for start in range(folds.start, folds.stop, together):
            own = range(start, min(start + together, folds.stop))
            yield (
                own,
                Problems(
                    self._space.x,
                    self._space.variances,
                    self._targets[self._owners],
                    self._classes,
                    self._pool,
                    np.stack([self._weights(self._held[f]) for f in own]),
                ),
            )

    def _weights(self, held: Ints) -> Singles:
        """Returns how much each row counts where images are held out."""
        left = self._shares - np.bincount(self._targets[held], minlength=self._classes)
        if (left[self._shares > 0] == 0).any():
            raise ValueError("a fold holds out all images of a class: nothing is left to learn")
        # Else the fewer the images, the less probable would be the very classes that
        # are held out, and folds would tell what is in them.
        of_class = self._shares / np.maximum(left, 1)
        if np.ptp(of_class[self._shares > 0]) == 0:
            of_class = np.ones(self._classes)
        of_image: Singles = of_class[self._targets].astype(np.float32)
        of_image[held] = 0
        weights: Singles = of_image[self._owners]
        return weights

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
        self._has_learned |= loss < self._prior_entropy * LEARNED
        bound = np.where(self._has_learned, _AS_GOOD, LEARNED) * self._least
        preferred = (loss < bound) & ~self._is_done
        # Flat is not worth the time of more and more weak strengths, each slower.
        is_progress = (loss < self._least * LEARNED) | ~self._has_learned
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
    inverses = _SHARPNESS / max(above, LEAST_TEMPERATURE * _SHARPNESS[-1])
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
