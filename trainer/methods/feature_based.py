"""Feature-based transfer: the backbone stays frozen, a new linear head is fitted.

Features are computed once, by the very ONNX file and runtime that will serve. The head
learns from all images; what is told of it comes from cross-validation.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from service import faults
from service.inference.head import Floats, Head
from service.jobs.contract import Augmentation, EpochEnded, FeatureBased, Progressed
from trainer import crops, linear
from trainer.data import Ints, Part
from trainer.evaluate import cross_entropy
from trainer.features import Features
from trainer.records import Send

_SEARCH_PART = 0.9
"""Fraction of a fit's time that the search for the penalty takes, about."""


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A head, what it was fitted to, and how."""

    head: Head
    train: Floats
    """Features float32 [n, d] of the images, without augmented views."""
    out_of_fold: Floats | None
    """Probabilities [n, classes] of the images, see `linear.Fitted`."""
    method: FeatureBased
    hyperparameters: dict[str, float | int | str | bool | None]


def linear_probe(
    features: Floats,
    targets: Ints,
    folds: Ints,
    classes: tuple[str, ...],
    seed: int,
    threads: int = 0,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Head:
    """Fits a head to the last layer's features float32 [n, d], as `linear.fit`."""
    fitted = linear.fit(
        features, targets, len(classes), None, seed, on_progress, threads=threads, folds=folds
    )
    weight, bias = fitted.weight.astype(np.float32), fitted.bias.astype(np.float32)
    return Head(weight, bias, classes, temperature=fitted.temperature)


def fit_head(
    method: FeatureBased,
    part: Part,
    folds: Ints,
    classes: tuple[str, ...],
    features: Features,
    seed: int,
    send: Send,
    threads: int = 0,
    augmentation: Augmentation | None = None,
) -> FittedHead:
    """Fits a head to images, each in one of the folds [n] or in none (-1).

    Sends one epoch: the fit sees every image once, through its features.
    """
    train = features.of(part, "training images")
    views = None
    if method.augmented_views:
        drawn = crops.views(augmentation, crops.CLASSIC_SCALE)
        views = features.of_views(part, method.augmented_views, seed, drawn)
    targets = part.targets
    faults.reach("trainer.training")
    send(Progressed("training", 0.0, "cross-validating the head's penalty"))
    fitted = linear.fit(
        train,
        targets,
        len(classes),
        method.l2,
        seed,
        # The head itself is fitted after the penalty was chosen.
        lambda done: send(
            Progressed("training", _SEARCH_PART * done, "cross-validating the head's penalty")
        ),
        views=views,
        threads=threads,
        folds=folds,
    )
    head = Head(
        weight=fitted.weight.astype(np.float32),
        bias=fitted.bias.astype(np.float32),
        classes=classes,
        temperature=fitted.temperature,
    )
    send(Progressed("training", 1.0, "the head is fitted"))
    learned = head.probabilities(train)
    answered, loss, accuracy = fitted.out_of_fold, None, None
    if answered is not None and (known := ~np.isnan(answered[:, 0])).any():
        loss = cross_entropy(answered[known], targets[known])
        accuracy = float((answered[known].argmax(axis=1) == targets[known]).mean())
    send(
        EpochEnded(
            epoch=1,
            epochs=1,
            train_loss=cross_entropy(learned, targets),
            train_accuracy=float((learned.argmax(axis=1) == targets).mean()),
            validation_loss=loss,
            validation_accuracy=accuracy,
            images_per_second=features.images_per_second,
            eta_s=0.0,
            learning_rate=0.0,
        )
    )
    used: dict[str, float | int | str | bool | None] = {
        "l2": fitted.l2,
        "l2_chosen_by": "request" if method.l2 is not None else "cross-validation",
        "standardised": fitted.is_standardised,
        "cross_validated_loss": fitted.cross_validated_loss,
    }
    if method.augmented_views:
        used |= {"augmented_views": method.augmented_views, **asdict(drawn)}
    return FittedHead(head, train, fitted.out_of_fold, method, used)
