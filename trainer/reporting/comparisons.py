"""What the transfer was worth: the served model against simpler and dearer ones.

All are measured on the same validation images, so the tests are paired. NumPy
alone: SciPy's statistics would take a second to import.
"""

import math
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from trainer.evaluate import wilson

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SIGNIFICANT = 0.05
_Z = 1.959964
_TITLES = {
    "linear_probe": "linear head on the frozen backbone",
    "full_fine_tune": "all layers fine-tuned",
    "from_scratch": "trained from scratch",
    "nearest_class_mean": "nearest class mean",
    "majority_class": "always the commonest class",
}


@dataclass(frozen=True, eq=False)
class Measured:
    """A baseline on the validation images: probabilities [n, classes]."""

    name: str
    probabilities: Floats
    seconds: float | None = None
    """What making it took."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The served model against another, image by image."""

    name: str
    """A baseline of the contract, `majority_class`, or what else it was compared with."""
    title: str
    accuracy: float
    accuracy_low: float
    """Of the 95 % Wilson score interval."""
    accuracy_high: float
    difference: float
    """Accuracy of the served model minus this one's."""
    difference_low: float
    """Of the 95 % interval for matched proportions (Agresti and Min 2005)."""
    difference_high: float
    only_served: int
    """Images that only the served model answered right."""
    only_other: int
    p_value: float
    """McNemar's test, mid-p."""
    verdict: Literal["better", "worse", "no_difference"]
    """Of the served model, at the 5 % level."""
    words: str
    seconds: float | None = None


def compare(other: Measured, served: Floats, targets: Ints) -> Comparison:
    """Of probabilities [n, classes] as served, on the same n images."""
    right = served.argmax(axis=1) == targets
    right_too = other.probabilities.argmax(axis=1) == targets
    n = len(targets)
    only_served = int((right & ~right_too).sum())
    only_other = int((right_too & ~right).sum())
    accuracy = float(right_too.mean())
    low, high = wilson(accuracy, n)
    difference = (only_served - only_other) / n
    p_value = mcnemar(only_served, only_other)
    verdict: Literal["better", "worse", "no_difference"] = "no_difference"
    if p_value < SIGNIFICANT:
        verdict = "better" if difference > 0 else "worse"
    difference_low, difference_high = _matched_interval(only_served, only_other, n)
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
        words=_words(verdict, difference, p_value, only_served + only_other),
        seconds=other.seconds,
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided mid-p value from the images that only one of two models answered right.

    McNemar 1947; the mid-p form, binomial and so right for few images too, from
    Fagerland, Lydersen and Laake 2013, "The McNemar test for binary matched-pairs
    data: mid-p and asymptotic are better than exact conditional".
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    if only_a == only_b:
        return 1 - 0.5 * _coin(n, fewer)
    tail = math.fsum(_coin(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail - _coin(n, fewer))


def nearest_class_mean(train: Floats, targets: Ints, features: Floats, classes: int) -> Doubles:
    """Probabilities [m, classes] of features [m, d]: softmax of minus half the squared distance.

    Mensink et al. 2013, "Distance-Based Image Classification: Generalizing to New
    Classes at Near-Zero Cost", with features of length one and no learned metric.
    """
    learned, asked = _unit(train), _unit(features)
    one_hot = np.eye(classes)[targets]
    means = (one_hot / np.maximum(one_hot.sum(axis=0), 1)).T @ learned
    # |x|^2 is the same for all classes.
    scores = asked @ means.T - (means**2).sum(axis=1) / 2
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities: Doubles = raised / raised.sum(axis=1, keepdims=True)
    return probabilities


def majority_class(targets: Ints, count: int, classes: int) -> Doubles:
    """Probabilities [count, classes]: the class shares of the training targets."""
    shares = np.bincount(targets, minlength=classes) / len(targets)
    return np.tile(shares, (count, 1))


def _coin(n: int, k: int) -> float:
    """Probability of k heads in n throws; by logarithms, or a large n would overflow."""
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log - n * math.log(2))


def _matched_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Of the difference of two proportions of the same n images.

    Wald's interval after half an image is added to each of the four counts (Agresti
    and Min 2005, "Simple improved confidence intervals for comparing matched
    proportions").
    """
    b, c, total = only_a + 0.5, only_b + 0.5, n + 2
    middle = (b - c) / total
    half = _Z * math.sqrt(b + c - (b - c) ** 2 / total) / total
    return max(-1.0, middle - half), min(1.0, middle + half)


def _unit(features: Floats) -> Doubles:
    x = features.astype(np.float64)
    unit: Doubles = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit


def _words(verdict: str, difference: float, p_value: float, discordant: int) -> str:
    if discordant == 0:
        return "the same images are answered right"
    points = f"{abs(difference) * 100:.1f} points"
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    if verdict == "no_difference":
        if difference == 0:
            return "as many are answered right, though not the same ones"
        ahead = "ahead" if difference > 0 else "behind"
        return f"the served model is {points} {ahead}, which could be chance ({p})"
    return f"the served model is {verdict} by {points}, more than chance explains ({p})"
