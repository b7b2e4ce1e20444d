"""How the served model compares with simpler and dearer ones.

All answer the same images, so the tests are paired. NumPy and SciPy alone.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from scipy.special import betainc

from trainer import intervals
from trainer.arrays import Floats, Ints
from trainer.looks import unit

SIGNIFICANT = 0.05
UNCORRECTED = "each p-value is of its own comparison: of several comparisons, uncorrected"
"""To be said once where several comparisons are listed."""
_TITLES = {
    "linear_probe": "linear head on the frozen backbone",
    "full_fine_tune": "all layers fine-tuned",
    "from_scratch": "trained from scratch",
    "nearest_class_mean": "nearest class mean",
    "majority_class": "always the most common class",
}


@dataclass(frozen=True, eq=False)
class Measured:
    """A baseline's answers [n] to the images that the served model answered."""

    name: str
    answers: Ints
    seconds: float | None = None
    """What making it took."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The served model against another, image by image."""

    name: str
    """A baseline of the contract, `majority_class`, or what else it was compared with."""
    title: str
    """Its name for people."""
    accuracy: float
    """Its accuracy."""
    accuracy_low: float
    """Of the 95 % interval, by groups of images that belong together."""
    accuracy_high: float
    difference: float
    """Accuracy of the served model minus this one's."""
    difference_low: float
    """Of the 95 % interval for matched proportions (Tango 1998), widened by the groups."""
    difference_high: float
    only_served: int
    """Images that only the served model answered right."""
    only_other: int
    """Images that only the other model answered right."""
    p_value: float
    """McNemar's test, mid-p, of as many changes as the groups leave."""
    verdict: Literal["better", "worse", "no_difference"]
    """Of the served model, at the 5 % level."""
    words: str
    """The result, for people."""
    seconds: float | None = None
    """Time that it took to train."""


def compare(other: Measured, served: Ints, targets: Ints, groups: Ints | None = None) -> Comparison:
    """Of answers [n] as served, to the same n images in groups [n].

    `groups` None means that each image stands alone. Otherwise the counts of the images are
    divided by the design effect of the groups (Rao and Scott 1992, "A simple method for the
    analysis of clustered binary data").
    """
    right, right_too = served == targets, other.answers == targets
    n = len(targets)
    only_served = int((right & ~right_too).sum())
    only_other = int((right_too & ~right).sum())
    accuracy, low, high = intervals.of_share(right_too, groups)
    difference = (only_served - only_other) / n
    effect = intervals.design_effect(right.astype(np.float64) - right_too, groups)
    counts = only_served / effect, only_other / effect
    p_value = mcnemar(*counts)
    difference_low, difference_high = intervals.matched_difference(*counts, n / effect)
    verdict: Literal["better", "worse", "no_difference"] = "no_difference"
    if p_value < SIGNIFICANT:
        verdict = "better" if difference > 0 else "worse"
    found = f"{abs(difference) * 100:.1f}"
    between = (
        f"between {intervals.points(difference_low)} and {intervals.points(difference_high)} points"
    )
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    words = f"no significant difference: {between} ({p})"
    if only_served + only_other == 0:
        words = "both classify the same images correctly"
    elif verdict != "no_difference":
        words = f"the served model is {verdict} by {found} points, {between} ({p})"
    return Comparison(
        name=other.name,
        title=_TITLES.get(other.name, other.name),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        difference=difference,
        difference_low=difference_low,
        difference_high=difference_high,
        only_served=only_served,
        only_other=only_other,
        p_value=p_value,
        verdict=verdict,
        words=words,
        seconds=other.seconds,
    )


def mcnemar(only_a: float, only_b: float) -> float:
    """Two-sided mid-p value from the images that only one of two models answered right.

    McNemar 1947; the mid-p form, binomial and so right for few images too, from
    Fagerland, Lydersen and Laake 2013, "The McNemar test for binary matched-pairs
    data: mid-p and asymptotic are better than exact conditional". Effective numbers
    need not be whole.
    """
    fewer, more = sorted((only_a, only_b))
    # Half of what is as likely as what was found counts, on either side: the distribution up
    # to it and up to the one before it.
    before = float(betainc(more + 1, fewer, 0.5)) if fewer > 0 else 0.0
    return min(1.0, float(betainc(more, fewer + 1, 0.5)) + before) if more > 0 else 1.0


def nearest_class_mean(train: Floats, targets: Ints, features: Floats, classes: int) -> Ints:
    """Answers [m] for features [m, d]: the class whose mean is nearest.

    Mensink et al. 2013, "Distance-Based Image Classification: Generalizing to New
    Classes at Near-Zero Cost", with features of length one and no learned metric.
    """
    learned, asked = (unit(rows.astype(np.float64)) for rows in (train, features))
    one_hot = np.eye(classes)[targets]
    means = (one_hot / np.maximum(one_hot.sum(axis=0), 1)).T @ learned
    # |x|^2 is the same for all classes.
    scores = asked @ means.T - (means**2).sum(axis=1) / 2
    nearest: Ints = scores.argmax(axis=1)
    return nearest


def majority_class(targets: Ints, count: int) -> Ints:
    """Answers [count], each the commonest class of the training targets."""
    return np.full(count, np.bincount(targets).argmax())
