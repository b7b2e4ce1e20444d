"""Checks whether a version reaches what its request asked of it; decides nothing.

The service publishes what passes and keeps the rest as candidates.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from service.contract import Gate
from service.domain import GateCheck, Parity, Verdict
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.runtime import Session
from trainer import intervals
from trainer.arrays import Bools, Ints
from trainer.division import listed
from trainer.evaluate import Metrics

_POWER_Z = 0.841621
"""Of the 80 % of cases in which so many images are to settle a comparison."""
_NAMED = 5
"""Classes that a detail names."""
_RUNS = 15


@dataclass(frozen=True, eq=False)
class Paired:
    """Answers of a version and of the one behind the gate's alias, on the same images."""

    right: Bools
    """[n], by image of a class that both know: whether the new version is right."""
    incumbent_right: Bools
    """[n]"""
    groups: Ints
    """[n], images that belong together have the same number."""
    left_out: int = 0
    """Images on which the two could not be compared fairly."""
    new_class_right: Bools | None = None
    """[m], whether the new version is right on images of classes that the other does not know."""
    chance: float = 0.0
    """The accuracy that the incumbent would have by guessing."""
    is_identical: bool = False
    """Every image is given the same class with the same probability by both."""


@dataclass(frozen=True)
class NonInferiority:
    """How much accuracy may have been lost, and whether that is known to be little enough."""

    verdict: Verdict
    difference: float
    """Accuracy of the new version minus the incumbent's; the ends are one-sided 95 % ones."""
    low: float
    high: float
    lost: int
    """Images that only the incumbent answers right."""
    won: int
    images: int
    groups: int
    images_needed: int
    """Images in all that would settle what is undecided; 0 where that is not known."""


def non_inferiority(
    right: Bools,
    incumbent_right: Bools,
    groups: Ints,
    margin: float,
    *,
    is_identical: bool = False,
) -> NonInferiority:
    """Whether accuracy falls by less than `margin`, from answers to the same images [n].

    Passed where the one-sided 95 % lower end of the difference lies above -`margin`, and where
    the two answer identically, on any number of images; that the same ones are right may be
    chance on few. Failed where the upper end lies below 0. The ends are of
    Tango's score interval (Tango 1998, "Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design"), of images and changes divided by
    the design effect of the groups.
    """
    n = len(right)
    if n == 0:
        return NonInferiority("undecided", 0.0, -1.0, 1.0, 0, 0, 0, 0, 0)
    lost, won = int((incumbent_right & ~right).sum()), int((right & ~incumbent_right).sum())
    effect = intervals.design_effect(right.astype(np.float64) - incumbent_right, groups)
    counts = won / effect, lost / effect, n / effect
    low, high = intervals.matched_difference(*counts, intervals.Z_ONE_SIDED_95)
    verdict: Verdict = "undecided"
    if low > -margin or is_identical:
        verdict = "passed"
    elif high < 0:
        verdict = "failed"
    needed = 0
    if verdict == "undecided":
        needed = _images_needed((lost + won) / n, margin, effect)
    return NonInferiority(
        verdict=verdict,
        difference=(won - lost) / n,
        low=low,
        high=high,
        lost=lost,
        won=won,
        images=n,
        groups=intervals.group_count(groups),
        # Where so many are there already, it is the difference itself that lies near the margin.
        images_needed=needed if needed > n else 0,
    )


def _images_needed(changed: float, margin: float, effect: float) -> int:
    """Images that show no more than `margin` to be lost, in 80 % of cases, were nothing lost.

    Of equally many answers won and lost, `changed` of all, by the normal approximation of the
    score test; to two digits.
    """
    if margin <= 0:
        return 0
    expected = intervals.matched_variance(changed / 2, changed / 2, -margin)
    errors = intervals.Z_ONE_SIDED_95 * math.sqrt(expected) + _POWER_Z * math.sqrt(changed)
    count = effect * (errors / margin) ** 2
    step = int(10 ** max(0, math.floor(math.log10(count)) - 1))
    return min(math.ceil(count / step) * step, 2**31 - 1)


