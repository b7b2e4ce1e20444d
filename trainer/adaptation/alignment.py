"""Spaces in which source and target features lie closer, and the way back from them.

A linear head that was fitted in such a space is folded into one for the target's
features as the backbone gives them, so serving needs nothing new.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.arrays import Doubles

_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Head:
    """Weight float64 [classes, d], bias float64 [classes]."""

    weight: Doubles
    bias: Doubles

    def logits(self, rows: Doubles) -> Doubles:
        """Returns those of rows [n, d], float64 [n, classes]."""
        answer: Doubles = rows @ self.weight.T + self.bias
        return answer


@dataclass(frozen=True, eq=False)
class Space:
    """Both domains' features, float64 [n, d] and [m, d], and the heads' way back.

    `unaligned` turns a head of this space into one for raw features of the target.
    """

    source: Doubles
    target: Doubles
    unaligned: Callable[[Head], Head]


def standardise(source: Doubles, target: Doubles, weights: Doubles) -> Space:
    """Scales each domain by its own mean and deviation, rows then of mean square norm 1.

    After Li et al. 2016, Revisiting Batch Normalization For Practical Domain
    Adaptation, applied to the features alone. `weights` [n], of sum 1, say how
    much a source image counts in the source's moments: with them the source
    can be given the target's class prior, which its moments depend on.
    """
    norm = np.sqrt(source.shape[1])
    mean = weights @ source
    ours = mean, norm * _deviation(weights @ (source - mean) ** 2)
    theirs = target.mean(axis=0), norm * _deviation(target.var(axis=0))
    return Space(
        source=(source - ours[0]) / ours[1],
        target=(target - theirs[0]) / theirs[1],
        unaligned=lambda head: unscaled(head, *theirs),
    )


def correlation_alignment(source: Doubles, target: Doubles) -> Space:
    """Whitens the source's features, then colours them with the target's covariance (CORAL).

    Sun, Feng and Saenko 2016, Return of Frustratingly Easy Domain Adaptation, with
    the means aligned too. Covariances are shrunk towards a multiple of the identity
    by the intensity of Ledoit and Wolf 2004, A well-conditioned estimator for
    large-dimensional covariance matrices: there are more features than images.
    """
    ours, theirs = Covariance(source), Covariance(target)
    scale = float(np.sqrt(theirs.trace)) or 1.0

    return Space(
        source=theirs.power(ours.power(source - ours.mean, -0.5), 0.5) / scale,
        target=(target - theirs.mean) / scale,
        unaligned=lambda head: unscaled(head, theirs.mean, scale),
    )


class Covariance:
    """Keeps the shrunk covariance of rows float64 [n, d]; of n < d as n directions."""

    def __init__(self, rows: Doubles) -> None:
        n, d = rows.shape
        self.mean: Doubles = rows.mean(axis=0)
        x = (rows - self.mean) / np.sqrt(n)
        # Eigenvectors through the smaller of the two matrices with the same values.
        if n < d:
            values, vectors = np.linalg.eigh(x @ x.T)
            kept = values > _TINY * max(values[-1], _TINY)
            values = values[kept]
            basis = (x.T @ vectors[:, kept] / np.sqrt(values)).T
        else:
            values, vectors = np.linalg.eigh(x.T @ x)
            values, basis = np.maximum(values, 0), vectors.T
        self.trace = float(values.sum())
        average = self.trace / d
        spread = float((values**2).sum()) - d * average**2
        noise = float((((x * x).sum(axis=1)) ** 2).sum()) - float((values**2).sum()) / n
        self.shrinkage = min(1.0, noise / spread) if spread > 0 else 1.0
        self._basis: Doubles = basis
        # Never zero: features that do not vary would ask for endless whitening.
        self._rest = max(self.shrinkage * average, _TINY)
        self._values: Doubles = (1 - self.shrinkage) * values + self._rest

    def power(self, rows: Doubles, exponent: float) -> Doubles:
        """Multiplies rows [n, d] by the matrix to `exponent`."""
        outside = self._rest**exponent
        along = (rows @ self._basis.T) * (self._values**exponent - outside)
        answer: Doubles = outside * rows + along @ self._basis
        return answer


def _deviation(variance: Doubles) -> Doubles:
    deviation = np.sqrt(variance)
    return np.where(deviation > _TINY, deviation, 1.0)


def unscaled(head: Head, mean: Doubles, scale: Doubles | float) -> Head:
    """Turns a head for `(x - mean) / scale` into the one for x that answers alike."""
    weight = head.weight / scale
    return Head(weight, head.bias - weight @ mean)
