"""Fits a regularised linear classifier to features, and chooses which features.

`trainer.logistic` solves, and `trainer.penalty` finds how strong the penalty and how sure
the classifier may be. NumPy alone: scikit-learn would take two seconds to import, of the
few that a feature-based job lasts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from service.ops.cpus import available_cores
from trainer.arrays import Doubles, Ints, Singles
from trainer.folds import deal
from trainer.logistic import Floats, Problems, Space, logits_of
from trainer.penalty import LEARNED, LEAST_TEMPERATURE, Found, Search, strengths

FALLBACK_RELATIVE_L2 = 1.0
"""Where nothing can be measured: classes of one image. So strong a penalty leaves the
nearest class mean, which then classifies best."""
_FALLBACK_LEAD = 4.0
"""There, how far the logit of its own class lies above the mean of all, of images learned
from: between the best for classes that lie far apart (13) and close together (1)."""
_MOST_COMPARED = 1000
"""Images that candidates are compared on; a search on more takes long."""
_MOST_CLASSES = 100
"""Of those; time grows with the square of them, and a part of the classes tells as well which
features part them."""
_LEAST_OF_CLASS = 5
"""Of those images."""
_FOLDS_COMPARED = 5
"""More are joined by twos to compare candidates by."""
_AROUND = 2
"""Strengths that are tried on either side of the best of a comparison."""
_COMPARISON = 0.6
"""Of the time that candidates are compared and one is searched in, about."""
_FLOOR = 0.1
"""Added to each variance, times their mean."""
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Candidate:
    """A choice of what a head sees of the images, in numbers that its penalty treats alike."""

    name: str
    """For people."""
    rows: Floats
    """Features float32 [n, d]: of all images, then of a view of each, and so on."""
    divisor: Doubles | None = None
    """float64 [d]: what each feature is divided by; None leaves them as they are."""

    def scaled(self, places: Ints | None = None) -> Floats:
        """Returns the rows, or those at `places`, divided."""
        rows = self.rows if places is None else self.rows[places]
        return rows if self.divisor is None else (rows / self.divisor).astype(rows.dtype)


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
    candidate, a penalty and a temperature that the other folds chose; NaN for images that are
    never held out, None where nothing could be measured."""
    chosen: int = 0
    """The place of the candidate that the weights are for."""


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
    """Fits a head to features [n, d] as they are, or to each over its deviation; as `fit_best`.

    `views`, float32 [v, n, d], are further features of the same images: learned from
    beside them, never measured on.
    """
    rows = features if views is None else np.concatenate([features, *views])
    candidates = [Candidate("as they are", rows), Candidate("scaled", rows, deviation(features))]
    return fit_best(
        candidates, targets, classes, l2, seed, on_progress, threads=threads, folds=folds
    )


def fit_best(
    candidates: Sequence[Candidate],
    targets: Ints,
    classes: int,
    l2: float | None,
    seed: int,
    on_progress: Callable[[float], None] = lambda _: None,
    *,
    threads: int = 0,
    folds: Ints | None = None,
) -> Fitted:
    """Fits `mean cross-entropy + l2 / 2 |weight|^2` to the best of candidates; the bias goes free.

    Without `l2` a cross-validation chooses the candidate and the strength, by `folds` (see
    `folds.deal`), int64 [n]; without them by folds dealt from the seed, each image its own
    group. A later candidate is taken where its loss is less by a hundredth. With `l2` the
    first one is taken. The temperature (Guo et al. 2017, On Calibration of Modern Neural
    Networks) is fitted to the logits of the held-out folds, so on images that their weights
    did not see, and lowered a little for the head that learned from them all. Weights are for
    features as given, undivided. Raises ValueError where a fold leaves a class nothing to
    learn from.
    """
    n = len(targets)
    if folds is None:
        order = np.random.default_rng([seed % 2**64, 0xF01D]).random(n)
        folds = deal(targets, order=order)
    cores = threads or available_cores()
    # BLAS's own threads spin for each other, which costs all who share the cores.
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="linear") as pool:
        choice = _Choice(candidates, targets, classes, l2, folds, pool, on_progress)
        at, space, found = choice.best()
        owners = np.arange(len(space.x)) % n
        weights = np.ones((1, len(owners)), np.float32)
        problems = Problems(space.x, space.variances, targets[owners], classes, pool, weights)
        (solution,) = problems.solve_exactly(found.strength, found.start)
    temperature = found.temperature
    if temperature is None:
        logits = logits_of(space.x[:n], solution)
        lead = logits[np.arange(n), targets] - logits.mean(axis=1)
        temperature = max(float(lead.mean()) / _FALLBACK_LEAD, LEAST_TEMPERATURE)
    weight, bias = space.unrotated(solution)
    if (divisor := candidates[at].divisor) is not None:
        weight /= divisor
    return Fitted(
        weight,
        bias,
        found.strength * space.scale**2,
        temperature,
        found.loss,
        found.out_of_fold,
        chosen=at,
    )


