"""Multinomial logistic regression with an L2 penalty, from one strength to the next.

Newton's method, its steps by preconditioned conjugate gradients (truncated: Dembo
and Steihaug 1983, "Truncated-Newton algorithms for large-scale unconstrained
optimization"). Features are centred, scaled by one number and rotated to their
principal axes, which leaves the penalised problem what it is; there, each class's
mean curvature times an axis's variance is so near to the Hessian that a fit takes
some ten products with it.
"""

import math
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import repeat

import numpy as np
import numpy.typing as npt

from trainer.arrays import Doubles, Ints, Singles

Floats = npt.NDArray[np.floating]

_MOST_STEPS = 100
_MOST_PRODUCTS = 200
_RANKING_GAP = 2e-3
"""What the last step may still have gained, where strengths are ranked: of the objective,
or of what was gained over the classes' shares where that is less."""
_LEAST_GAIN = 1e-3
"""Of the shares' entropy."""
_FINAL_GAP = 1e-7
"""Nats, of the fit that is kept; after the last step a tenth is left of it at most."""
_ROWS = 512
"""Rows that one core computes with at a time."""
MOST_AXES = 1400
"""Principal axes that a problem is solved on: of as many images as features none is lost, of
more images than this with more features than this what lies outside of the first ones is."""
_THREADED = 2**24
"""Multiplications of a product, from which on more cores than one are faster."""


class Space:
    """Where the problem is solved; knows the way back.

    `x` float32 [n, r] are the features on their principal axes, of `variances` [r].
    """

    def __init__(self, features: Floats) -> None:
        n, d = features.shape
        self.mean: Doubles = features.mean(axis=0, dtype=np.float64)
        self._features = features
        self._turned: tuple[Ints, Doubles] | None = None
        """Rows that axes are made of, and how; None once, or where, `_axes` has them."""
        self._axes: Doubles
        squares: Doubles
        if n <= d or d > MOST_AXES:
            # Of many images the axes of some of them, of which no feature is far.
            some = np.linspace(0, n - 1, min(n, MOST_AXES)).round().astype(np.int64)
            centred = features[some] - self.mean
            squares, left = np.linalg.eigh(centred @ centred.T)
            # Axes that only rounding made have no direction; nothing is lost with them.
            has_width = squares > squares[-1] * n * np.finfo(np.float64).eps
            squares, left = squares[has_width], left[:, has_width]
            self._turned = some, left / np.sqrt(squares)
            length, squares = np.sqrt(squares), squares * (n / len(some))
        else:
            some = np.arange(0)
            scatter = np.zeros((d, d))
            for start in range(0, n, _ROWS):
                block = features[start : start + _ROWS] - self.mean.astype(features.dtype)
                scatter += block.T @ block
            # Rounding here turns the axes a little, it does not bend them.
            squares, self._axes = np.linalg.eigh(scatter)
            squares = np.maximum(squares, 0)
        # One number for all features: the penalty keeps its meaning up to it.
        self.scale = math.sqrt(float(squares.sum()) / n) or 1.0
        self.variances: Doubles = squares / (n * self.scale**2)
        if len(some) == n:
            # They are known without the axes, which only the one that serves needs.
            self.x: Singles = (left * (length / self.scale)).astype(np.float32)
            return
        self.x = np.empty((n, len(squares)), np.float32)
        turn = (self.axes / self.scale).astype(features.dtype)
        for start in range(0, n, _ROWS):
            block = features[start : start + _ROWS] - self.mean.astype(features.dtype)
            self.x[start : start + _ROWS] = block @ turn

    @property
    def axes(self) -> Doubles:
        """The principal axes [d, r]."""
        if self._turned is not None:
            some, turn = self._turned
            self._axes = (self._features[some] - self.mean).T @ turn
            self._turned = None
        return self._axes

    def unrotated(self, solution: Doubles) -> tuple[Doubles, Doubles]:
        """Weight [classes, d] and bias [classes] for features as they were given."""
        weight = solution[:, :-1] @ self.axes.T / self.scale
        return weight, solution[:, -1] - weight @ self.mean


