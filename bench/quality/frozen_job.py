"""A job on frozen features, from features to head and reported figures, as the trainer does it."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from bench.quality.images import BACKBONE, ImageSet
from service.contract import FeatureBased, ImageSource, JobSpec
from service.domain import Figure, Framing
from service.ingest.packs import Location
from trainer import backbones, evaluate, folds, framing, groups
from trainer.arrays import Doubles, Floats, Ints
from trainer.data import Files, Part
from trainer.features import Features
from trainer.job import Job
from trainer.methods import feature_based
from trainer.methods.feature_based import Choice, FittedHead
from trainer.reporting import calibration

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


@dataclass(frozen=True)
class _Kept:
    """Stands in for `trainer.features.Features`: those of a set, all of its images at once."""

    images: ImageSet
    images_per_second: float = 0.0

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.images.blocks or (self.images.features.shape[1],)

    def all_of(self, files: Files, _: str = "", __: Sequence[Framing] = ()) -> Floats:
        return self.images.seen(files.decoding.framing)[[int(d, 16) for d in files.digests]]


def fit(images: ImageSet, dealt: Ints, seed: int) -> FittedHead:
    """Fits the head that a feature-based job serves, by folds `dealt`: the only place that does."""
    spec = JobSpec(
        job_id="quality",
        model="quality",
        data=ImageSource(folder=""),
        out_dir="",
        method=FeatureBased(),
        backbone=BACKBONE,
        weights_dir="",
        provider="cpu",
    )
    job = Job(spec, lambda _: None)
    digests = tuple(f"{place:x}" for place in range(len(images)))
    features = cast(Features, _Kept(images))
    part = Part(
        tuple(Location(Path(digest)) for digest in digests),
        digests,
        images.targets,
        looks=tuple(f"{look:x}" for look in images.looks.tolist()),
        aspects=tuple(images.aspects.tolist()),
    )
    further = tuple[Framing, ...]()
    if framing.is_open(spec, part):
        compared = framing.compare(part, features, threads=1)
        if compared is not None:
            part = part.framed(compared.best)
        if compared is None or not compared.is_sure(digests, dealt):
            further = framing.BOTH
    return feature_based.fit_head(
        FeatureBased(),
        part,
        dealt,
        images.classes,
        features,
        seed,
        job.send,
        threads=1,
        choice=Choice(further, sureness=_sureness),
    )


def _sureness(features: Floats) -> float | None:
    top = backbones.classifier(BACKBONE, "", Path())
    return None if top is None else top.sureness(features)


@dataclass(frozen=True, eq=False)
class FrozenJob:
    """A head, and what its job reports."""

    fitted: FittedHead
    groups: Ints
    """[n], as the job found them."""
    figure: Figure | None
    """By cross-validation; None where nothing could be measured."""
    is_calibrated: bool
    cost: Cost
    """Of the fit, without features and groups."""

    def probabilities(self, images: ImageSet) -> Doubles:
        """Returns what is served for images, float64 [n, classes]."""
        seen = images.seen(self.fitted.framing)
        served: Doubles = self.fitted.head.probabilities(seen).astype(np.float64)
        return served


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
    fitted = fit(images, dealt, seed)
    cost = stopwatch.cost()
    figure, is_calibrated = None, False
    if fitted.out_of_fold is not None:
        there = ~np.isnan(fitted.out_of_fold[:, 0])
        answered = fitted.out_of_fold[there], targets[there], of[there]
        figure = evaluate.figure("cross_validation", *answered, rounds=len(np.unique(dealt)))
        is_calibrated = calibration.judge(*answered)[0] == "not_shown"
    return FrozenJob(fitted, of, figure, is_calibrated, cost)