def cross_validated(
    features: Floats, targets: Ints, classes: int, folds: Ints, threads: int = 0
) -> Singles:
    """Returns probabilities float32 [n, classes] of each image by a quick head that did not see it.

    To compare features by, not to serve: like `Fitted.out_of_fold`, with features as they are and
    every second strength, in a quarter of the time. NaN where no fold holds an image out, and for
    all where there are no two folds and classes.
    """
    cores = threads or available_cores()
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="linear") as pool:
        owners = np.arange(len(targets))
        search = Search(Space(features), targets, owners, classes, folds, pool)
        if len(np.unique(folds[folds >= 0])) < 2 or len(np.unique(targets[folds >= 0])) < 2:
            return np.full((len(targets), classes), np.nan, np.float32)
        # The strongest hardly leaves more than the classes' shares.
        found = search.best(strengths(classes)[2::2], lambda _: None).out_of_fold
    assert found is not None
    return found


def held_out_losses(
    candidates: Sequence[Candidate], targets: Ints, classes: int, folds: Ints, threads: int = 0
) -> list[Doubles] | None:
    """Returns each candidate's losses [m], nats, of the images that a fold holds out.

    By quick heads, which rank candidates. None where there are no two folds and classes.
    """
    held = folds >= 0
    if len(np.unique(folds[held])) < 2 or len(np.unique(targets[held])) < 2:
        return None
    cores = threads or available_cores()
    with threadpool_limits(1), ThreadPoolExecutor(cores, thread_name_prefix="linear") as pool:
        choice = _Choice(candidates, targets, classes, None, folds, pool, lambda _: None)
        return [choice.losses(at, np.arange(len(targets))) for at in range(len(candidates))]


def deviation(features: Floats) -> Doubles:
    """Deviations float64 [d] of features [n, d]; of what hardly varies, as if it did a little."""
    variance = features.var(axis=0, dtype=np.float64)
    floor = max(_FLOOR * float(variance.mean()), _TINY)
    found: Doubles = np.sqrt(variance + floor)
    return found


