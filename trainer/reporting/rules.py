"""What each rule of decision gives on the same images: NumPy and SciPy alone."""

import math
from typing import Literal

import msgspec
import numpy as np

from service.domain import ARGMAX, Decision
from service.engine.head import NONE, Head
from trainer import intervals
from trainer.arrays import Bools, Ints
from trainer.evaluate import balanced_accuracy, z_of
from trainer.measuring import Measured

IMBALANCED = 1 / 4
"""Images of the rarest class for one of the commonest, below which classes are imbalanced."""


class Ends(msgspec.Struct, frozen=True):
    """A figure with its 95 % interval."""

    value: float
    """The figure."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


class RuleFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule gives."""

    rule: Literal["argmax", "balanced", "thresholds"]
    """Name of the rule."""
    is_own: bool
    """The version decides by it."""
    accuracy: Ends
    """Fraction of the images that are classified correctly."""
    balanced_accuracy: Ends
    """Mean recall over the classes that have images."""
    least_recall: Ends
    """Of the class that is recognised least."""
    least_recall_class: str
    """That class."""
    unanswered: Ends
    """Part of the images that are answered with none."""


class Imbalance(msgspec.Struct, frozen=True, kw_only=True):
    """How unequal the classes are, and what deciding by `balanced` changes."""

    rarest: str
    """Class with the fewest images."""
    commonest: str
    """Class with the most images."""
    ratio: float
    """Images of the commonest class that were learned from for one of the rarest, above 4."""
    gain: Ends
    """Of balanced accuracy: that of `balanced` minus that of `argmax`, on the same images."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Rules beside each other, on the images of the headline."""

    rows: list[RuleFigures]
    """One for each rule."""
    imbalance: Imbalance | None
    """None where the rarest class has a fourth of the images of the commonest, or more."""


def compared(head: Head, measured: Measured) -> Rules:
    """Measures argmax, balanced and the head's own rule on the same images.

    A cross-validation's intervals are widened as those of its other figures.
    """
    decisions = {each.rule: each for each in (ARGMAX, Decision(rule="balanced"), head.decision)}
    answers = {rule: head.decide(measured.probabilities, d) for rule, d in decisions.items()}
    targets, groups = measured.part.targets, intervals.numbered(measured.groups)
    z = z_of(targets, groups) if measured.rounds else intervals.Z_95
    rows = [
        _figures(head, rule, answered, targets, groups, z) for rule, answered in answers.items()
    ]
    right = {rule: answered == targets for rule, answered in answers.items()}
    return Rules(
        rows=rows,
        imbalance=_imbalance(head, right["argmax"], right["balanced"], targets, groups, z),
    )


def advised(rules: Rules) -> str:
    """Recommends `balanced` where it is shown to win, for people; "" elsewhere.

    To a version that decides by argmax alone: who set another rule knew why.
    """
    rows = {row.rule: row for row in rules.rows}
    now, then, found = rows["argmax"], rows["balanced"], rules.imbalance
    if found is None or found.gain.low <= 0 or not now.is_own:
        return ""
    gain = found.gain
    return (
        f"The classes are imbalanced: for one image of {found.rarest} there are {found.ratio:.0f} "
        f"of {found.commonest}, and the most probable class is a common one too often. Decide by "
        "`balanced` where a rare class must not be missed: with every class counted the same "
        f"{then.balanced_accuracy.value * 100:.0f} % instead of "
        f"{now.balanced_accuracy.value * 100:.0f} % are then classified correctly, "
        f"{gain.value * 100:.1f} points more (95 % interval {gain.low * 100:.1f} to "
        f"{gain.high * 100:.1f}), and of all images {then.accuracy.value * 100:.1f} % instead of "
        f"{now.accuracy.value * 100:.1f} %. Any call may ask for it; the next version has it when "
        "its job asks for the decision `balanced`."
    )


def _figures(
    head: Head,
    rule: Literal["argmax", "balanced", "thresholds"],
    answers: Ints,
    targets: Ints,
    groups: Ints,
    z: float,
) -> RuleFigures:
    right, k = answers == targets, len(head.classes)
    support = np.bincount(targets, minlength=k)
    recalls = np.bincount(targets, weights=right, minlength=k) / np.maximum(support, 1)
    least = int(np.where(support > 0, recalls, np.inf).argmin())
    own = targets == least
    return RuleFigures(
        rule=rule,
        is_own=rule == head.decision.rule,
        accuracy=Ends(*intervals.of_share(right, groups, z)),
        balanced_accuracy=Ends(*balanced_accuracy(right, targets, groups, k, z)),
        least_recall=Ends(*intervals.of_share(right[own], groups[own], z)),
        least_recall_class=head.classes[least],
        unanswered=Ends(*intervals.of_share(answers == NONE, groups, z)),
    )


def _imbalance(
    head: Head, before: Bools, after: Bools, targets: Ints, groups: Ints, z: float
) -> Imbalance | None:
    if head.prior is None:
        return None
    shares = np.where(head.prior > 0, head.prior, np.nan)
    rarest, commonest = int(np.nanargmin(shares)), int(np.nanargmax(shares))
    if shares[rarest] >= IMBALANCED * shares[commonest]:
        return None
    return Imbalance(
        rarest=head.classes[rarest],
        commonest=head.classes[commonest],
        ratio=float(shares[commonest] / shares[rarest]),
        gain=_gain(before, after, targets, groups, z),
    )


def _gain(before: Bools, after: Bools, targets: Ints, groups: Ints, z: float) -> Ends:
    """Returns the difference in balanced accuracy of two answers [n] to the same images.

    Of each class it has Tango's interval (1998), which holds for few images too; those of the
    classes, which are independent, are put together by the distances to their ends (Zou and
    Donner 2008, "Construction of confidence limits about effect measures: A general approach").
    """
    value, below, above = 0.0, 0.0, 0.0
    classes = np.unique(targets)
    for label in classes:
        own = targets == label
        changed = after[own].astype(np.float64) - before[own]
        effect = intervals.design_effect(changed, groups[own])
        won, lost, n = int((changed > 0).sum()), int((changed < 0).sum()), len(changed)
        low, high = intervals.matched_difference(won / effect, lost / effect, n / effect, z)
        difference = (won - lost) / n
        value += difference
        below += (difference - low) ** 2
        above += (high - difference) ** 2
    k = len(classes)
    return Ends(value / k, (value - math.sqrt(below)) / k, (value + math.sqrt(above)) / k)