class Problems:
    """`mean cross-entropy + l2 / 2 |weight|^2` on rows of a space, of several weightings at once.

    `weights` float32 [m, n] say how much each row counts in each of the m problems; those of
    zeros do not. They are solved together, since they read the same rows, and most of a small
    one's time would be the calls' own. Shared among cores where they are large.
    """

    def __init__(
        self,
        x: Singles,
        variances: Doubles,
        targets: Ints,
        classes: int,
        pool: Executor,
        weights: Singles,
    ) -> None:
        if not (is_used := weights.any(axis=0)).all():
            x, targets, weights = x[is_used], targets[is_used], weights[:, is_used]
        self._n: Doubles = weights.sum(axis=1, dtype=np.float64)
        counts = np.stack([np.bincount(targets, own, classes) for own in weights])
        shares = counts / self._n[:, None]
        self._entropy: Doubles = -np.log(shares**shares).sum(axis=1)
        self._variances = np.append(variances, 1.0)
        self._shape = (len(weights), classes, x.shape[1] + 1)
        self._shards = [
            _Shard(x[here], targets[here], weights[:, here])
            for here in (slice(start, start + _ROWS) for start in range(0, len(x), _ROWS))
        ]
        self._map = pool.map if x.size * classes * len(weights) >= _THREADED else map

    def solve(self, l2: float, start: Floats | None) -> Floats:
        """The minima, float32 [m, classes, r + 1], the bias last: near enough to rank by."""
        w = np.zeros(self._shape, np.float32) if start is None else start
        return self._descend(w, l2, _RANKING_GAP, 0.0)

    def solve_exactly(self, l2: float, start: Floats | None) -> Doubles:
        """The same to convergence, in double precision."""
        w = np.zeros(self._shape) if start is None else start.astype(np.float64)
        found: Doubles = self._descend(w, l2, 0.0, _FINAL_GAP).astype(np.float64, copy=False)
        return found

    def _descend(self, w: Floats, l2: float, relative_gap: float, absolute_gap: float) -> Floats:
        noise = 8 * float(np.finfo(w.dtype).eps)
        penalty = np.append(np.full(self._shape[2] - 1, l2), 0.0)
        found = w.copy()
        at = np.arange(len(w))
        """Places of those that are not solved yet; what follows is theirs."""
        value, p = self._value(at, w, l2)
        for _ in range(_MOST_STEPS):
            gained = np.maximum(self._entropy[at] - value, _LEAST_GAIN * self._entropy[at])
            gap = relative_gap * np.minimum(value, gained) + absolute_gap
            gradient = self._mean(at, _Shard.gradient, p) + penalty * w
            step = self._step(at, p, gradient, penalty, gap)
            slope = (gradient * step).sum(axis=(1, 2))
            length = np.ones(len(at))
            there = (w + step).astype(w.dtype)
            new_value, new_p = self._value(at, there, l2)
            while True:
                least = value + 1e-4 * length * slope + noise * np.abs(value)
                is_good = new_value <= least  # nor NaN
                far = np.flatnonzero(~is_good & (length >= noise))
                if not len(far):
                    break
                length[far] /= 2
                there[far] = w[far] + length[far, None, None] * step[far]
                new_value[far], nearer = self._value(at[far], there[far], l2)
                for own, new in zip(new_p, nearer, strict=True):
                    own[far] = new
            # Where the shortest step is worse, too, rounding is all that is left.
            found[at[is_good]] = there[is_good]
            left = is_good & (-slope / 2 >= gap)
            if not left.any():
                break
            at, w, value = at[left], there[left], new_value[left]
            p = new_p if left.all() else [part[left] for part in new_p]
        return found

    def _step(
        self, at: Ints, p: list[Floats], gradient: Doubles, penalty: Doubles, gap: Doubles
    ) -> Singles:
        """Newton's steps as far as they are worth it: conjugate gradients in single precision.

        They only tell where to go; where the minimum is, the gradient tells.
        """
        p = [part.astype(np.float32, copy=False) for part in p]
        l2 = penalty.astype(np.float32)
        curvature = np.sum(
            [shard.curvature(at, own) for shard, own in zip(self._shards, p, strict=True)], axis=0
        )
        curvature /= self._n[at, None]
        nearby = (curvature[..., None] * self._variances + penalty + 1e-12).astype(np.float32)
        steps: Singles = np.zeros((len(at), *self._shape[1:]), np.float32)
        residual = -gradient.astype(np.float32)
        preconditioned = residual / nearby
        direction = preconditioned
        size = _products(residual, preconditioned)
        # Rougher far away (Eisenstat and Walker 1996), and never finer than pays.
        rough = np.minimum(0.25, np.maximum(np.sqrt(size), 1e-3)) ** 2
        enough = np.maximum(size * rough, 0.1 * gap)
        going = np.arange(len(at))
        """Places of the steps that go on; what follows is theirs."""
        is_convex = np.ones(len(at), np.bool_)
        for _ in range(_MOST_PRODUCTS):
            left = is_convex & (size > enough)
            if not left.all():
                going, size, enough = going[left], size[left], enough[left]
                residual, direction, nearby = residual[left], direction[left], nearby[left]
                p = [part[left] for part in p]
            if not len(going):
                break
            product = self._mean(at[going], _Shard.product, p, direction).astype(np.float32)
            product += l2 * direction
            curved = _products(direction, product)
            is_convex = curved > 0
            along = _columns(size / np.where(is_convex, curved, np.inf))
            steps[going] += along * direction
            residual = residual - along * product
            preconditioned = residual / nearby
            size, before = _products(residual, preconditioned), size
            direction = preconditioned + _columns(size / before) * direction
        return steps

    def _value(self, at: Ints, w: Floats, l2: float) -> tuple[Doubles, list[Floats]]:
        """The objectives of problems, and the probabilities of each shard."""
        found = list(self._map(_Shard.value, self._shards, repeat(at), repeat(w)))
        loss: Doubles = np.sum([loss for loss, _ in found], axis=0) / self._n[at]
        penalised = np.square(w[..., :-1], dtype=np.float64).sum(axis=(1, 2))
        return loss + l2 / 2 * penalised, [p for _, p in found]

    def _mean(
        self, at: Ints, of: Callable[..., Floats], p: list[Floats], *every: Floats
    ) -> Doubles:
        parts = self._map(of, self._shards, repeat(at), p, *(repeat(value) for value in every))
        total = np.zeros((len(at), *self._shape[1:]))
        for part in parts:
            total += part
        total /= self._n[at, None, None]
        return total


