"""Ready-made hyperparameters of training a network on, and what they make of one.

What a request names wins. All of them follow from the request, the number of images and the
device, so that the same job comes out the same on a busy machine; but on a GPU the batch size is
measured, within bounds that follow from these. Imports torch only where it is given a network.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from service.contract import DomainAdaptation, ModelBased
from trainer.crops import CLASSIC_SCALE, GENTLE_SCALE

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from trainer.backbones import Backbone

# Passes over the data are cheap to ask for and dear to wait for: on two cores an
# epoch of 250 images takes some ten seconds through all layers, two through the last stages.
_TUNING_EPOCHS = 12
_WHOLE_EPOCHS = 10
_ADAPTATION_EPOCHS = 5
_RATE_IS_FOR_BATCH = 16
_BATCH_SIZES = ((1_000, 16), (10_000, 32), (100_000, 64), (1_000_000, 128))
"""Below so many images, so many in a batch: an epoch of few must keep some steps, and more
images pay for the steadier steps of larger batches."""
_LARGEST_BATCH = 256
_LARGEST_ON_CPU = 64
"""Larger ones only fill a GPU."""
_LARGEST_ON_GPU = 512
_LEAST_STEPS = 100
"""Of an epoch on a GPU in batches that are larger than they need be."""
VIEWS = 6
"""Of an image, where maps are kept: each costs a pass through the frozen stages, once."""
LEAST_BATCH = 2
"""BatchNorm learns nothing from one image."""
_STEP_EPOCHS, _STEP_FACTOR = 7, 0.1
_OBJECTIVE_RATE = 3.0
"""Of an objective's own parameters over the head's: they start from nothing."""
_ADAM_SQUARES = 0.999


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Holds everything that training decides by."""

    recipe: str
    optimizer: str = "adamw"
    """`adamw` (Loshchilov and Hutter 2019) or `sgd`."""
    epochs: int
    batch_size: int | None = None
    """None goes by the number of images, see `batch_sizes_for`."""
    learning_rate: float | None = None
    """The head's, the highest; None goes by the batch size, see `rate_for`."""
    body_lr_factor: float = 1.0
    """The last stage's rate over the head's."""
    stem_lr_factor: float = 1.0
    """The first stage's rate over the last one's; those between go evenly from one to the other."""
    momentum: float = 0.9
    """SGD's, or how much Adam's mean of the gradients keeps at a step."""
    weight_decay: float = 0.02
    """Of matrices alone."""
    label_smoothing: float = 0.1
    schedule: str = "cosine"
    """`cosine` after one warm-up epoch, or `step`: a tenth every 7 epochs."""
    train_from_stage: str = ""
    keeps_maps: bool = False
    """The stages before `train_from_stage` compute a few views of each image once, and what they
    give is learned from; else random views go through all stages in each epoch."""
    batch_norm: str = "scaled"
    """`learned`, `scaled` (its statistics stay as they are, scale and shift are trained) or
    `frozen`."""
    start_from_linear_probe: bool = True
    """Begin with a head that was fitted to frozen features (Kumar et al. 2022)."""
    ema_epochs: float = 2.0
    """Epochs that the moving average of the weights reaches back; 0 has none."""
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`, or `auto` for the fastest: it should not change the outcome."""
    min_scale: float = GENTLE_SCALE
    """Least part of an image's area in a random view, unless the request says."""


_CLASSIC = Settings(
    recipe="classic",
    optimizer="sgd",
    epochs=25,
    batch_size=4,
    learning_rate=0.001,
    weight_decay=0.0,
    label_smoothing=0.0,
    schedule="step",
    batch_norm="learned",
    start_from_linear_probe=False,
    ema_epochs=0.0,
    precision="fp32",
    min_scale=CLASSIC_SCALE,
)
# Label smoothing is not for calibration, which a temperature is fitted for: few images would
# drive the logits apart without it, further than one temperature can fix, and those of a
# frozen head that they are averaged with would drown. The BatchNorm statistics of a few
# hundred images are worse than ImageNet's.
_TUNING = Settings(recipe="auto", epochs=_TUNING_EPOCHS, body_lr_factor=0.3, keeps_maps=True)
_WHOLE = Settings(
    recipe="auto",
    epochs=_WHOLE_EPOCHS,
    body_lr_factor=0.3,
    # What early stages see is common to all images.
    stem_lr_factor=0.1,
)
_FROM_SCRATCH = replace(
    _WHOLE,
    body_lr_factor=1.0,
    stem_lr_factor=1.0,
    # Random weights come with no statistics, and know nothing yet.
    batch_norm="learned",
    start_from_linear_probe=False,
    min_scale=CLASSIC_SCALE,
)


def settings(method: ModelBased, *, is_pretrained: bool = True, kept_from: str = "") -> Settings:
    """Returns the recipe, with what the request says in its place.

    `kept_from` is the stage before which the maps of the recipe `auto` are kept; "" learns
    from images.
    """
    if method.recipe == "classic":
        recipe = _CLASSIC
    elif not is_pretrained:
        recipe = _FROM_SCRATCH
    elif kept_from:
        recipe = replace(_TUNING, train_from_stage=kept_from)
    else:
        recipe = _WHOLE
    asked = {
        name: value
        for name in ModelBased.__struct_fields__
        if name in Settings.__dataclass_fields__
        and name != "recipe"
        and (value := getattr(method, name)) not in (None, "", "auto")
    }
    if method.freeze_batch_norm is not None:
        asked["batch_norm"] = "frozen" if method.freeze_batch_norm else "learned"
    return replace(recipe, **asked)


def adaptation_settings(method: DomainAdaptation, *, is_pretrained: bool) -> Settings:
    """Returns those of domain adaptation: all layers by SGD, as the techniques were measured."""
    recipe = replace(
        _WHOLE if is_pretrained else _FROM_SCRATCH,
        optimizer="sgd",
        epochs=method.epochs or _ADAPTATION_EPOCHS,
        batch_size=method.batch_size,
        learning_rate=method.learning_rate,
        body_lr_factor=1.0,
        weight_decay=1e-4,
        ema_epochs=1.0,
        min_scale=CLASSIC_SCALE,
    )
    return replace(recipe, batch_norm="frozen") if is_pretrained else recipe


def batch_size_for(images: int, device: str) -> int:
    """Returns how many images a batch has where none is asked for."""
    size = next((size for below, size in _BATCH_SIZES if images < below), _LARGEST_BATCH)
    return min(size, _LARGEST_ON_CPU) if device == "cpu" else size


def batch_sizes_for(images: int, device: str) -> list[int]:
    """Lists the sizes from which the fastest is chosen where none is asked for, rising."""
    sizes = [batch_size_for(images, device)]
    most = 0 if device == "cpu" else min(_LARGEST_ON_GPU, images // _LEAST_STEPS)
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


def rate_for(recipe: Settings, batch_size: int) -> float:
    """Returns the head's highest learning rate: the recipe's, or by the root of the batch size.

    The noise of a step falls with the root of what it averages (Krizhevsky 2014).
    """
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    is_slow = recipe.start_from_linear_probe or recipe.optimizer == "adamw"
    return (0.001 if is_slow else 0.01) * math.sqrt(batch_size / _RATE_IS_FOR_BATCH)


def part_of_rate(recipe: Settings, epochs_done: float, epochs: int) -> float:
    """Returns the part of the highest learning rate that the schedule leaves, 0 to 1."""
    if recipe.schedule == "step":
        return _STEP_FACTOR ** (int(epochs_done) // _STEP_EPOCHS)
    warm_up = min(1.0, epochs / 5)
    if epochs_done < warm_up:
        return 0.1 + 0.9 * epochs_done / warm_up
    left = (epochs_done - warm_up) / max(epochs - warm_up, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))


def freeze(backbone: "Backbone", recipe: Settings) -> "list[nn.Module]":
    """Switches gradients off; returns the modules that stay in evaluation mode."""
    from torch import nn

    frozen: list[nn.Module] = []
    if recipe.train_from_stage:
        frozen += backbone.frozen_modules(recipe.train_from_stage)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in frozen + (norms if recipe.batch_norm == "frozen" else []):
        module.requires_grad_(False)
    return frozen + (norms if recipe.batch_norm != "learned" else [])


def optimizer(
    backbone: "Backbone", classifier: "nn.Module", objective: "nn.Module", recipe: Settings
) -> "Optimizer":
    """Makes the optimiser; `factor` of each of its groups is of the group's rate over the head's.

    Early stages move least (Howard and Ruder 2018, discriminative fine-tuning); the penalty is
    for what multiplies, not for biases and scales. Rates are the training's to set.
    """
    from torch.optim import SGD, AdamW

    between = max(1, len(backbone.stages) - 1)
    rated: list[tuple[float, list[nn.Module]]] = [
        (recipe.body_lr_factor * recipe.stem_lr_factor ** (1 - i / between), modules)
        for i, modules in enumerate(backbone.stages.values())
    ]
    rated += [(1.0, [classifier]), (_OBJECTIVE_RATE, [objective])]
    groups: list[dict[str, Any]] = []
    for factor, modules in rated:
        moving = [p for m in modules for p in m.parameters() if p.requires_grad]
        for is_weight in (True, False):
            own = [p for p in moving if (p.ndim > 1) == is_weight]
            if own:
                decay = recipe.weight_decay if is_weight else 0.0
                groups.append({"params": own, "weight_decay": decay, "factor": factor})
    if recipe.optimizer == "sgd":
        return SGD(groups, momentum=recipe.momentum, fused=True)
    return AdamW(groups, betas=(recipe.momentum, _ADAM_SQUARES), fused=True)
