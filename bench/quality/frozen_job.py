"""A job on frozen features, from features to head and reported figures, as the trainer does it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.quality.images import Ints, ImageSet
from trainer import linear
from trainer.evaluate import wilson

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class FrozenJob:
    """A served head, and what its job reports."""

    weight: Doubles
    bias: Doubles
    temperature: float
    groups: Ints
    """[n], as the job found them."""
    accuracy: float
    """As reported."""
    low: float
    high: float
    loss: float
    is_calibrated: bool

    def probabilities(self, images: ImageSet) -> Doubles:
        """Returns what is served for images, float64 [n, classes]."""
        logits = (images.features @ self.weight.T + self.bias) / self.temperature
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        served: Doubles = raised / raised.sum(axis=1, keepdims=True)
        return served


def run(images: ImageSet, seed: int, *, is_grouped: bool = True) -> FrozenJob | None:
    """Runs a job on `images`; None where it could measure nothing.

    Without `is_grouped` each image is taken to stand alone, whatever it looks like.
    """
    fitted = linear.fit(images.features, images.targets, len(images.classes), None, seed, threads=1)
    if fitted.out_of_fold is None:
        return None
    right = fitted.out_of_fold.argmax(axis=1) == images.targets
    accuracy = float(right.mean())
    low, high = wilson(accuracy, len(right))
    return FrozenJob(
        fitted.weight,
        fitted.bias,
        fitted.temperature,
        np.arange(len(right)),
        accuracy,
        low,
        high,
        float(fitted.cross_validated_loss or np.nan),
        True,
    )
