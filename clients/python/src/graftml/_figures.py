"""How well a version does, and how its gate ended.

A part of `graftml.types`, which callers take these from.
"""

from dataclasses import dataclass
from typing import Literal

MeasuredOn = Literal[
    "", "cross_validation", "held_out", "validation", "test", "target", "source", "unknown"
]
"""The images that a figure is of, none of them learned from by what answered; "" where nothing
could be measured, "unknown" to a client that is too old."""
Verdict = Literal["passed", "failed", "undecided", "unknown"]

_PLACES: dict[str, tuple[str, str]] = {
    "cross_validation": ("by cross-validation over {} image", ""),
    "held_out": ("on {} held-out image", ""),
    "validation": ("on {} validation image", ""),
    "test": ("on {} test image", ""),
    "target": ("on {} image", " of the target"),
    "source": ("on {} image", " of the source"),
}
"""What stands before the plural's ending, and after it."""


def measured(
    accuracy: float | None,
    low: float | None,
    high: float | None,
    measured_on: MeasuredOn,
    images: int,
    groups: int,
) -> str:
    """Returns an accuracy in words: "0.912 [0.87 to 0.94] by cross-validation over 244 images".

    Groups of images that belong together are told where they are fewer: "in 6 groups".
    """
    if accuracy is None or low is None or high is None:
        return "nothing could be measured"
    before, after = _PLACES.get(measured_on, ("on {} image", ""))
    place = f"{before.format(images)}{_plural(images)}{after}"
    if 0 < groups < images:
        place += f" in {groups} group{_plural(groups)}"
    return f"{accuracy:.3f} [{low:.2f} to {high:.2f}] {place}"


def _plural(count: int) -> str:
    return "" if count == 1 else "s"


@dataclass(frozen=True)
class Figure:
    """How well a version classifies images that nothing was learned from or chosen by."""

    measured_on: MeasuredOn
    accuracy: float
    """Fraction of them that are classified correctly, 0 to 1."""
    accuracy_low: float
    """Of the 95 % interval, by groups of images that belong together."""
    accuracy_high: float
    log_loss: float
    """Mean cross-entropy, nats."""
    image_count: int
    group_count: int
    """Groups of images that belong together; a lone image is one."""

    def __str__(self) -> str:
        """Returns one line: "0.912 [0.87 to 0.94] by cross-validation over 244 images"."""
        return measured(
            self.accuracy,
            self.accuracy_low,
            self.accuracy_high,
            self.measured_on,
            self.image_count,
            self.group_count,
        )


@dataclass(frozen=True)
class VersionPublished:
    """The job's version is there and can be asked."""

    model: str
    version: int
    accuracy: float | None = None
    """Of the first of `Version.figures`; None where nothing could be measured."""
    accuracy_low: float | None = None
    """Of its 95 % interval."""
    accuracy_high: float | None = None
    measured_on: MeasuredOn = ""
    measured_count: int = 0
    """Images."""
    measured_group_count: int = 0
    """Groups of images that belong together; a lone image is one."""
    is_candidate: bool = False
    """Its gate did not let it pass: no alias points to it."""
    gate_failures: tuple[str, ...] = ()
    """What it did not reach, or of which that cannot be told, in words."""

    @property
    def measured(self) -> str:
        """Its accuracy in words."""
        return measured(
            self.accuracy,
            self.accuracy_low,
            self.accuracy_high,
            self.measured_on,
            self.measured_count,
            self.measured_group_count,
        )


@dataclass(frozen=True)
class GateCheck:
    """One condition of a gate, and how it ended."""

    name: str
    """"accuracy", "class_recall", "not_worse", "parity" or "latency"."""
    verdict: Verdict
    """"undecided" where it cannot be told: "not_worse" from too few images, "accuracy" and
    "class_recall" where no image could be measured on."""
    passed: bool
    """Whether it lets the version be published: also undecided, where the gate says so."""
    value: float | None
    """An accuracy, the least recall of a class, the lower end of the difference in accuracy to
    the version before, a difference of a probability, or milliseconds; None where nothing could
    be measured."""
    bound: float
    """In the same unit."""
    detail: str
    """In words."""
    images_needed: int = 0
    """About how many would settle it, where it is undecided; 0 where that is not known."""
