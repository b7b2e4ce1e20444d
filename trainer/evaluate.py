"""How good a classifier is on images that it did not learn from; NumPy and SciPy alone.

An image's answer is a class, or `NONE` where a decision gives none, which is never right.
Every figure has a 95 % interval by groups of images that belong together, see
`trainer.intervals`.
"""

import math

import msgspec
import numpy as np

from service.domain import Figure, MeasuredOn
from service.engine.head import NONE
from trainer import intervals
from trainer.arrays import Bools, Doubles, Floats, Ints
from trainer.reporting import calibration

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Probabilities from which on answers may be acted on, as the coverage table has them."""
_DRAWN = 2.0
_TINY = 1e-12


class ClassMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One class's figures, each with its 95 % interval; a ratio without a denominator is None."""

    label: str
    """Name of the class."""
    support: int
    """Images of the class that were measured on."""
    answered: int
    """Images, of whatever class, that were classified as it."""
    hits: int
    """Images of the class that were classified as it."""
    unanswered: int
    """Images of the class that were answered with none."""
    precision: float | None
    """Fraction of the images classified as it that are of the class."""
    precision_low: float | None
    precision_high: float | None
    recall: float | None
    """Fraction of the class's images that are classified as it."""
    recall_low: float | None
    recall_high: float | None
    f1: float | None
    """Harmonic mean of precision and recall."""
    f1_low: float | None
    f1_high: float | None
    auroc: float | None
    """How often its probability is higher for an image of the class than for another one; None
    where all images are of one kind."""
    auroc_low: float | None
    auroc_high: float | None