def checks(
    asked: Gate,
    metrics: Metrics | None,
    parity: Parity,
    paired: Paired | None,
    latency_ms: Callable[[], float],
    incumbent_problem: str = "",
) -> list[GateCheck]:
    """The conditions that the gate names, in the proto's order.

    `metrics` are the headline's, None where no image could be measured on. `paired` is None
    where no version is behind `asked.not_worse_than` yet, or where `incumbent_problem` says
    why it cannot be asked.
    """
    found: list[GateCheck] = []
    if asked.min_accuracy is not None:
        found.append(_accuracy(asked, asked.min_accuracy, metrics))
    if asked.min_class_recall is not None or asked.class_recalls:
        found.append(_class_recall(asked, metrics))
    if asked.not_worse_than:
        found.append(_not_worse(asked, paired, incumbent_problem))
    if asked.max_parity_difference is not None:
        value, bound = parity.max_difference, asked.max_parity_difference
        found.append(
            _check("parity", asked, _verdict(value <= bound), value, bound, "PyTorch and ONNX "
                   f"Runtime differ by {value:.2g} in a probability, at most {bound:.2g} was "
                   "asked for")
        )  # fmt: skip
    if asked.max_latency_ms is not None:
        value, bound = latency_ms(), asked.max_latency_ms
        found.append(
            _check("latency", asked, _verdict(value <= bound), value, bound, f"one image takes "
                   f"{value:.1f} ms, at most {bound:.1f} ms were asked for")
        )  # fmt: skip
    return found


def measure_latency_ms(
    decode: Sequence[Callable[[], Pixels]],
    session: Session,
    probabilities: Callable[[Floats], object],
) -> float:
    """Median milliseconds of an image, decoding included, one at a time.

    `decode` are images as uint8 [224, 224, 3], made when called.
    """
    taken = []
    for run in range(_RUNS + 1):
        started = time.perf_counter()
        pixels = decode[run % len(decode)]()
        probabilities(session.run(pixels[None]))
        taken.append(time.perf_counter() - started)
    # The first one warms the kernels for its shape.
    return float(np.median(taken[1:])) * 1000


def _accuracy(asked: Gate, bound: float, metrics: Metrics | None) -> GateCheck:
    if metrics is None:
        told = f"no image could be measured on; an accuracy of at least {bound:.4f} was asked for"
        return _check("accuracy", asked, "undecided", None, bound, told)
    value = metrics.accuracy
    told = (
        f"accuracy {value:.4f} of {metrics.count} images ({metrics.accuracy_low:.4f} to "
        f"{metrics.accuracy_high:.4f}), at least {bound:.4f} was asked for"
    )
    return _check("accuracy", asked, _verdict(value >= bound), value, bound, told)


def _class_recall(asked: Gate, metrics: Metrics | None) -> GateCheck:
    recalls = {} if metrics is None else {c.label: c.recall for c in metrics.classes}
    bounds = dict(asked.class_recalls)
    if asked.min_class_recall is not None:
        bounds = dict.fromkeys(recalls, asked.min_class_recall) | bounds
    measured = {label: (r, bounds[label]) for label, r in recalls.items()
                if r is not None and label in bounds}  # fmt: skip
    unknown = [label for label in bounds if metrics is not None and label not in recalls]
    unmeasured = [label for label in bounds if label not in measured and label not in unknown]
    # The one furthest below its own bound stands for all.
    order = sorted(measured, key=lambda label: measured[label][0] - measured[label][1])
    below = [label for label in order if measured[label][0] < measured[label][1]]
    support = (
        {} if metrics is None else {c.label: f"{c.hits} of {c.support}" for c in metrics.classes}
    )
    told = [f"recall of {label!r} {measured[label][0]:.4f} ({support[label]} images), at least "
            f"{measured[label][1]:.4f} was asked for"
            for label in (below or order[:1])[:_NAMED]]  # fmt: skip
    told += [f"and {len(below) - _NAMED} more classes"] if len(below) > _NAMED else []
    if unknown:
        told.append(f"no class of the version is called {listed(map(repr, unknown), _NAMED)}")
    if unmeasured:
        told.append(f"no image of {listed(map(repr, unmeasured), _NAMED)} could be measured on")
    elif metrics is None:
        told.append("no image could be measured on")
    verdict: Verdict = "passed"
    if below or unknown:
        verdict = "failed"
    elif unmeasured or metrics is None:
        verdict = "undecided"
    value, bound = (
        measured[order[0]]
        if order
        else (None, max(bounds.values(), default=asked.min_class_recall or 0.0))
    )
    return _check("class_recall", asked, verdict, value, bound, "; ".join(told))


