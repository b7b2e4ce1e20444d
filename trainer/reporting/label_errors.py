"""Images that may be under the wrong class; NumPy and SciPy alone.

Confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating
Uncertainty in Dataset Labels") finds images on which the model contradicts the folder:
off the diagonal of the confident joint, ranked by the normalised margin. Most of these
are the model's own mistakes where it is weak, so each gets a probability that the
folder is wrong, and those without a fair one are not listed.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from scipy.special import softmax

from trainer.arrays import Bools, Doubles, Floats, Ints
from trainer.intervals import wilson

RECALL_FLOOR = 0.5
"""The least lower end of the 95 % interval of a class's recall at which its labels are doubted:
below it the model may be wrong as often as right."""
MIN_CHANCE = 0.2
"""An image is listed from one chance in five that its folder is wrong."""
MAX_SHARE = 0.1
"""Fraction of the images that are listed at most. More would say something of the model."""
_NOISE = np.linspace(0.0, 0.5, 51)
_TYPICAL = 30.0
"""Label noise is Beta(1, 30) before the data is seen: 3 % on average, as in the test sets that
Northcutt, Athalye and Mueller 2021 counted ("Pervasive Label Errors in Test Sets")."""
_TEMPERATURES = np.geomspace(0.5, 4.0, 15)
_NEGLIGIBLE = 1e-6
_BLOCK = 1_000_000
_TINY = 1e-12


class Suspect(msgspec.Struct, frozen=True):
    """An image that looks like another class than its folder says."""

    place: int
    given: int
    suggested: int
    probability: float
    """Of the suggested class."""
    margin: float
    """Probability of the given class minus the best other's, -1 to 1; low is suspicious."""
    chance: float
    """Estimated probability that the folder is wrong, and not the model; see `find`."""


def recognised(sets: Sequence[tuple[Floats, Ints, Ints]], classes: int) -> Bools:
    """Finds the classes that the model knows well enough to doubt their labels, bool [classes].

    Pools sets, each probabilities [n, classes] of images that were not learned from,
    their classes [n] and their groups [n]. The interval of a class's recall counts its
    groups: many frames of one scene show as little as one.
    """
    hits, totals, groups = np.zeros((3, classes), dtype=np.int64)
    for probabilities, targets, members in sets:
        is_right = probabilities.argmax(axis=1) == targets
        hits += np.bincount(targets[is_right], minlength=classes)
        totals += np.bincount(targets, minlength=classes)
        each = np.unique(np.stack([targets, members]), axis=1)[0]
        groups += np.bincount(each, minlength=classes)
    lows = [
        wilson(hit / total, int(count))[0] if total else 0.0
        for hit, total, count in zip(hits, totals, groups, strict=True)
    ]
    return np.array(lows) >= RECALL_FLOOR


def find(probabilities: Floats, targets: Ints, trusted: Bools) -> list[Suspect]:
    """Finds suspects, most suspicious first; none of a class that is not `trusted` [classes].

    `probabilities` [n, classes] must come from heads that did not learn the image.

    The chance that a folder is wrong is Bayes' rule over two explanations: with
    probability e a label was drawn at random from the other classes, otherwise it is
    right and the model gave it the probability that it says, after a temperature.
    Neither e nor the temperature is known, and both are integrated out. Where the model's
    errors are as frequent as its confidence says, they explain what contradicts the
    folders, and the chances are small. It is asked of all images and of those of the
    same folder, and the lower answer counts.
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
    is_suspect &= trusted[targets] & trusted[suggested]
    others = probabilities.astype(np.float64)
    others[places, targets] = -1.0
    margin = own - others.max(axis=1)
    # In a balanced doubt the folder is believed.
    is_suspect &= margin < 0
    if not is_suspect.any():
        return []
    chances = _chances(probabilities, targets, is_suspect)
    found = np.flatnonzero(is_suspect & (chances >= MIN_CHANCE))
    order = found[np.argsort(margin[found], kind="stable")][: max(1, int(n * MAX_SHARE))]
    return [
        Suspect(
            place=int(i),
            given=int(targets[i]),
            suggested=int(suggested[i]),
            probability=float(probabilities[i, suggested[i]]),
            margin=float(margin[i]),
            chance=float(chances[i]),
        )
        for i in order
    ]


def _chances(probabilities: Floats, targets: Ints, doubted: Bools) -> Doubles:
    """Probability [n] that each image's label is wrong, 0 where it is not `doubted` [n].

    By all images and by those under the same label alone, whichever is lower: a model
    that is blind to some images of one class is sure of itself elsewhere.
    """
    logs = np.log(np.maximum(probabilities.astype(np.float64), _TINY))
    chances = np.where(doubted, _explained(logs, targets), 0.0)
    for label in np.unique(targets[doubted]):
        places = np.flatnonzero(targets == label)
        alone = _explained(logs[places], targets[places])
        chances[places] = np.minimum(chances[places], alone)
    return chances


def _explained(logs: Doubles, targets: Ints) -> Doubles:
    """Probability [n] that each label is wrong, from log probabilities [n, classes]; see `find`."""
    n, k = logs.shape
    owns = [_own(logs / temperature, targets) for temperature in _TEMPERATURES]
    # Many values of the noise at a time, unless that would take much memory.
    blocks = np.array_split(_NOISE, math.ceil(len(_NOISE) * n / _BLOCK))
    likelihoods = np.concatenate(
        [
            np.log((1 - e) * own + e * (1 - own) / max(1, k - 1)).sum(axis=1)
            for own in owns
            for e in (block[:, None] for block in blocks)
        ]
    ).reshape(len(owns), len(_NOISE))
    likelihoods += (_TYPICAL - 1) * np.log1p(-_NOISE)
    weights = np.exp(likelihoods - likelihoods.max())
    weights /= weights.sum()
    chances = np.zeros(n)
    for i, j in np.argwhere(weights > _NEGLIGIBLE):
        by_error = _NOISE[j] * (1 - owns[i]) / max(1, k - 1)
        chances += weights[i, j] * by_error / ((1 - _NOISE[j]) * owns[i] + by_error)
    return chances


def _own(logits: Doubles, targets: Ints) -> Doubles:
    """Softmax [n] of each image's label, of logits [n, classes]."""
    own: Doubles = softmax(logits, axis=1)[np.arange(len(targets)), targets]
    return np.maximum(own, _TINY)