class CoverageRow(msgspec.Struct, frozen=True, kw_only=True):
    """How often answers are right if only those of at least some probability are acted on."""

    threshold: float
    """Least probability of an answer that is acted on."""
    answered: int
    """Images whose answer has at least that probability; never 0."""
    coverage: float
    """The same as a part of all images, 0 to 1."""
    right: int
    """Images of those that are classified correctly."""
    precision: float
    """The part of the answered ones that is right."""
    precision_low: float
    precision_high: float


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Figures over all images that were measured on, each with its 95 % interval."""

    count: int
    """Images."""
    groups: int
    """Groups of images that belong together; a lone image is one."""
    effective_count: float
    """Lone images that would tell the accuracy as exactly."""
    accuracy: float
    """Fraction of the images that are classified correctly."""
    accuracy_low: float
    accuracy_high: float
    unanswered: int
    """Images that were answered with none; none of them counts as right."""
    balanced_accuracy: float
    """Mean recall over the classes that have images."""
    balanced_accuracy_low: float
    balanced_accuracy_high: float
    macro_f1: float
    """Mean F1 over the classes that have images or were answered."""
    macro_f1_low: float
    macro_f1_high: float
    macro_auroc: float | None
    """Mean over the classes that have images and are not all there is, one against the rest."""
    macro_auroc_low: float | None
    macro_auroc_high: float | None
    loss: float
    """Mean cross-entropy, nats."""
    loss_low: float | None
    """None for a single group, which tells nothing of how groups differ. Too narrow where images
    that are wrong and sure are fewer than a handful."""
    loss_high: float | None
    calibration_error: float
    """Expected calibration error over bins of as many images, see `calibration.expected_error`."""
    classes: list[ClassMetrics]
    """Figures of each class."""
    confusion: list[list[int]]
    """Rows are true classes, columns answered ones; what is answered with none is in no column."""
    coverage: list[CoverageRow]
    """By rising threshold, from 0 on; those that change nothing are left out."""


def measure(
    probabilities: Floats,
    targets: Ints,
    classes: tuple[str, ...],
    groups: Ints | None = None,
    *,
    answers: Ints | None = None,
    is_crossed: bool = False,
) -> Metrics:
    """From probabilities [n, classes], true classes [n] and groups [n], n > 0.

    `groups` None means that each image stands alone; `answers` None that each is answered
    with its most probable class; `is_crossed` that they are of a cross-validation, see
    `z_of`. Raises ValueError for no image, or for rows of NaN: what was not asked is not
    measured on.
    """
    n, k = probabilities.shape
    if n == 0:
        raise ValueError("there is no image to measure on")
    if np.isnan(probabilities[:, 0]).any():
        raise ValueError("an image without an answer cannot be measured on")
    where = np.arange(n) if groups is None else intervals.numbered(groups)
    predicted = probabilities.argmax(axis=1) if answers is None else answers
    right = predicted == targets
    # Answers with none are a class of their own, the last, that no image is of.
    predicted = np.where(predicted == NONE, k, predicted)
    confusion = np.bincount(targets * (k + 1) + predicted, minlength=k * (k + 1))
    confusion = confusion.reshape(k, k + 1)
    z = z_of(targets, where) if is_crossed else intervals.Z_95
    accuracy, low, high = intervals.of_share(right, where, z)
    loss, loss_low, loss_high = _loss(probabilities, targets, where)
    balanced = balanced_accuracy(right, targets, where, k, z)
    f1 = _macro_f1(predicted, targets, where, k, z)
    per_class, auroc = _classes(probabilities, predicted, targets, where, classes)
    return Metrics(
        count=n,
        groups=intervals.group_count(where),
        effective_count=intervals.effective_count(
            accuracy, intervals.clustered_se(right - accuracy, where), where
        )
        * (intervals.Z_95 / z) ** 2,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        unanswered=int(confusion[:, k].sum()),
        balanced_accuracy=balanced[0],
        balanced_accuracy_low=balanced[1],
        balanced_accuracy_high=balanced[2],
        macro_f1=f1[0],
        macro_f1_low=f1[1],
        macro_f1_high=f1[2],
        macro_auroc=auroc[0],
        macro_auroc_low=auroc[1],
        macro_auroc_high=auroc[2],
        loss=loss,
        loss_low=loss_low,
        loss_high=loss_high,
        calibration_error=calibration.expected_error(probabilities, targets),
        classes=per_class,
        confusion=confusion[:, :k].tolist(),
        coverage=_coverage(probabilities, predicted, right, where, z),
    )


def figure(
    measured_on: MeasuredOn,
    probabilities: Floats,
    targets: Ints,
    groups: Ints | None = None,
    rounds: int = 0,
    answers: Ints | None = None,
) -> Figure:
    """Returns a version's figure by its probabilities [n, classes] on n > 0 images in groups [n].

    `rounds` are those of a cross-validation, 0 where the images were answered once; `answers`
    None means that each is answered with its most probable class.
    """
    predicted = probabilities.argmax(axis=1) if answers is None else answers
    right = predicted == targets
    where = np.arange(len(targets)) if groups is None else groups
    z = z_of(targets, where) if rounds else intervals.Z_95
    accuracy, low, high = intervals.of_share(right, where, z)
    return Figure(
        measured_on=measured_on,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        loss=cross_entropy(probabilities, targets),
        count=len(targets),
        groups=intervals.group_count(where),
        rounds=rounds,
    )


def z_of(targets: Ints, groups: Ints) -> float:
    """Standard errors to each side of a 95 % interval of answers by cross-validation.

    Those are of other heads than the one that serves: of as many other draws of the images as
    there are folds. What heads differ by from draw to draw adds to the variance, the more the
    fewer groups a class has to learn from (Bates, Hastie and Tibshirani 2023, "Cross-validation:
    what does it estimate and how well does it do it?"). How much is measured: over jobs of 3 to
    10 images a class the errors were 1.2 times what images alone explain, and of 20 and more 1.
    """
    per_class = intervals.group_count(groups) / len(np.unique(targets))
    return intervals.Z_95 * math.sqrt(1 + _DRAWN / per_class)


def cross_entropy(probabilities: Floats, targets: Ints) -> float:
    """Mean of -ln p(true class), nats."""
    return float(losses(probabilities, targets).mean())


def losses(probabilities: Floats, targets: Ints) -> Doubles:
    """Cross-entropy [n] of each image, nats."""
    true = probabilities[np.arange(len(targets)), targets].astype(np.float64)
    found: Doubles = -np.log(np.maximum(true, _TINY))
    return found


def mistakes(probabilities: Floats, targets: Ints, answers: Ints) -> Ints:
    """The places of wrong answers, most confident first; of answers with none, none is wrong."""
    wrong = np.flatnonzero((answers != targets) & (answers != NONE))
    return wrong[np.argsort(-probabilities[wrong, answers[wrong]], kind="stable")]


_Ends = tuple[float | None, float | None, float | None]
"""A value and the ends of its interval; None where there is none."""
_NONE: _Ends = (None, None, None)


def _loss(
    probabilities: Floats, targets: Ints, groups: Ints
) -> tuple[float, float | None, float | None]:
    each = losses(probabilities, targets)
    mean = float(each.mean())
    se = intervals.clustered_se(each - mean, groups)
    if not math.isfinite(se):
        return mean, None, None
    # Its logarithm is less skewed: a few images that are wrong and sure make most of it.
    times = math.exp(intervals.t_quantile(groups) * se / max(mean, _TINY))
    return mean, mean / times, mean * times


def balanced_accuracy(
    right: Bools, targets: Ints, groups: Ints, k: int, z: float
) -> tuple[float, float, float]:
    """Returns the mean recall of the `k` classes that have images, and its interval's ends."""
    support = np.bincount(targets, minlength=k)
    recalls = np.bincount(targets, weights=right, minlength=k) / np.maximum(support, 1)
    weights = _class_weights(support, targets)
    value = float(weights @ right)
    influence = len(targets) * weights * (right - recalls[targets])
    se = intervals.clustered_se(influence, groups)
    return value, *intervals.interval(value, se, groups, z, weights)


def _macro_f1(
    predicted: Ints, targets: Ints, groups: Ints, k: int, z: float
) -> tuple[float, float, float]:
    n, hit = len(targets), predicted == targets
    support = np.bincount(targets, minlength=k + 1)
    # No image is of the last, which stands for none: its F1 is 0, and does not count.
    sizes = support + np.bincount(predicted, minlength=k + 1)
    f1 = 2 * np.bincount(targets[hit], minlength=k + 1) / np.maximum(sizes, 1)
    seen = int((sizes[:k] > 0).sum())
    value = float(f1.sum() / seen)
    # Of each class twice the hits over its images and its answers, both of which an image is in.
    influence = (hit - f1[targets]) / sizes[targets] + (hit - f1[predicted]) / sizes[predicted]
    se = intervals.clustered_se(n / seen * influence, groups)
    weights = _class_weights(support, targets)
    return value, *intervals.interval(value, se, groups, z, weights)


def _class_weights(support: Ints, targets: Ints) -> Doubles:
    """Weights [n] of sum 1 that make the classes with images count alike."""
    weights: Doubles = 1 / (support[targets] * np.count_nonzero(support))
    return weights


def _classes(
    probabilities: Floats, predicted: Ints, targets: Ints, groups: Ints, labels: tuple[str, ...]
) -> tuple[list[ClassMetrics], _Ends]:
    """Each class's figures, and the mean area under the curves with its interval."""
    n, k = probabilities.shape
    hit = predicted == targets
    of_class, as_class = _places(targets, k), _places(predicted, k + 1)
    found, areas, influence, least = [], [], np.zeros(n), []
    for i, label in enumerate(labels):
        of, as_ = of_class[i], as_class[i]
        either = np.union1d(of, as_)
        jaccard = _share(hit[either], groups[either])
        auroc = _NONE
        if 0 < len(of) < n:
            area, its_influence, its_least = _area(probabilities[:, i], of, groups)
            auroc = area, *_area_interval(area, its_influence, groups, its_least)
            areas.append(area)
            least.append(its_least)
            influence += its_influence
        recall, precision = _share(hit[of], groups[of]), _share(hit[as_], groups[as_])
        # F1 rises with the hits' share of all images of the class or answered as it, an
        # ordinary share, so that its interval is that one's.
        f1 = tuple(None if j is None else 2 * j / (1 + j) for j in jaccard)
        found.append(
            ClassMetrics(
                label=label, support=len(of), answered=len(as_), hits=int(hit[of].sum()),
                unanswered=int((predicted[of] == k).sum()),
                precision=precision[0], precision_low=precision[1], precision_high=precision[2],
                recall=recall[0], recall_low=recall[1], recall_high=recall[2],
                f1=f1[0], f1_low=f1[1], f1_high=f1[2],
                auroc=auroc[0], auroc_low=auroc[1], auroc_high=auroc[2],
            )
        )  # fmt: skip
    if not areas:
        return found, _NONE
    mean = float(np.mean(areas))
    # Of two classes the areas are one and the same; of more each has its own images.
    together = len(areas) ** 2 / sum(1 / count for count in least) if k > 2 else max(least)
    return found, (mean, *_area_interval(mean, influence / len(areas), groups, min(together, n)))


def _places(classes: Ints, k: int) -> list[Ints]:
    order = np.argsort(classes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(classes, minlength=k))[:-1])


