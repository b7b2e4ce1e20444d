"""A job on frozen features, from features to head and reported figures, as the trainer does it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.quality.images import ImageSet, Ints
from service.domain import Figure
from trainer import evaluate, folds, groups, linear
from trainer.reporting import calibration

Doubles = npt.NDArray[np.float64]
Grouping = Literal["found", "given", "lone"]


@dataclass(frozen=True, eq=False)
class FrozenJob:
    """A served head, and what its job reports."""

    weight: Doubles
    bias: Doubles
    temperature: float
    groups: Ints
    """[n], as the job found them."""
    figure: Figure | None
    """By cross-validation; None where nothing could be measured."""
    is_calibrated: bool

    def probabilities(self, images: ImageSet) -> Doubles:
        """Returns what is served for images, float64 [n, classes]."""
        logits = (images.features @ self.weight.T + self.bias) / self.temperature
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        served: Doubles = raised / raised.sum(axis=1, keepdims=True)
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
    fitted = linear.fit(
        images.features,
        targets,
        len(images.classes),
        None,
        seed,
        threads=1,
        folds=dealt,
    )
    figure, is_calibrated = None, False
    if fitted.out_of_fold is not None:
        there = ~np.isnan(fitted.out_of_fold[:, 0])
        answered = fitted.out_of_fold[there], targets[there], of[there]
        figure = evaluate.figure("cross_validation", *answered, rounds=len(np.unique(dealt)))
        is_calibrated = calibration.judge(*answered)[0] == "not_shown"
    return FrozenJob(fitted.weight, fitted.bias, fitted.temperature, of, figure, is_calibrated)
