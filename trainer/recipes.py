"""Ready-made hyperparameters of training a network on; what a request names wins.

All of them follow from the request, the number of images and the device, so that the
same job comes out the same on a busy machine. Never imports torch.
"""

import math
from dataclasses import dataclass

from service.jobs.contract import DomainAdaptation, ModelBased

# Passes over the data are cheap to ask for and dear to wait for: on two cores an
# epoch of 250 images takes some ten seconds.
_AUTO_EPOCHS = 10
_ADAPTATION_EPOCHS = 5
_RATE_IS_FOR_BATCH = 16
_BATCH_SIZES = ((100, 8), (1_000, 16), (10_000, 32), (100_000, 64), (1_000_000, 128))
"""Below so many images, so many in a batch: an epoch of few must keep some steps, and more
images pay for the steadier steps of larger batches."""
_LARGEST_BATCH = 256
_LARGEST_ON_CPU = 64
"""Larger ones only fill a GPU."""
LEAST_BATCH = 2
"""BatchNorm learns nothing from one image."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Holds everything that the training loop decides by."""

    recipe: str
    epochs: int
    batch_size: int | None
    """None goes by the number of images, see `batch_size_for`."""
    learning_rate: float | None
    """The head's, the highest; None goes by the batch size, see `rate_for`."""
    first_stage_rate: float
    """The first stage's rate over the head's; those between go evenly from one to the other."""
    momentum: float
    weight_decay: float
    label_smoothing: float
    schedule: str
    """`cosine` after one warm-up epoch, or `step`: a tenth every 7 epochs."""
    train_from_stage: str
    freeze_batch_norm: bool
    fitted_head: bool
    """Begin with the feature-based head instead of a random one (Kumar et al. 2022)."""
    averaged_epochs: float
    """Epochs that the moving average of the weights reaches back; 0 has none."""
    precision: str
    """`fp32`, `bf16`, `fp16`, or `auto` for the fastest: it should not change the outcome."""


def settings(method: ModelBased, is_pretrained: bool = True) -> Settings:
    """Returns the recipe, with what the request says in its place."""
    if method.recipe == "classic":
        recipe = Settings(
            recipe="classic",
            epochs=25,
            batch_size=4,
            learning_rate=0.001,
            first_stage_rate=1.0,
            momentum=0.9,
            weight_decay=0.0,
            label_smoothing=0.0,
            schedule="step",
            train_from_stage="",
            freeze_batch_norm=False,
            fitted_head=False,
            averaged_epochs=0.0,
            precision="fp32",
        )
    else:
        recipe = Settings(
            recipe="auto",
            epochs=_AUTO_EPOCHS,
            batch_size=None,
            learning_rate=None,
            # What early stages see is common to all images, unless they know nothing yet.
            first_stage_rate=0.1 if is_pretrained else 1.0,
            momentum=0.9,
            weight_decay=1e-4,
            # Not for calibration, which a temperature is fitted for: few images would drive the
            # logits apart without it, further than one temperature can mend, and those of a
            # frozen head that they are averaged with would drown.
            label_smoothing=0.1,
            schedule="cosine",
            train_from_stage="",
            # The statistics of a few hundred images are worse than ImageNet's;
            # random weights come with none.
            freeze_batch_norm=is_pretrained,
            fitted_head=is_pretrained,
            averaged_epochs=1.0,
            precision="auto",
        )

    def said(name: str) -> object:
        value = getattr(method, name)
        return getattr(recipe, name) if value in (None, "", "auto") else value

    names = [name for name in Settings.__dataclass_fields__ if hasattr(method, name)]
    values = {name: getattr(recipe, name) for name in Settings.__dataclass_fields__}
    values |= {name: said(name) for name in names if name != "recipe"}
    return Settings(**values)


def adaptation_settings(method: DomainAdaptation, is_pretrained: bool) -> Settings:
    """Returns those of domain adaptation: the modern recipe with fewer epochs."""
    like = ModelBased(
        epochs=method.epochs or _ADAPTATION_EPOCHS,
        batch_size=method.batch_size,
        learning_rate=method.learning_rate,
    )
    return settings(like, is_pretrained)


def batch_size_for(images: int, device: str) -> int:
    """Returns how many images a batch has where none is asked for."""
    size = next((size for below, size in _BATCH_SIZES if images < below), _LARGEST_BATCH)
    return min(size, _LARGEST_ON_CPU) if device == "cpu" else size


def rate_for(recipe: Settings, batch_size: int) -> float:
    """Returns the learning rate: the recipe's, or by the square root of the batch size.

    The noise of a step falls with the root of what it averages (Krizhevsky 2014).
    """
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    highest = 0.001 if recipe.fitted_head else 0.01
    return highest * math.sqrt(batch_size / _RATE_IS_FOR_BATCH)
