"""Ready-made hyperparameters of training a network on; what a request names wins."""

import math
from dataclasses import dataclass

from service.jobs.contract import DomainAdaptation, ModelBased

# Passes over the data are cheap to ask for and dear to wait for: on two cores an
# epoch of 250 images takes some ten seconds.
_AUTO_EPOCHS = 10
_ADAPTATION_EPOCHS = 5
_RATE_IS_FOR_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the training loop decides by."""

    recipe: str
    epochs: int
    batch_size: int | None
    """None has the fastest found by a probe."""
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
    early_stopping_patience: int
    fitted_head: bool
    """Begin with the feature-based head instead of a random one (Kumar et al. 2022)."""
    averaged_epochs: float
    """Epochs that the moving average of the weights reaches back; 0 has none."""


def settings(method: ModelBased, is_pretrained: bool = True) -> Settings:
    """The recipe, with what the request says in its place."""
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
            early_stopping_patience=0,
            fitted_head=False,
            averaged_epochs=0.0,
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
            label_smoothing=0.1,
            schedule="cosine",
            train_from_stage="",
            # The statistics of a few hundred images are worse than ImageNet's;
            # random weights come with none.
            freeze_batch_norm=is_pretrained,
            early_stopping_patience=4,
            fitted_head=is_pretrained,
            averaged_epochs=1.0,
        )

    def said(name: str) -> object:
        value = getattr(method, name)
        return getattr(recipe, name) if value is None or value == "" else value

    names = [name for name in Settings.__dataclass_fields__ if hasattr(method, name)]
    values = {name: getattr(recipe, name) for name in Settings.__dataclass_fields__}
    values |= {name: said(name) for name in names if name != "recipe"}
    return Settings(**values)


def adaptation_settings(method: DomainAdaptation, is_pretrained: bool) -> Settings:
    """Those of domain adaptation: the modern recipe, fewer epochs, no early stop.

    Without target labels there is nothing that could tell when to stop.
    """
    like = ModelBased(
        epochs=method.epochs or _ADAPTATION_EPOCHS,
        batch_size=method.batch_size,
        learning_rate=method.learning_rate,
        early_stopping_patience=0,
    )
    return settings(like, is_pretrained)


def rate_for(recipe: Settings, batch_size: int) -> float:
    """The learning rate: the recipe's, or by the square root of the batch size.

    The noise of a step falls with the root of what it averages (Krizhevsky 2014).
    """
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    highest = 0.003 if recipe.fitted_head else 0.01
    return highest * math.sqrt(batch_size / _RATE_IS_FOR_BATCH)
