"""A job on frozen features, from features to head and reported figures, as the trainer does it."""

import resource
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.quality.images import ImageSet, Ints
from service.domain import Figure, Framing
from service.inference.head import Head
from trainer import evaluate, folds, groups, linear
from trainer.reporting import calibration

Doubles = npt.NDArray[np.float64]
Grouping = Literal["found", "given", "lone"]


@dataclass(frozen=True)
class Cost:
    """What something took."""

    seconds: float
    processor_s: float


class Stopwatch:
    """Measures from when it is made: all threads of the process, and its children that ended."""

    def __init__(self) -> None:
        self._began = self._now()

    def cost(self) -> Cost:
        """Returns what was taken until now."""
        now = self._now()
        return Cost(now.seconds - self._began.seconds, now.processor_s - self._began.processor_s)

    @staticmethod
    def _now() -> Cost:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor_s = time.process_time() + children.ru_utime + children.ru_stime
        return Cost(time.perf_counter(), processor_s)


@dataclass(frozen=True, eq=False)
class Served:
    """A head, and which framing of an image it takes."""

    head: Head
    framing: Framing
    out_of_fold: npt.NDArray[np.float32] | None
    """As of `linear.Fitted`."""

    def probabilities(self, images: ImageSet) -> Doubles:
        """Returns what is served for images, float64 [n, classes]."""
        served: Doubles = self.head.probabilities(images.seen(self.framing)).astype(np.float64)
        return served


def ours(images: ImageSet, dealt: Ints, seed: int) -> Served:
    """Fits the head that a feature-based job serves, by folds `dealt`: the only place that does."""
    fitted = linear.fit(
        images.features, images.targets, len(images.classes), None, seed, threads=1, folds=dealt
    )
    head = Head(fitted.weight, fitted.bias.astype(np.float32), images.classes, fitted.temperature)
    return Served(head, "crop", fitted.out_of_fold)


@dataclass(frozen=True, eq=False)
class FrozenJob:
    """A served head, and what its job reports."""

    served: Served
    groups: Ints
    """[n], as the job found them."""
    figure: Figure | None
    """By cross-validation; None where nothing could be measured."""
    is_calibrated: bool
    cost: Cost
    """Of the fit, without features and groups."""

    def probabilities(self, images: ImageSet) -> Doubles:
        """Returns what is served for images, float64 [n, classes]."""
        return self.served.probabilities(images)


def run(images: ImageSet, seed: int, grouping: Grouping = "found") -> FrozenJob:
    """Runs a job on `images`, whose groups are found, are the scenes, or are lone images."""
    targets = images.targets
    of = np.arange(len(images))
    if grouping != "lone":
        scenes = [f"scene {scene}" for scene in images.scenes]
        given = scenes if grouping == "given" else [""] * len(images)
        of = groups.find(images.features, images.looks, targets, given).of
    dealt = folds.deal(targets, of, np.random.default_rng(seed).random(len(images)))
    stopwatch = Stopwatch()
    served = ours(images, dealt, seed)
    cost = stopwatch.cost()
    figure, is_calibrated = None, False
    if served.out_of_fold is not None:
        there = ~np.isnan(served.out_of_fold[:, 0])
        answered = served.out_of_fold[there], targets[there], of[there]
        figure = evaluate.figure("cross_validation", *answered, rounds=len(np.unique(dealt)))
        is_calibrated = calibration.judge(*answered)[0] == "not_shown"
    return FrozenJob(served, of, figure, is_calibrated, cost)
