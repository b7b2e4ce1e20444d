"""Images that a version was measured on: none of them was learned from by what answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from service.domain import MeasuredOn
from trainer.data import Part

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

NOUNS: dict[MeasuredOn, str] = {
    "": "images",
    "cross_validation": "training images",
    "held_out": "held-out images",
    "validation": "validation images",
    "test": "test images",
    "target": "labelled images of the target",
    "source": "images of the source",
}
"""Names the images of a set, for people."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Images with a version's answers to them."""

    measured_on: MeasuredOn
    part: Part
    """The images; the training images themselves where `measured_on` is `cross_validation`."""
    probabilities: Floats
    """[m, classes] as served; a row of NaN where the image could not be held out."""
    groups: Ints
    """[m] numbers of the groups of images that belong together."""
    rounds: int = 0
    """Of the cross-validation; 0 where it was none."""
    excluded: int = 0
    """Images left out beforehand: a near copy of each was learned from."""
    names: Mapping[Path, str] = field(default_factory=dict)
    """Names of images that the job's own data does not know, as those of a target."""

    @property
    def places(self) -> Ints:
        """Returns the places [n] of the images that have an answer."""
        answered: Ints = np.flatnonzero(np.isfinite(self.probabilities).all(axis=1))
        return answered

    @property
    def answers(self) -> tuple[Floats, Ints, Ints]:
        """Returns probabilities [n, classes], classes [n] and groups [n] at `places`."""
        places = self.places
        return self.probabilities[places], self.part.targets[places], self.groups[places]


def headline(measured: Sequence[Measured]) -> Measured | None:
    """Returns the set to go by; None where no image as the version is for has an answer."""
    of_use = (m for m in measured if m.measured_on != "source")
    return next((m for m in of_use if len(m.places)), None)


def how(measured_on: MeasuredOn, count: int, rounds: int = 0) -> str:
    """Says on which images a figure was measured, for people who classify images."""
    in_rounds = f"in {rounds} rounds" if rounds else "in rounds"
    held_out = f"{in_rounds}, each time on images that were held out"
    images = f"{count:,} images"
    return {
        "": "measured on no image",
        "cross_validation": f"measured on {images} {held_out}",
        "held_out": f"measured on {images} that were held out and not learned from",
        "validation": f"measured on the {images} of val/, which were not learned from",
        "test": f"measured on the {images} of test/, which were not learned from",
        "target": f"measured on {count:,} labelled images of the target {held_out}",
        "source": f"measured on {count:,} images of the source {held_out}; it says little of the "
        "target",
    }[measured_on]
