"""Images that are probably under the wrong class; NumPy alone.

Confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating
Uncertainty in Dataset Labels"): off the diagonal of the confident joint, ranked by
the normalised margin.
"""

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


class Suspect(msgspec.Struct, frozen=True):
    """An image that looks like another class than its folder says."""

    place: int
    given: int
    suggested: int
    probability: float
    """Of the suggested class."""
    margin: float
    """Probability of the given class minus the best other's, -1 to 1; low is suspicious."""


def find(probabilities: Floats, targets: Ints) -> list[Suspect]:
    """Most suspicious first.

    `probabilities` [n, classes] must come from heads that did not learn the image:
    out-of-fold for training images, as served for validation images.
    """
    n, k = probabilities.shape
    places = np.arange(n)
    own = probabilities[places, targets]
    counts = np.bincount(targets, minlength=k)
    sums = np.bincount(targets, weights=own, minlength=k)
    # A class is believed where it is as likely as it usually is for its own images.
    usual = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    believed = np.where(probabilities >= usual, probabilities, -1.0)
    suggested = believed.argmax(axis=1)
    is_suspect = (believed[places, suggested] >= 0) & (suggested != targets)
    others = probabilities.astype(np.float64)
    others[places, targets] = -1.0
    margin = own - others.max(axis=1)
    # In a balanced doubt the folder is believed.
    found = np.flatnonzero(is_suspect & (margin < 0))
    order = found[np.argsort(margin[found], kind="stable")]
    return [
        Suspect(
            place=int(i),
            given=int(targets[i]),
            suggested=int(suggested[i]),
            probability=float(probabilities[i, suggested[i]]),
            margin=float(margin[i]),
        )
        for i in order
    ]
