"""Words for the images that a version was measured on."""

from collections.abc import Sequence

from service.domain import MeasuredOn
from trainer.measuring import Measured

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


def headline(measured: Sequence[Measured]) -> Measured | None:
    """Returns the set to go by; None where none is of images as the version is for."""
    return next((m for m in measured if m.measured_on != "source"), None)


def how(measured_on: MeasuredOn, count: int, rounds: int = 0) -> str:
    """Says on which images a figure was measured, for people who classify images.

    `rounds` are those of a cross-validation, 0 where the images were measured once.
    """
    held_out = f"in {rounds} rounds, each time on images that were held out"
    images = f"{count:,} images"
    return {
        "": "measured on no image",
        "cross_validation": f"measured on {images} {held_out}",
        "held_out": f"measured on {images} that were held out and not learned from",
        "validation": f"measured on {images} of val/, which were not learned from",
        "test": f"measured on {images} of test/, which were not learned from",
        "target": f"measured on {count:,} labelled images of the target "
        + (held_out if rounds else "that it was not adapted to"),
        "source": f"measured on {count:,} images of the source {held_out}; it says little of the "
        "target",
    }[measured_on]
