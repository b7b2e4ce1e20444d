"""Feature-based transfer: the backbone stays frozen, a new linear head is fitted.

Features are computed once, by the very ONNX file and runtime that will serve.
"""

import time

import numpy as np

from service.inference.head import Floats, Head
from service.inference.preprocess import Pixels
from service.inference.runtime import Session
from service.jobs.contract import EpochEnded, FeatureBased, Progressed
from trainer import linear
from trainer.data import Data
from trainer.evaluate import cross_entropy
from trainer.records import Send

BATCH = 16


def features_of(session: Session, pixels: Pixels, send: Send, detail: str) -> Floats:
    """Features float32 [n, d] of pictures uint8 [n, 224, 224, 3], with progress."""
    parts = []
    for start in range(0, len(pixels), BATCH):
        parts.append(session.run(pixels[start : start + BATCH]))
        done = min(start + BATCH, len(pixels)) / len(pixels)
        send(Progressed("features", done, detail))
    return np.concatenate(parts)


def fit_head(
    method: FeatureBased, data: Data, session: Session, seed: int, send: Send
) -> tuple[Head, Floats, dict[str, float | int | str | bool | None]]:
    """Fits a head; returns it, the validation features, and the hyperparameters used.

    Sends one epoch: the fit sees every picture once, through its features.
    """
    started = time.monotonic()
    train = features_of(session, data.train.pixels, send, "training pictures")
    images_per_second = len(train) / (time.monotonic() - started)
    validation = features_of(session, data.validation.pixels, send, "validation pictures")
    targets = data.train.targets
    send(Progressed("training", 0.0, "cross-validating the head's penalty"))
    fitted = linear.fit(
        train,
        targets,
        len(data.classes),
        method.l2,
        seed,
        lambda done: send(Progressed("training", done, "cross-validating the head's penalty")),
    )
    head = Head(
        weight=fitted.weight.astype(np.float32),
        bias=fitted.bias.astype(np.float32),
        classes=data.classes,
        temperature=fitted.temperature,
    )
    learned = head.probabilities(train)
    measured = head.probabilities(validation)
    send(
        EpochEnded(
            epoch=1,
            epochs=1,
            train_loss=cross_entropy(learned, targets),
            train_accuracy=float((learned.argmax(axis=1) == targets).mean()),
            validation_loss=cross_entropy(measured, data.validation.targets),
            validation_accuracy=float((measured.argmax(axis=1) == data.validation.targets).mean()),
            images_per_second=images_per_second,
            eta_s=0.0,
            learning_rate=0.0,
        )
    )
    return (
        head,
        validation,
        {
            "l2": fitted.l2,
            "l2_chosen_by": "request" if method.l2 is not None else "cross-validation",
            "cross_validated_loss": fitted.cross_validated_loss,
        },
    )
