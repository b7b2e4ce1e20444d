"""A thousand classes: whether probabilities stay right where each class has few images."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.quality import frozen_job
from bench.quality.document import Section
from bench.quality.images import FRAMES, ImageSet
from bench.quality.measuring import Measuring, Sets
from trainer.arrays import Ints
from trainer.evaluate import cross_entropy

CLASSES = 1000
OFF = 0.03
"""Mean probability of the answer less accuracy, at most."""
_DIM = 256
_HELD_OUT = 4


@dataclass(frozen=True)
class Outcome:
    """The report of one head of many classes beside the truth."""

    name: str
    classes: int
    images: int
    reported: float
    accuracy: float
    probability: float
    """Mean of the answered class's, on held-out images."""
    reported_loss: float
    loss: float
    """Nats, on held-out images."""


def made(classes: int, per_class: int, spread: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Makes classes in feature space, Gaussian around Gaussian means; to learn from, held out.

    `spread` is the standard deviation of an image about its class's mean, in those of the means.
    """
    rng = np.random.default_rng([seed, classes])
    means = rng.normal(0, 1, (classes, _DIM)).astype(np.float32)

    def some(count: int) -> ImageSet:
        targets = np.arange(classes).repeat(count)
        noise = rng.normal(0, spread, (len(targets), _DIM)).astype(np.float32)
        return ImageSet(
            f"made, spread {spread:g}",
            means[targets] + noise,
            targets,
            tuple(f"{k:04}" for k in range(classes)),
            rng.integers(0, 2**63, len(targets)).astype(np.uint64),
            np.arange(len(targets)),
        )

    return some(per_class), some(_HELD_OUT)


def of_scenes(filmed: Sequence[ImageSet], classes: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Takes each scene for a class of its own: real photographs, of which all but two frames are
    learned from. The job takes its frames for lone images, or all of a class would be one group.
    """
    rng = np.random.default_rng([seed, 7])
    chosen = rng.permutation(sum(map(len, filmed)) // FRAMES)[:classes]
    learned = rng.permutation(FRAMES)
    names = tuple(f"{k:04}" for k in range(len(chosen)))

    def some(frames: Ints) -> ImageSet:
        targets = np.arange(len(chosen)).repeat(len(frames))
        rows = (chosen[:, None] * FRAMES + frames).ravel()
        return ImageSet(
            "scenes of photographs",
            np.concatenate([s.features for s in filmed])[rows],
            targets,
            names,
            rng.integers(0, 2**63, len(rows)).astype(np.uint64),
            np.arange(len(rows)),
            {"crop": np.concatenate([s.seen("crop") for s in filmed])[rows]},
            filmed[0].blocks,
        )

    return some(learned[:-2]), some(learned[-2:])


def measure(train: ImageSet, held_out: ImageSet, seed: int) -> Outcome:
    """Runs one job and holds its reports against the held-out images."""
    job = frozen_job.run(train, seed, "lone")
    assert job.figure is not None
    served = job.probabilities(held_out)
    return Outcome(
        train.name,
        len(train.classes),
        len(train),
        job.figure.accuracy,
        float((served.argmax(axis=1) == held_out.targets).mean()),
        float(served.max(axis=1).mean()),
        job.figure.loss,
        cross_entropy(served, held_out.targets),
    )


def run(measuring: Measuring, _: argparse.Namespace) -> Section:
    """Measures made classes, close and far apart, and those of real photographs."""
    return section(measuring.all(_measured, [(4, 2.0), (10, 3.0), (4, 0.0)])[0])


def _measured(sets: Sets, per_class: int, spread: float) -> Outcome:
    if spread:
        return measure(*made(CLASSES, per_class, spread, 0), 0)
    return measure(*of_scenes(list(sets.filmed.values()), CLASSES, 0), 0)


def section(outcomes: Sequence[Outcome]) -> Section:
    """Writes them down."""
    found = Section("A thousand classes")
    found.say(
        "Made: Gaussian classes around Gaussian means in feature space, the same spread for all. "
        "Scenes: each real photograph is a class, and its frames are its images. *Sure*: the mean "
        "probability of the answer, which should be the accuracy. Losses in nats, reported ones "
        "out of fold."
    )
    found.table(
        ("classes", "of", "images", "accuracy", "reported", "sure", "loss", "reported loss"),
        [
            (
                str(o.classes), o.name, str(o.images), f"{100 * o.accuracy:.1f} %",
                f"{100 * o.reported:.1f} %", f"{100 * o.probability:.1f} %", f"{o.loss:.3f}",
                f"{o.reported_loss:.3f}",
            )
            for o in outcomes
        ],
    )  # fmt: skip
    off = max((abs(o.probability - o.accuracy) for o in outcomes), default=0.0)
    found.bound(
        f"sure to within {100 * OFF:.0f} points of the accuracy: {100 * off:.1f}", off <= OFF
    )
    return found
