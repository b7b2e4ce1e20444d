"""How unlike a model's training images an image is.

The Mahalanobis distance of Lee et al. 2018 ("A Simple Unified Framework for
Detecting Out-of-Distribution Samples and Adversarial Attacks") to the nearest
class mean, on features of length one (Mueller and Hein 2025, "Mahalanobis++").
The covariance that all classes share is taken as diagonal, so that a model costs
kilobytes and a few hundred images are enough to know it. Fitting is the
trainer's (`trainer/outliers.py`); here it is only computed.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

METHOD = (
    "diagonal Mahalanobis distance to the nearest class mean on features of length one (Lee et "
    "al. 2018; Mueller and Hein 2025)"
)
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Outliers:
    """What the training images' features look like."""

    means: npt.NDArray[np.float16]
    """float16 [classes, d], of features scaled to length one."""
    inverse_variance: Floats
    """float32 [d], of all classes; scaled so that a distance of 1 is the threshold."""
    validation: npt.NDArray[np.float16]
    """float16 [at most 256], ascending: scores of images that it was not fitted on."""

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

    def scores(self, features: Floats) -> Floats:
        """From features float32 [n, d or more] to scores float32 [n].

        Above 1 is out of distribution.
        """
        unit = normalised(features[:, : self.means.shape[1]])
        # |x - m|^2 multiplied out, so that a thousand classes are one product of matrices;
        # made for each call, since it would take twice the memory that the means do.
        means = self.means.astype(np.float32)
        weighted = means * self.inverse_variance
        squares = (unit * unit) @ self.inverse_variance
        distances = np.einsum("cd,cd->c", means, weighted) - 2 * (unit @ weighted.T)
        nearest = squares + distances.min(axis=1)
        scores: Floats = np.sqrt(np.maximum(nearest, 0))
        return scores


def normalised(features: Floats) -> Floats:
    """Each row scaled to length one."""
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    unit: Floats = features / np.maximum(lengths, np.float32(_TINY))
    return unit