def _share(right: Bools, groups: Ints) -> _Ends:
    return intervals.of_share(right, groups) if len(right) else _NONE


def _area(scores: Floats, positive: Ints, groups: Ints) -> tuple[float, Doubles, float]:
    """Area under the ROC curve of scores [n], each image's influence, and a least count.

    By placements: the part of the other kind's images that an image stands above, or below
    (DeLong, DeLong and Clarke-Pearson 1988); those of a group are added up (Obuchowski 1997,
    "Nonparametric analysis of clustered ROC curve data").
    """
    n, m = len(scores), len(positive)
    is_positive = np.zeros(n, dtype=np.bool_)
    is_positive[positive] = True
    order = positive[np.argsort(scores[positive], kind="stable")]
    rising, others = scores[order], scores[~is_positive]
    below = np.searchsorted(rising, others, side="left")
    up_to = np.searchsorted(rising, others, side="right")
    # A pair of equal scores counts half.
    over = (np.bincount(up_to, minlength=m + 1) + np.bincount(below, minlength=m + 1)) / 2
    placements = np.empty(n)
    placements[order] = np.cumsum(over)[:m] / (n - m)
    placements[~is_positive] = 1 - (below + up_to) / (2 * m)
    area = float(placements[positive].mean())
    influence = (placements - area) * np.where(is_positive, n / m, n / (n - m))
    sizes = [np.bincount(groups[kind]) for kind in (is_positive, ~is_positive)]
    counts = [float(s.sum() ** 2 / np.square(s, dtype=np.float64).sum()) for s in sizes]
    return area, influence, 2 / (1 / counts[0] + 1 / counts[1])


