"""Brakes: when an adaptation is not to be trusted, though the criterion prefers it.

Alignment makes the domains' features alike and so takes for granted that their classes
are. Where the target holds one class, or few, it spreads that class over all, and a
criterion that asks neighbours finds the result smoother than before: the cut of a cloud
is. Two things give such a target away. The head that was not adapted: a gap costs it
accuracy, but where classes differ its answers still part images that lie apart; one class
it parts at random or not at all. And the adapted answers themselves: a cut cloud is
smooth, but not as smooth as classes that lie apart.
"""

from typing import Literal

import numpy as np

from trainer.adaptation.criterion import MARGIN
from trainer.arrays import Doubles, Floats, Ints

Doubt = Literal["", "not_better", "one_class", "classes_unseen", "neighbours_disagree"]
"""Why source-only is to be preferred, "" where it is not: adapting does not look better by
the criterion, source-only's answers are nearly all of one class or hardly show the classes, or
adapted answers are hardly smooth."""

MOST_ALIKE = 0.85
"""Of source-only's answers, of one class. More, and it is a few odd images that part them."""

LEAST_SEEN = 0.2
"""Of what the source's classes explain, source-only's answers must explain in the target. One
class alone lies below it and several above, on either side of a gap: anything from 0.15 to
0.25 parts them about as well."""
LEAST_AGREEMENT = 0.35
"""Of adapted answers, by the criterion. A cloud of few images that is cut into several classes
lies below it; anything from 0.3 to 0.4 does about as well."""
_TINY = 1e-12


def doubt(answers: Ints, shown: float, before: float, after: float) -> Doubt:
    """Tells why source-only is to be preferred, whose answers are `answers` [m].

    So much of the classes is `seen`, and the criterion goes from `before` to `after`.
    """
    if np.bincount(answers).max() >= MOST_ALIKE * len(answers):
        return "one_class"
    if shown < LEAST_SEEN:
        return "classes_unseen"
    if after <= before + MARGIN:
        return "not_better"
    return "neighbours_disagree" if after < LEAST_AGREEMENT else ""


def seen(source: Floats, targets: Ints, target: Floats, answers: Ints) -> float:
    """Returns how much of the source's class structure the target shows, about 0 to 1.

    That is the part of the variance of the target's features [m, d] that source-only's
    `answers` [m] explain, over the part of the source's [n, d] that its classes do.
    """
    known = explained(source, targets)
    return explained(target, answers) / known if known > _TINY else 0.0


def explained(features: Floats, labels: Ints) -> float:
    """Returns the part of the variance of features [n, d] that lies between labels [n].

    Each feature counts the same. By chance labels explain some of it, the more the fewer
    images: that is taken out as by Kelley 1935, An Unbiased Correlation Ratio
    Measure (epsilon squared). Where nothing remains it is 0, as for one label alone.
    """
    rows: Doubles = features.astype(np.float64)
    rows -= rows.mean(axis=0)
    rows /= np.maximum(rows.std(axis=0), _TINY)
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    inside = len(rows) - len(counts)
    if len(counts) < 2 or inside < 1:
        return 0.0
    means = (np.eye(len(counts))[places].T @ rows) / counts[:, None]
    between = float(counts @ (means**2).sum(axis=1)) / max(float((rows**2).sum()), _TINY)
    return max(0.0, 1 - (1 - between) * (len(rows) - 1) / inside)