def _not_worse(asked: Gate, paired: Paired | None, problem: str) -> GateCheck:
    alias, bound = asked.not_worse_than, -asked.max_regression
    if problem:
        # What cannot be compared has not passed.
        told = f"the version behind {alias} could not be compared with: {problem}"
        return _check("not_worse", asked, "failed", None, bound, told)
    if paired is None:
        told = f"no version is behind {alias} yet"
        return _check("not_worse", asked, "passed", None, bound, told)
    found = non_inferiority(
        paired.right,
        paired.incumbent_right,
        paired.groups,
        asked.max_regression,
        is_identical=paired.is_identical,
    )
    if (
        found.images
        and intervals.of_share(paired.incumbent_right, paired.groups)[2] < paired.chance
    ):
        told = (
            f"the version behind {alias} is right on {paired.incumbent_right.mean():.1%} of "
            f"{found.images} images, less than by guessing: see that the classes are not mixed up"
        )
        return _check("not_worse", asked, "undecided", found.low, bound, told)
    told = ". ".join(_compared(asked, paired, found))
    value = found.low if found.images else None
    return _check("not_worse", asked, found.verdict, value, bound, told, found.images_needed)


def _compared(asked: Gate, paired: Paired, found: NonInferiority) -> Iterator[str]:
    """Tells of a comparison, one sentence at a time."""
    alias, n = asked.not_worse_than, found.images
    images = f"{n} image{'' if n == 1 else 's'}"
    if n == 0:
        yield f"there is no image on which to compare with the version behind {alias}"
    else:
        of = f" of {found.groups} groups" if found.groups < n else ""
        between = f"{intervals.points(found.low)} and {intervals.points(found.high)} points"
        yield (
            f"accuracy {paired.right.mean():.4f} against {paired.incumbent_right.mean():.4f} of "
            f"the version behind {alias} on the same {images}{of}: {found.lost} lost, "
            f"{found.won} won, a difference between {between} (each end 95 %, one-sided)"
        )
        allowed = f"{asked.max_regression * 100:.3g} points"
        if found.verdict == "undecided":
            needed = found.images_needed
            yield f"It cannot be told from {images} whether more than {allowed} are lost" + (
                f": about {needed} would be enough if both were equally good"
                if needed
                else ", because the difference is too close to that"
            )
        elif found.verdict == "failed":
            yield f"It is worse; a loss of less than {allowed} was to be shown"
        elif paired.is_identical:
            yield "Both answer identically"
        elif found.low > 0:
            yield "It is better"
        else:
            yield f"Less than {allowed} are lost"
    if paired.left_out:
        yield f"{paired.left_out} images could not be compared on fairly and are left out"
    if paired.new_class_right is not None and len(paired.new_class_right):
        new = paired.new_class_right
        yield (
            f"Apart from these, {int(new.sum())} of {len(new)} images of classes that it does not "
            "know are classified correctly"
        )


def _check(
    name: Literal["accuracy", "class_recall", "not_worse", "parity", "latency"],
    asked: Gate,
    verdict: Verdict,
    value: float | None,
    bound: float,
    detail: str,
    images_needed: int = 0,
) -> GateCheck:
    held = asked.when_uncertain == "hold"
    return GateCheck(
        name=name,
        verdict=verdict,
        passed=verdict == "passed" or (verdict == "undecided" and not held),
        value=value,
        bound=bound,
        detail=detail,
        images_needed=images_needed,
    )


def _verdict(passed: bool) -> Verdict:
    return "passed" if passed else "failed"
