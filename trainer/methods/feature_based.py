"""Feature-based transfer: the backbone stays frozen, a new linear head is fitted.

Features are computed once, by the very ONNX file and runtime that will serve. The head
learns from all images; what is told of it comes from cross-validation. That also chooses
what the head sees: the last layer's features alone or those of middle layers beside them
(Evci et al. 2022, "Head2Toe"; here with block weights in place of a group lasso), and the
middle of an image or all of it. Whatever it chooses is one linear head on raw features.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from service.contract import Augmentation, EpochEnded, FeatureBased, Progressed
from service.domain import Framing
from service.engine.head import Floats, Head
from service.ops import failpoints
from trainer import crops, linear
from trainer.arrays import Ints
from trainer.crops import Views
from trainer.data import Part
from trainer.evaluate import cross_entropy
from trainer.features import Features
from trainer.linear import Candidate
from trainer.records import Send

BLOCK_WEIGHTS = (0.3, 1.0)
"""Of a middle layer's features over the last layer's, squared, as the penalty sees them."""
FEW = 10
"""Images a class, on average: of fewer a cross-validation may prefer middle layers by chance."""
SURE = 0.45
"""There, middle layers are left out where the pretrained classifier's highest probability is
above this on average: what it was pretrained on looks like these images."""
_SEARCH_PART = 0.9
"""Fraction of a fit's time that the search for the penalty takes, about."""


@dataclass(frozen=True)
class Choice:
    """What a head may see beside the last layer's features of the images as they are framed."""

    framings: tuple[Framing, ...] = ()
    """Further ones, to compare with that of the images."""
    has_taps: bool = True
    """Whether middle layers may be chosen."""
    sureness: Callable[[Floats], float | None] = lambda _: None
    """From last-layer features [n, d] to the mean of the pretrained classifier's highest
    probability; None where there is no such classifier."""


LAST_LAYER = Choice(has_taps=False)


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A head, what it was fitted to, and how."""

    head: Head
    train: Floats
    """Last-layer features float32 [n, d] of the images, without augmented views."""
    out_of_fold: Floats | None
    """Probabilities [n, classes] of the images, see `linear.Fitted`."""
    method: FeatureBased
    choice: Choice
    framing: Framing
    """Of the images, which the head is for."""
    hyperparameters: dict[str, float | int | str | bool | None]


def linear_probe(
    features: Floats,
    targets: Ints,
    folds: Ints | None,
    classes: tuple[str, ...],
    seed: int,
    threads: int = 0,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Head:
    """Fits a head to the last layer's features float32 [n, d], as `linear.fit`."""
    fitted = linear.fit(
        features, targets, len(classes), None, seed, on_progress, threads=threads, folds=folds
    )
    return as_head(fitted, classes)


def as_head(fitted: linear.Fitted, classes: tuple[str, ...]) -> Head:
    """Returns what was fitted, as it serves."""
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
    choice: Choice = LAST_LAYER,
    augmentation: Augmentation | None = None,
) -> FittedHead:
    """Fits a head to images, each in one of the folds [n] or in none (-1).

    Sends one epoch: the fit sees every image once, through its features.
    """
    drawn = crops.views(augmentation, crops.CLASSIC_SCALE)
    targets = part.targets
    framings = [part.decoding.framing]
    if method.l2 is None:
        # The middle first, which is taken where all of the images tell no more.
        framings = sorted({*framings, *choice.framings})
    rows = [_rows(method, part.framed(framing), features, seed, drawn) for framing in framings]
    width, seen = features.blocks[0], list[_Seen]()
    for framing, own in zip(framings, rows, strict=True):
        taps: Sequence[float] = BLOCK_WEIGHTS if choice.has_taps and own.shape[1] > width else ()
        if taps and len(targets) < FEW * len(classes):
            sureness = choice.sureness(own[: len(targets), :width])
            taps = () if sureness is None or sureness > SURE else taps
        seen += _seen(framing, own, len(targets), features.blocks, taps)
    failpoints.reach("trainer.training")
    send(Progressed("training", 0.0, "cross-validating the head's penalty"))
    fitted = linear.fit_best(
        [each.candidate for each in seen],
        targets,
        len(classes),
        method.l2,
        seed,
        # The head itself is fitted after the penalty was chosen.
        lambda done: send(
            Progressed("training", _SEARCH_PART * done, "cross-validating the head's penalty")
        ),
        threads=threads,
        folds=folds,
    )
    chosen = seen[fitted.chosen]
    head = as_head(fitted, classes)
    send(Progressed("training", 1.0, "the head is fitted"))
    train = chosen.candidate.rows[: len(targets)]
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
        "features": "last layer" if chosen.block_weight is None else "last and middle layers",
        "block_weight": chosen.block_weight,
        "standardised": chosen.candidate.divisor is not None,
        "framing": chosen.framing,
        "cross_validated_loss": fitted.cross_validated_loss,
    }
    if method.augmented_views:
        used |= {"augmented_views": method.augmented_views, **asdict(drawn)}
    return FittedHead(
        head, train[:, :width], fitted.out_of_fold, method, choice, chosen.framing, used
    )


@dataclass(frozen=True, eq=False)
class _Seen:
    candidate: Candidate
    framing: Framing
    block_weight: float | None = None


def _seen(
    framing: Framing,
    rows: Floats,
    images: int,
    blocks: Sequence[int],
    taps: Sequence[float],
) -> list[_Seen]:
    """Lists what a head may see of rows [n, d], the first of which are the images themselves.

    The simplest comes first: the last layer's features, then each over its deviation, then
    those of middle layers beside them. `blocks` are how many features each layer has.
    """
    last = rows[:, : blocks[0]]
    deviation = linear.deviation(last[:images])
    found = [
        _Seen(Candidate(f"last layer, {framing}", last), framing),
        _Seen(Candidate(f"last layer, scaled, {framing}", last, deviation), framing),
    ]
    if taps:
        layers = np.split(rows[:images], np.cumsum(blocks)[:-1], axis=1)[1:]
        middle = np.concatenate([linear.deviation(layer) for layer in layers])
        for weight in taps:
            divisor = np.concatenate([deviation, middle / np.sqrt(weight)])
            name = f"last and middle layers, {weight:g}, {framing}"
            found.append(_Seen(Candidate(name, rows, divisor), framing, weight))
    return found


def _rows(method: FeatureBased, part: Part, features: Features, seed: int, drawn: Views) -> Floats:
    """Returns all features of the images, then those of each augmented view of them."""
    own = features.all_of(part, "training images")
    if not method.augmented_views:
        return own
    return np.concatenate([own, *features.of_views(part, method.augmented_views, seed, drawn)])
