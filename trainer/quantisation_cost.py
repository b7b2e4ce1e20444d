"""What int8 costs a version in points, and what it gains in speed, as its own job measures it."""

import time
from dataclasses import dataclass

import numpy as np

from service.engine.head import Floats
from service.engine.runtime import Session
from service.quantisation import QuantisationCost
from trainer.arrays import Ints
from trainer.evaluate import cross_entropy
from trainer.intervals import group_count, points
from trainer.reporting.comparisons import Measured, compare

_ROUNDS, _TIMED_S = 20, 1.0
"""Most runs of each form, and the time after which there are no more."""


@dataclass(frozen=True, eq=False)
class Answers:
    """A form's answers to n images that it did not learn from; the same images for each form."""

    probabilities: Floats
    """[n, classes]"""
    answers: Ints
    """[n], as its decision has them."""
    targets: Ints
    """[n]"""
    groups: Ints
    """[n], equal for images that belong together."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of an image on one core, decoding left out."""

    fp32_ms: float
    int8_ms: float


def timed(floating: Session, quantised: Session) -> Times:
    """Times an image at a time, in turns, for a second at most; the quickest runs count.

    What else the machine does is then the same for both, and left out as far as it can be.
    """
    image = np.zeros((1, floating.size, floating.size, 3), np.uint8)
    best = [float("inf"), float("inf")]
    begun = time.monotonic()
    for turn in range(_ROUNDS + 1):
        for place, session in enumerate((floating, quantised)):
            started = time.perf_counter()
            session.run(image, cores=1)
            if turn:  # the first warms up
                best[place] = min(best[place], time.perf_counter() - started)
        if turn and time.monotonic() - begun > _TIMED_S:
            break
    return Times(*(1000 * each for each in best))


def measured(floating: Answers, quantised: Answers, times: Times) -> QuantisationCost | None:
    """Compares answers to the same images; None where there are none."""
    targets, groups = floating.targets, floating.groups
    if not len(targets):
        return None
    found = compare(Measured("fp32", floating.answers), quantised.answers, targets, groups)
    losses = [cross_entropy(each.probabilities, targets) for each in (quantised, floating)]
    return QuantisationCost(
        images=len(targets),
        groups=group_count(groups),
        fp32_accuracy=found.accuracy,
        accuracy_difference=found.difference,
        accuracy_difference_low=found.difference_low,
        accuracy_difference_high=found.difference_high,
        log_loss_difference=losses[0] - losses[1],
        changed_answers=float((floating.answers != quantised.answers).mean()),
        fp32_ms=times.fp32_ms,
        int8_ms=times.int8_ms,
    )


def is_bearable(cost: QuantisationCost | None) -> bool:
    """Returns whether int8 is served where nobody asked for it by name.

    Not where it was shown to lose accuracy, nor where no image tells what it costs.
    """
    return cost is not None and cost.accuracy_difference_high >= 0


def words(cost: QuantisationCost | None) -> str:
    """Says for people what int8 costs and gains."""
    if cost is None:
        return "there is no image to tell what int8 costs"
    lone = f"{cost.images} images"
    if cost.groups < cost.images:
        lone += f" in {cost.groups} groups"
    return (
        f"int8 changes the accuracy by {points(cost.accuracy_difference)} points (95 % interval "
        f"{points(cost.accuracy_difference_low)} to {points(cost.accuracy_difference_high)}, on "
        f"{lone} that were not learned from), the log loss by {cost.log_loss_difference:+.3f} "
        f"nats and {cost.changed_answers:.1%} of the answers; an image takes {cost.int8_ms:.1f} "
        f"ms of a core of the machine that trained, in fp32 {cost.fp32_ms:.1f} ms "
        f"({cost.fp32_ms / max(cost.int8_ms, 1e-9):.1f} times as long)"
    )