class _Choice:
    """Compares candidates, on a sample where images are many, and searches the chosen one.

    Each fold's images are answered by the candidate that the other folds chose, where all
    classes were compared.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        targets: Ints,
        classes: int,
        l2: float | None,
        folds: Ints,
        pool: Executor,
        on_progress: Callable[[float], None],
    ) -> None:
        self._candidates = candidates
        self._targets = targets
        self._classes = classes
        self._l2 = l2
        self._folds = folds
        self._pool = pool
        self._on_progress = on_progress
        self._strength: dict[int, float] = {}
        """The best of each candidate, of those that were compared among all classes."""
        self._found: dict[int, tuple[Space, Found]] = {}

    def best(self) -> tuple[int, Space, Found]:
        """Returns the place of the best candidate, its space, and what its search found."""
        held = self._folds >= 0
        is_possible = len(np.unique(self._folds[held])) > 1
        is_possible &= len(np.unique(self._targets[held])) > 1
        if not is_possible:
            space = Space(self._candidates[0].scaled())
            strength = FALLBACK_RELATIVE_L2 if self._l2 is None else self._l2 / space.scale**2
            return 0, space, Found(strength)
        count = len(self._candidates) if self._l2 is None else 1
        if count == 1:
            return 0, *self._searched(0)
        compared = _sample(self._targets, self._folds)
        losses = [self.losses(at, compared) for at in range(count)]
        fold = self._folds[compared]
        fold = fold[fold >= 0]
        chosen = _chosen(losses, np.ones(len(fold), np.bool_))
        space, found = self._searched(chosen)
        if len(self._strength) < count:
            # A second search among so many classes would take minutes, for one choice of
            # few that some of the classes made.
            return chosen, space, found
        assert found.out_of_fold is not None
        answers = found.out_of_fold.copy()
        for f in np.unique(fold):
            if (at := _chosen(losses, fold != f)) != chosen:
                other = self._searched(at)[1].out_of_fold
                assert other is not None
                answers[self._folds == f] = other[self._folds == f]
        true = answers[held, self._targets[held]].astype(np.float64)
        loss = -float(np.log(np.maximum(true, _TINY)).mean())
        return chosen, space, replace(found, out_of_fold=answers, loss=loss)

    def losses(self, at: int, compared: Ints) -> Doubles:
        """Returns losses of a candidate on those of the images [m] at places that are held out.

        By half as many folds and every second strength, which rank candidates as well.
        """
        n = len(self._targets)
        present, targets = np.unique(self._targets[compared], return_inverse=True)
        classes = len(present)
        candidate = self._candidates[at]
        views = len(candidate.rows) // n
        places = np.concatenate([compared + n * view for view in range(views)])
        space = Space(candidate.scaled(places))
        owners = np.arange(len(places)) % len(compared)
        folds = _merged(self._folds[compared], targets)
        search = Search(space, targets, owners, classes, folds, self._pool)
        part = _COMPARISON / len(self._candidates)
        tried = strengths(classes)
        found = search.best(tried[::2], lambda done: self._on_progress(part * (at + done)))
        if classes == self._classes:
            self._strength[at] = found.strength
        answers = found.out_of_fold
        assert answers is not None
        rows = ~np.isnan(answers[:, 0])
        losses: Doubles = -np.log(np.maximum(answers[rows, targets[rows]], _TINY), dtype=np.float64)
        return losses

    def _searched(self, at: int) -> tuple[Space, "Found"]:
        if at not in self._found:
            space = Space(self._candidates[at].scaled())
            owners = np.arange(len(space.x)) % len(self._targets)
            search = Search(space, self._targets, owners, self._classes, self._folds, self._pool)
            l2 = [self._l2 / space.scale**2] if self._l2 is not None else strengths(self._classes)
            done = _COMPARISON if len(self._candidates) > 1 else 0.0
            if at in self._strength:
                place = l2.index(self._strength[at])
                l2 = l2[max(0, place - _AROUND) : place + _AROUND + 1]
            found = search.best(l2, lambda part: self._on_progress(done + (1 - done) * part))
            self._found[at] = space, found
        return self._found[at]


def _chosen(losses: Sequence[Doubles], by: npt.NDArray[np.bool_]) -> int:
    """The place of the candidate of the least mean loss; a later one must win by a hundredth."""
    best, least = 0, float(losses[0][by].mean())
    for at, each in enumerate(losses[1:], 1):
        if (mean := float(each[by].mean())) < LEARNED * least:
            best, least = at, mean
    return best


def _sample(targets: Ints, folds: Ints) -> Ints:
    """Places of images that candidates are compared on: all of them where they are few.

    Of many classes some, spread over all; each keeps its share, at least
    `_LEAST_OF_CLASS`, spread over its folds.
    """
    present = np.unique(targets)
    spread = np.linspace(0, len(present) - 1, min(len(present), _MOST_CLASSES))
    some = present[spread.round().astype(np.int64)]
    if len(some) < len(present):
        places = np.flatnonzero(np.isin(targets, some))
        return places[_sample(np.searchsorted(some, targets[places]), folds[places])]
    n = len(targets)
    if n <= _MOST_COMPARED:
        return np.arange(n)
    # In turn from each of a class's folds.
    turn = _turns(targets * (folds.max() + 2) + folds + 1)
    order = np.lexsort((folds, turn, targets))
    place = np.empty(n)
    place[order] = _turns(targets[order])
    share = place / np.bincount(targets)[targets]
    return np.flatnonzero((place < _LEAST_OF_CLASS) | (share < _MOST_COMPARED / n))


def _merged(folds: Ints, targets: Ints) -> Ints:
    """Joins folds by twos where they are many and no class would be held out as a whole."""
    count = int(folds.max()) + 1
    half = -(-count // 2)
    merged = np.where(folds >= 0, folds % half, -1)
    shares = np.bincount(targets)
    whole = any(
        (np.bincount(targets[merged == f], minlength=len(shares)) == shares)[shares > 0].any()
        for f in range(half)
    )
    return folds if count <= _FOLDS_COMPARED or whole else merged


def _turns(values: Ints) -> Ints:
    """Of each value how many equal ones come before it, int64 [n]."""
    order = np.argsort(values, kind="stable")
    _, begins, counts = np.unique(values[order], return_index=True, return_counts=True)
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - np.repeat(begins, counts)
    return found
