"""Measures versions on images that they did not learn from."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from service.domain import Decision, Figure, MeasuredOn
from service.engine.head import Head
from trainer import evaluate, folds, penalty
from trainer.arrays import Bools, Doubles, Floats, Ints
from trainer.data import Part
from trainer.divided import Divided, subset, unlearned
from trainer.features import Features
from trainer.reporting import calibration

if TYPE_CHECKING:
    from trainer.transfer import Transferred

Decide = Callable[[Floats], Ints]
"""From probabilities [n, classes] to the answers [n], see `Head.decide`."""


def most_probable(probabilities: Floats) -> Ints:
    """Answers with the most probable class."""
    best: Ints = probabilities.argmax(axis=1)
    return best


def deciding(head: Head, targets: Ints, decision: Decision) -> Head:
    """Returns a head that learned from images of the classes [n], as it is to decide."""
    shares = np.bincount(targets, minlength=len(head.classes)) / len(targets)
    return replace(head, prior=shares.astype(np.float32), decision=decision)


@dataclass(frozen=True, eq=False)
class Measured:
    """Images of one kind, and probabilities [n, classes] by what did not learn from them."""

    measured_on: MeasuredOn
    part: Part
    groups: Ints
    probabilities: Floats
    copies: int = 0
    """Images of the kind that are left out, since copies of them were learned from."""
    rounds: int = 0
    """Of the cross-validation; 0 where the images were measured once."""
    decide: Decide = most_probable
    """The version's: in a cross-validation too, by the shares of all images."""

    @functools.cached_property
    def answers(self) -> Ints:
        """Answers [n] to the images, as the version decides."""
        return self.decide(self.probabilities)

    def figure(self) -> Figure:
        """Measures them as one figure."""
        return evaluate.figure(
            self.measured_on,
            self.probabilities,
            self.part.targets,
            self.groups,
            self.rounds,
            self.answers,
        )


def measure(found: "Transferred") -> tuple["Transferred", list[Measured]]:
    """Measures what serves on images that it did not learn from, the headline first.

    Of a trained network the temperature is fitted here. There is nothing to measure where
    every class has one image, or a target domain no labels.
    """
    found, sets = _measure(found)
    return found, [replace(each, decide=found.served.head.decide) for each in sets]


def _measure(found: "Transferred") -> tuple["Transferred", list[Measured]]:
    if found.target is not None:
        return found, found.adapted
    served, divided = found.served, found.divided
    train = divided.data.train
    out_of_fold = found.out_of_fold
    if served.fitted is not None:
        out_of_fold = served.fitted.out_of_fold
    elif out_of_fold is None:
        return _measure_network(found)
    sets = given(divided, found.learned_groups, served.head, served.features)
    if out_of_fold is not None:
        sets += cross_validated(
            train, divided.train, out_of_fold, ~divided.chose, found.rounds or divided.rounds
        )
    return found, sets


def _measure_network(found: "Transferred") -> tuple["Transferred", list[Measured]]:
    served, divided = found.served, found.divided
    data, learned = divided.data, found.learned_groups
    name: MeasuredOn = "held_out" if found.held.any() else "validation"
    if name == "held_out":
        part, groups = subset(data.train, divided.train, found.held & ~divided.chose)
    else:
        mask = unlearned(divided.validation, learned)
        part, groups = subset(data.validation, divided.validation, mask)
    if not len(part):
        return found, given(divided, learned, served.head, served.features)
    features = served.features.all_of(part, "held-out images")
    logits = served.head.logits(features).astype(np.float64)
    own = Measured(name, part, groups, softmax(logits, axis=1))
    head, own = tempered(served.head, own, logits)
    rest = given(divided, learned, head, served.features)
    sets = [each for each in rest if each.measured_on != "validation"] + [own]
    if name == "validation":
        sets[-1] = replace(own, copies=len(data.validation) - len(part))
    return replace(found, served=replace(served, head=head)), sets


def cross_validated(
    part: Part, groups: Ints, out_of_fold: Floats, chose_nothing: Bools, rounds: int
) -> list[Measured]:
    """Returns the images that have an out-of-fold answer and chose nothing, if there are any."""
    answered = ~np.isnan(out_of_fold[:, 0]) & chose_nothing
    if not answered.any():
        return []
    own, own_groups = subset(part, groups, answered)
    return [Measured("cross_validation", own, own_groups, out_of_fold[answered], rounds=rounds)]


def given(divided: Divided, learned_groups: Ints, head: Head, features: Features) -> list[Measured]:
    """Measures the test and the validation images as they came, but for copies of learned ones."""
    data, found = divided.data, []
    sets: Sequence[tuple[MeasuredOn, Part, Ints]] = (
        ("test", data.test, divided.test),
        ("validation", data.validation, divided.validation),
    )
    for name, part, groups in sets:
        own, own_groups = subset(part, groups, unlearned(groups, learned_groups))
        if len(own):
            answers = head.probabilities(features.all_of(own, f"{name} images"))
            found.append(Measured(name, own, own_groups, answers, len(part) - len(own)))
    return found


def tempered(head: Head, measured: Measured, logits: Doubles) -> tuple[Head, Measured]:
    """Fits the temperature to answers that chose nothing (Guo et al. 2017).

    `logits` [n, classes] are the head's at temperature 1. What is reported of an image comes
    with the temperature that the other folds' images gave; what serves has that of all.
    """
    part = measured.part
    # By groups alone: a temperature knows no classes, which may have one group each.
    fold = folds.deal(np.zeros_like(part.targets), measured.groups)
    dealt = np.unique(fold[fold >= 0])
    if len(dealt) < 2:
        return head, measured
    inverse, single = np.ones(len(part)), logits.astype(np.float32)
    for own in dealt:
        others = fold != own
        inverse[~others] = 1 / penalty.temperature_of(single[others], part.targets[others])
    # What no fold could hold out is told by all the others.
    if (left := fold < 0).any():
        inverse[left] = 1 / penalty.temperature_of(single[~left], part.targets[~left])
    whole = penalty.temperature_of(single, part.targets)
    answers = softmax(logits * inverse[:, None], axis=1)
    return replace(head, temperature=whole), replace(measured, probabilities=answers)


def is_calibrated(sets: Sequence[Measured]) -> tuple[bool, str]:
    """Tells whether the probabilities were shown to be right, and if not, why, for people."""
    own = [each for each in sets if each.measured_on != "source"]
    if not own:
        return False, (
            "nothing was measured on images that the version did not learn from: how right its "
            "probabilities are is not known"
        )
    told = [
        calibration.judge(each.probabilities, each.part.targets, each.groups)
        for each in sorted(own, key=lambda each: -len(each.part))
    ]
    # Right on some images and wrong on others is not right; else the most images tell.
    verdict, why = next((each for each in told if each[0] == "off"), told[0])
    return verdict == "not_shown", why


def copies(found: "Transferred") -> list[str]:
    """Says for people how many images came to be measured on, and are not, as copies of learned."""
    divided, told = found.divided, []
    data, learned = divided.data, found.learned_groups
    for name, part, groups in (
        ("test", data.test, divided.test),
        ("validation", data.validation, divided.validation),
    ):
        if dropped := len(part) - int(unlearned(groups, learned).sum()):
            told.append(
                f"{dropped} of {len(part)} {name} images are not measured on: a near copy of each "
                "is among the images that were learned from"
            )
    return told
