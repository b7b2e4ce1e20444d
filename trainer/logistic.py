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


class Problem:
    """`mean cross-entropy + l2 / 2 |weight|^2` on rows of a space, shared among cores.

    `class_weights` [classes] say how much an image of each class counts.
    """

    def __init__(
        self,
        x: Singles,
        variances: Doubles,
        targets: Ints,
        classes: int,
        pool: Executor,
        class_weights: Doubles | None = None,
    ) -> None:
        weights = None if class_weights is None else class_weights[targets].astype(np.float32)
        self._n = len(x) if weights is None else float(weights.sum(dtype=np.float64))
        share = np.bincount(targets, weights, classes) / self._n
        self._entropy = -float(np.log(share**share).sum())
        self._variances = np.append(variances, 1.0)
        self._shape = (classes, x.shape[1] + 1)
        self._shards = [
            _Shard(x[here], targets[here], None if weights is None else weights[here, None])
            for here in (slice(start, start + _ROWS) for start in range(0, len(x), _ROWS))
        ]
        self._map = pool.map if x.size * classes >= _THREADED else map

    def solve(self, l2: float, start: Floats | None) -> Floats:
        """The minimum, float32 [classes, r + 1], the bias last: near enough to rank by."""
        w = np.zeros(self._shape, np.float32) if start is None else start
        return self._descend(w, l2, _RANKING_GAP, 0.0)

    def solve_exactly(self, l2: float, start: Floats | None) -> Doubles:
        """The same to convergence, in double precision."""
        w = np.zeros(self._shape) if start is None else start.astype(np.float64)
        found: Doubles = self._descend(w, l2, 0.0, _FINAL_GAP).astype(np.float64, copy=False)
        return found

    def _descend(self, w: Floats, l2: float, relative_gap: float, absolute_gap: float) -> Floats:
        noise = 8 * float(np.finfo(w.dtype).eps)
        penalty = np.append(np.full(self._shape[1] - 1, l2), 0.0)
        value, p = self._value(w, l2)
        for _ in range(_MOST_STEPS):
            gained = max(self._entropy - value, _LEAST_GAIN * self._entropy)
            gap = relative_gap * min(value, gained) + absolute_gap
            gradient = self._mean(_Shard.gradient, p) + penalty * w
            step = self._step(p, gradient, penalty, gap)
            slope = float((gradient * step).sum())
            length = 1.0
            while True:
                there = (w + length * step).astype(w.dtype)
                new_value, new_p = self._value(there, l2)
                if new_value <= value + 1e-4 * length * slope + noise * abs(value):
                    break
                length /= 2
                if length < noise:
                    return w
            w, value, p = there, new_value, new_p
            if -slope / 2 < gap:
                break
        return w

    def _step(self, p: list[Floats], gradient: Doubles, penalty: Doubles, gap: float) -> Singles:
        """Newton's step as far as it is worth it: conjugate gradients in single precision.

        That only tells where to go; where the minimum is, the gradient tells.
        """
        p = [part.astype(np.float32, copy=False) for part in p]
        l2 = penalty.astype(np.float32)
        curvature = np.sum(list(map(_Shard.curvature, self._shards, p)), axis=0) / self._n
        nearby = (curvature[:, None] * self._variances + penalty + 1e-12).astype(np.float32)
        step: Singles = np.zeros(self._shape, np.float32)
        residual = -gradient.astype(np.float32)
        preconditioned = residual / nearby
        direction = preconditioned
        size = first = float((residual * preconditioned).sum())
        # Rougher far away (Eisenstat and Walker 1996), and never finer than pays.
        enough = max(first * min(0.25, max(math.sqrt(first), 1e-3)) ** 2, 0.1 * gap)
        for _ in range(_MOST_PRODUCTS):
            if size <= enough:
                break
            product = self._mean(_Shard.product, p, direction).astype(np.float32) + l2 * direction
            curved = float((direction * product).sum())
            if not curved > 0:
                break
            along = np.float32(size / curved)
            step += along * direction
            residual = residual - along * product
            preconditioned = residual / nearby
            size, before = float((residual * preconditioned).sum()), size
            direction = preconditioned + np.float32(size / before) * direction
        return step

    def _value(self, w: Floats, l2: float) -> tuple[float, list[Floats]]:
        """The objective, and the probabilities of each shard."""
        found = list(self._map(_Shard.value, self._shards, repeat(w)))
        loss = sum(loss for loss, _ in found) / self._n
        penalised = float(np.square(w[:, :-1], dtype=np.float64).sum())
        return loss + l2 / 2 * penalised, [p for _, p in found]

    def _mean(self, of: Callable[..., Floats], p: list[Floats], *every: Floats) -> Doubles:
        parts = self._map(of, self._shards, p, *(repeat(value) for value in every))
        total = np.zeros(self._shape)
        for part in parts:
            total += part
        return total / self._n


class _Shard:
    """Some rows: what one core computes at a time, in the precision of what it is given."""

    def __init__(self, x: Singles, targets: Ints, weights: Singles | None) -> None:
        self._x = x
        self._targets = targets
        self._weights = weights
        self._rows = np.arange(len(x))

    def value(self, w: Floats) -> tuple[float, Floats]:
        """The sum of the cross-entropies, and the probabilities [rows, classes]."""
        p = logits_of(self._x, w)
        p -= p.max(axis=1, keepdims=True)
        true = p[self._rows, self._targets]
        np.exp(p, out=p)
        normaliser = p.sum(axis=1, keepdims=True)
        p /= normaliser
        losses = self._weighed(np.log(normaliser) - true[:, None])
        return float(losses.sum(dtype=np.float64)), p

    def gradient(self, p: Floats) -> Floats:
        """Of the sum of the cross-entropies, [classes, r + 1]."""
        residual = p.copy()
        residual[self._rows, self._targets] -= 1
        return self._back(self._weighed(residual))

    def curvature(self, p: Floats) -> Doubles:
        """Of the same along each class's own logit, [classes]."""
        curved: Doubles = self._weighed(p * (1 - p)).sum(axis=0, dtype=np.float64)
        return curved

    def product(self, p: Floats, direction: Floats) -> Floats:
        """The Hessian of the same times a direction, [classes, r + 1]."""
        logits = logits_of(self._x, direction)
        logits -= (p * logits).sum(axis=1, keepdims=True)
        logits *= p
        return self._back(self._weighed(logits))

    def _weighed(self, rows: Floats) -> Floats:
        if self._weights is not None:
            rows *= self._weights
        return rows

    def _back(self, residual: Floats) -> Floats:
        result = np.empty((residual.shape[1], self._x.shape[1] + 1), residual.dtype)
        np.matmul(residual.T, self._x.astype(residual.dtype, copy=False), out=result[:, :-1])
        residual.sum(axis=0, out=result[:, -1])
        return result


def logits_of(x: Singles, w: Floats) -> Floats:
    """[n, classes], in the precision of the weights [classes, r + 1]."""
    found: Floats = x.astype(w.dtype, copy=False) @ w[:, :-1].T
    found += w[:, -1]
    return found
