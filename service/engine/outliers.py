"""Scores how unlike a model's training images an image is.

Two things are added up, each in units of how much it differs among images of the training's
kind. How far the image's features lie from what they are like: the Mahalanobis distance of Lee
et al. 2018 ("A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks") to the nearest class mean, on features of length one (Mueller and Hein
2025, "Mahalanobis++"). The covariance that all classes share is taken as diagonal, so that a
model costs kilobytes and a few hundred images are enough to know it. And how little the head
finds in them: the energy of its logits (Liu et al. 2020, "Energy-based Out-of-distribution
Detection"). The distance alone hardly sees an image that looks like the others and shows
something else; the energy alone takes many that look like nothing known for familiar, so that it
never makes an image more familiar than the most familiar known one. Fitting is the trainer's
(`trainer/outliers.py`); here it is only computed.
"""

from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache, cached

Floats = npt.NDArray[np.float32]

METHOD = (
    "sum of the diagonal Mahalanobis distance to the nearest class mean, on features of length one "
    "(Lee et al. 2018; Mueller and Hein 2025), and the energy of the logits (Liu et al. 2020), "
    "each in units of its deviation"
)
KEPT_BYTES = 16 * 2**20
"""Bytes of what is computed from heads' weights, and as many of what is from outliers' means, for
the next call; of all that are in memory it would be twice what these take."""
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Outliers:
    """Describes the training images' features, and the energy that the head gives them."""

    means: npt.NDArray[np.float16]
    """float16 [classes, d], of features scaled to length one."""
    inverse_variance: Floats
    """float32 [d], of all classes; scaled so that a distance is in units of the score."""
    validation: npt.NDArray[np.float16]
    """float16 [at most 256], ascending: scores of images that it was not fitted on."""
    energy_weight: float = 0.0
    """Factor of the energy in a score."""
    energy_floor: float = 0.0
    """Less energy counts as this: the least of the images that set the threshold."""
    offset: float = 0.0
    """Added to every score: 0 is the most familiar of the images that set the threshold, 1."""

    def __post_init__(self) -> None:
        if self.means.ndim != 2 or self.inverse_variance.shape != self.means.shape[1:]:
            raise ValueError(
                f"means {self.means.shape} and variance {self.inverse_variance.shape} do not fit "
                "together"
            )

    @property
    def nbytes(self) -> int:
        """Bytes in memory, about."""
        return self.means.nbytes + self.inverse_variance.nbytes + self.validation.nbytes + 512

    def scores(self, features: Floats, log_probabilities: Floats) -> Floats:
        """Computes scores float32 [n] of features float32 [n, d or more].

        `log_probabilities` are the head's, float32 [n, classes], at its temperature. Scores are
        at least 0; above 1 is out of distribution.
        """
        energy = np.maximum(energies(log_probabilities), np.float32(self.energy_floor))
        joined = self.distances(features) + self.energy_weight * energy + self.offset
        scores: Floats = np.maximum(joined, 0)
        return scores

    def distances(self, features: Floats) -> Floats:
        """Computes distances float32 [n] to the nearest mean of features float32 [n, d or more]."""
        known, own = _prepared(self), features[:, : self.means.shape[1]]
        # Of features over their length l, |x / l - m|^2 multiplied out, so that a thousand classes
        # are one product of matrices, and few calls of NumPy's do all of it: each may hand the
        # interpreter to another thread, and waits to get it back.
        squares, weighted_squares = ((own * own) @ known.columns).T
        lengths = np.maximum(np.sqrt(squares), np.float32(_TINY))
        to_means = known.squares - 2 * (own @ known.weighted) / lengths[:, None]
        nearest = weighted_squares / (lengths * lengths) + to_means.min(axis=1)
        found: Floats = np.sqrt(np.maximum(nearest, 0))
        return found


@dataclass(frozen=True, eq=False)
class _Prepared:
    """The parts of distances that no image changes."""

    columns: Floats
    """[d, 2]: ones, and the inverse variance."""
    weighted: Floats
    """The means times the inverse variance, [d, classes]."""
    squares: Floats
    """The means' own, [classes]."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory, about."""
        return self.columns.nbytes + self.weighted.nbytes + self.squares.nbytes


@cached(LRUCache(KEPT_BYTES, getsizeof=lambda kept: kept.nbytes), lock=Lock())
def _prepared(outliers: Outliers) -> _Prepared:
    means, inverse = outliers.means.astype(np.float32), outliers.inverse_variance
    weighted = means * inverse
    columns = np.stack([np.ones_like(inverse), inverse], axis=1)
    return _Prepared(columns, weighted.T, np.einsum("cd,cd->c", means, weighted))


def energies(log_probabilities: Floats) -> Floats:
    """Computes energies float32 [n] of logarithms of probabilities float32 [n, classes].

    That is -logsumexp of the logits over the temperature, once an image's logits have a mean
    of 0: a constant that is added to all of them changes no probability, and is to change no
    energy. The higher, the less the head finds.
    """
    found: Floats = log_probabilities.mean(axis=1)
    return found


def normalised(features: Floats) -> Floats:
    """Scales each row to length one."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    unit: Floats = features / np.maximum(lengths, np.float32(_TINY))
    return unit
