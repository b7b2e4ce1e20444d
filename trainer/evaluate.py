"""How good a classifier is on images that it did not learn from; NumPy alone."""

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from trainer.reporting import calibration

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

_TINY = 1e-12


class ClassMetrics(msgspec.Struct, frozen=True):
    """One class's figures; a ratio without a denominator is nothing."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    """Images of the class that were measured on."""
    precision_low: float | None = None
    """Of the 95 % Wilson score interval."""
    precision_high: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    hits: int = 0
    """Images of the class that were classified as it."""
    answered: int = 0
    """Images, of whatever class, that were classified as it."""


class Metrics(msgspec.Struct, frozen=True):
    """Figures over all images that were measured on: validation images, or a test part's."""

    accuracy: float
    accuracy_low: float
    """Lower end of the 95 % Wilson score interval (Wilson 1927)."""
    accuracy_high: float
    loss: float
    """Mean cross-entropy, nats."""
    macro_f1: float
    calibration_error: float
    """Expected calibration error over 15 bins (Naeini et al. 2015)."""
    count: int
    classes: list[ClassMetrics]
    confusion: list[list[int]]
    """Rows are true classes, columns answered ones."""
    balanced_accuracy: float = 0.0
    """Mean recall over the classes that have validation images."""


def measure(probabilities: Floats, targets: Ints, classes: tuple[str, ...]) -> Metrics:
    """From probabilities [n, classes] and true classes [n]."""
    predicted = probabilities.argmax(axis=1)
    n, k = probabilities.shape
    confusion = np.zeros((k, k), dtype=np.int64)
    np.add.at(confusion, (targets, predicted), 1)
    accuracy = float((predicted == targets).mean())
    low, high = wilson(accuracy, n)
    per_class = [_class_metrics(label, i, confusion) for i, label in enumerate(classes)]
    f1s = [c.f1 for c in per_class if c.f1 is not None]
    recalls = [c.recall for c in per_class if c.recall is not None]
    return Metrics(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=cross_entropy(probabilities, targets),
        macro_f1=float(np.mean(f1s)) if f1s else 0.0,
        calibration_error=calibration.expected_error(probabilities, targets),
        count=n,
        classes=per_class,
        confusion=confusion.tolist(),
        balanced_accuracy=float(np.mean(recalls)) if recalls else 0.0,
    )


def cross_entropy(probabilities: Floats, targets: Ints) -> float:
    """Mean of -ln p(true class), nats."""
    true = probabilities[np.arange(len(targets)), targets]
    return float(-np.log(np.maximum(true, _TINY)).mean())


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Ends of the score interval of a proportion `p` of `n`, 95 % unless told (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Mistake:
    """A validation image that was answered wrong."""

    place: int
    true: int
    answered: int
    probability: float


def worst_mistakes(probabilities: Floats, targets: Ints, at_most: int) -> list[Mistake]:
    """The wrong answers, most confident first."""
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    order = wrong[np.argsort(-confidence[wrong], kind="stable")][:at_most]
    return [
        Mistake(int(i), int(targets[i]), int(predicted[i]), float(confidence[i])) for i in order
    ]


def _class_metrics(label: str, i: int, confusion: npt.NDArray[np.int64]) -> ClassMetrics:
    hit, true, answered = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
    precision = float(hit / answered) if answered else None
    recall = float(hit / true) if true else None
    f1 = float(2 * hit / (true + answered)) if true + answered else None
    precision_low, precision_high = _interval(precision, int(answered))
    recall_low, recall_high = _interval(recall, int(true))
    return ClassMetrics(
        label=label,
        precision=precision,
        recall=recall,
        f1=f1,
        support=int(true),
        precision_low=precision_low,
        precision_high=precision_high,
        recall_low=recall_low,
        recall_high=recall_high,
        hits=int(hit),
        answered=int(answered),
    )


def _interval(p: float | None, n: int) -> tuple[float | None, float | None]:
    return (None, None) if p is None else wilson(p, n)