def _area_interval(
    area: float, influence: Doubles, groups: Ints, least: float
) -> tuple[float, float]:
    se = intervals.clustered_se(influence, groups)
    if not math.isfinite(se):
        return 0.0, 1.0
    largest = max(area, 1 - area) ** 2
    count = intervals.count_between(least, math.inf, area * (1 - area), largest, se)
    return intervals.wilson(area, max(1.0, count))


def _coverage(
    probabilities: Floats, predicted: Ints, right: Bools, groups: Ints, z: float
) -> list[CoverageRow]:
    n, k = probabilities.shape
    # What is answered with none is never acted on.
    confidence = np.full(n, -1, probabilities.dtype)
    has_class = predicted < k
    confidence[has_class] = probabilities[has_class, predicted[has_class]]
    rows: list[CoverageRow] = []
    for threshold in THRESHOLDS:
        answered = confidence >= threshold
        count = int(answered.sum())
        if count == 0 or (rows and rows[-1].answered == count):
            continue
        precision, low, high = intervals.of_share(right[answered], groups[answered], z)
        rows.append(
            CoverageRow(
                threshold=threshold,
                answered=count,
                coverage=count / len(right),
                right=int(right[answered].sum()),
                precision=precision,
                precision_low=low,
                precision_high=high,
            )
        )
    return rows