def _products(one: Singles, other: Singles) -> Doubles:
    """The scalar products [m] of matrices [m, classes, r + 1]."""
    count = len(one)
    found: Doubles = np.einsum(
        "mi,mi->m", one.reshape(count, -1), other.reshape(count, -1), dtype=np.float64
    )
    return found


def _columns(numbers: Doubles) -> Singles:
    """Numbers [m] as factors of matrices [m, classes, r + 1]."""
    return numbers.astype(np.float32)[:, None, None]


class _Shard:
    """Some rows: what one core computes at a time, in the precision of what it is given.

    Rows come last in what it computes, so that sums over classes add long rows.
    """

    def __init__(self, x: Singles, targets: Ints, weights: Singles) -> None:
        self._x = x
        self._targets = targets
        self._weights = weights
        self._rows = np.arange(len(x))

    def value(self, at: Ints, w: Floats) -> tuple[Doubles, Floats]:
        """The sums of the cross-entropies [m], and the probabilities [m, classes, rows]."""
        p = self._logits(w)
        p -= p.max(axis=1, keepdims=True)
        true = p[:, self._targets, self._rows]
        np.exp(p, out=p)
        normaliser = p.sum(axis=1)
        p /= normaliser[:, None]
        losses = (np.log(normaliser) - true) * self._weights[at]
        return losses.sum(axis=1, dtype=np.float64), p

    def gradient(self, at: Ints, p: Floats) -> Floats:
        """Of the same sums, [m, classes, r + 1]."""
        residual = p.copy()
        residual[:, self._targets, self._rows] -= 1
        return self._back(at, residual)

    def curvature(self, at: Ints, p: Floats) -> Doubles:
        """Of the same along each class's own logit, [m, classes]."""
        curved: Doubles = np.einsum("mkn,mn->mk", p * (1 - p), self._weights[at], dtype=np.float64)
        return curved

    def product(self, at: Ints, p: Floats, direction: Floats) -> Floats:
        """The Hessians of the same times directions, [m, classes, r + 1]."""
        logits = self._logits(direction)
        logits -= np.einsum("mkn,mkn->mn", p, logits)[:, None]
        logits *= p
        return self._back(at, logits)

    def _logits(self, w: Floats) -> Floats:
        """[m, classes, rows], in the precision of the weights [m, classes, r + 1]."""
        flat = w.reshape(-1, w.shape[2])
        found = flat[:, :-1] @ self._x.astype(w.dtype, copy=False).T
        found += flat[:, -1:]
        return found.reshape(len(w), w.shape[1], -1)

    def _back(self, at: Ints, residual: Floats) -> Floats:
        residual *= self._weights[at, None]
        flat = residual.reshape(-1, residual.shape[2])
        result = np.empty((len(flat), self._x.shape[1] + 1), residual.dtype)
        np.matmul(flat, self._x.astype(residual.dtype, copy=False), out=result[:, :-1])
        flat.sum(axis=1, out=result[:, -1])
        return result.reshape(*residual.shape[:2], -1)


def logits_of(x: Singles, w: Floats) -> Floats:
    """[n, classes], in the precision of the weights [classes, r + 1]."""
    found: Floats = x.astype(w.dtype, copy=False) @ w[:, :-1].T
    found += w[:, -1]
    return found
