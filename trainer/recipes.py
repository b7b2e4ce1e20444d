"""Ready-made hyperparameters of model-based transfer; what a request names wins."""

from dataclasses import dataclass

from service.jobs.contract import ModelBased

# Passes over the data are cheap to ask for and dear to wait for: on two cores an
# epoch of 250 pictures takes half a minute.
_AUTO_EPOCHS = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the training loop decides by."""

    recipe: str
    epochs: int
    batch_size: int
    learning_rate: float
    """The highest; of the head and the network alike."""
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


def settings(method: ModelBased) -> Settings:
    """The recipe, with what the request says in its place."""
    if method.recipe == "classic":
        recipe = Settings(
            recipe="classic",
            epochs=25,
            batch_size=4,
            learning_rate=0.001,
            momentum=0.9,
            weight_decay=0.0,
            label_smoothing=0.0,
            schedule="step",
            train_from_stage="",
            freeze_batch_norm=False,
            early_stopping_patience=0,
            fitted_head=False,
        )
    else:
        recipe = Settings(
            recipe="auto",
            epochs=_AUTO_EPOCHS,
            batch_size=16,
            learning_rate=0.003,
            momentum=0.9,
            weight_decay=1e-4,
            label_smoothing=0.1,
            schedule="cosine",
            train_from_stage="",
            # The statistics of a few hundred pictures are worse than ImageNet's.
            freeze_batch_norm=True,
            early_stopping_patience=4,
            fitted_head=True,
        )

    def said(name: str) -> object:
        value = getattr(method, name)
        return getattr(recipe, name) if value is None or value == "" else value

    names = [name for name in Settings.__dataclass_fields__ if hasattr(method, name)]
    values = {name: getattr(recipe, name) for name in Settings.__dataclass_fields__}
    values |= {name: said(name) for name in names if name != "recipe"}
    return Settings(**values)
