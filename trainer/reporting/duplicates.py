"""Images that are nearly the same, by their features; exact copies are `trainer.data`'s.

Resaved, rescaled or slightly cropped copies, and frames of one scene. Between training
and validation they overstate accuracy; between two classes at least one is wrong. That
two images are alike says so only where unrelated images of the same data are not.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

ALIKE = 0.85
"""Cosine of centred features. Resaved, halved, flipped and 10 % cropped copies of photos
have 0.75 to 0.99 on efficientnet_lite0, unrelated photos of the same insects up to 0.68."""
APART = 0.15
"""A class is unclear where a quarter of its pairs comes so close to `ALIKE`, above 0.7: copies
would not stand out. Photos of things have 0.17 to 0.5 there, drawn textures and forests from
above 0.75 to 0.9. Where half of all images have so near an image of another class, no class is."""
MAX_TRAIN = 10_000
"""Of so many training images, spread evenly, twins are sought: 1 s of one core a thousand
validation images."""
_BLOCK = 1024
_PAIRED = 300
"""Images of a class whose pairs are looked at, and of all classes across them."""


@dataclass(frozen=True)
class Twins:
    """Two images, the second always of the training part."""

    place: int
    train_place: int
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    """The nearest first; of each image its nearest twin alone."""

    across_parts: list[Twins]
    """A validation image and its twin."""
    across_classes: list[Twins]
    """Two training images under different classes."""
    unclear: tuple[int, ...] = ()
    """Classes whose images all look alike to the backbone: no pair of theirs is listed."""
    is_conclusive: bool = True
    """False where that is every class; the lists are empty then."""


def find(train: Floats, targets: Ints, validation: Floats, alike: float = ALIKE) -> NearDuplicates:
    """Finds twins by features [n, d] with classes [n], and [m, d]."""
    kept = np.arange(len(train))
    if len(train) > MAX_TRAIN:
        kept = np.linspace(0, len(train) - 1, MAX_TRAIN).astype(np.int64)
    mean = train.mean(axis=0)
    own, asked = _unit(train[kept] - mean), _unit(validation - mean)
    classes = targets[kept]
    unclear = _unclear(own, classes, alike - APART)
    if len(unclear) == len(np.unique(classes)):
        return NearDuplicates([], [], tuple(unclear), is_conclusive=False)
    is_clear = ~np.isin(classes, unclear)
    across_parts = []
    for start in range(0, len(asked), _BLOCK):
        similarity = asked[start : start + _BLOCK] @ own.T
        nearest = similarity.argmax(axis=1)
        best = similarity[np.arange(len(nearest)), nearest]
        across_parts += [
            Twins(start + int(i), int(kept[nearest[i]]), float(best[i]))
            for i in np.flatnonzero((best >= alike) & is_clear[nearest])
        ]
    across_classes = []
    for start in range(0, len(own), _BLOCK):
        # The rows before have been held against these already.
        similarity = own[start : start + _BLOCK] @ own[start:].T
        rows = slice(start, start + len(similarity))
        similarity[classes[rows][:, None] == classes[start:]] = -1
        similarity[np.tril_indices(len(similarity))] = -1
        nearest = similarity.argmax(axis=1)
        best = similarity[np.arange(len(nearest)), nearest]
        is_told = (best >= alike) & is_clear[rows] & is_clear[start + nearest]
        across_classes += [
            Twins(int(kept[start + i]), int(kept[start + nearest[i]]), float(best[i]))
            for i in np.flatnonzero(is_told)
        ]
    return NearDuplicates(
        _nearest_first(across_parts), _nearest_first(across_classes), tuple(unclear)
    )


def _unclear(own: Singles, classes: Ints, unrelated: float) -> list[int]:
    """Returns classes whose unrelated images cannot be told apart, by unit features [n, d].

    Copies are few among all pairs of a class, however many images have one.
    """
    every: list[int] = np.unique(classes).tolist()
    if len(every) > 1 and _nearest_of_another(own, classes) >= unrelated:
        return every
    unclear = []
    for label in every:
        places = np.flatnonzero(classes == label)
        rows = own[_some(places)]
        pairs = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
        if len(pairs) and np.quantile(pairs, 0.75) >= unrelated:
            unclear.append(label)
    return unclear


def _nearest_of_another(own: Singles, classes: Ints) -> float:
    """Returns the median, over some images, of the similarity to the nearest of another class."""
    some = _some(np.arange(len(own)))
    similarity = own[some] @ own.T
    similarity[classes[some][:, None] == classes] = -1
    return float(np.median(similarity.max(axis=1)))


def _some(places: Ints) -> Ints:
    if len(places) <= _PAIRED:
        return places
    return places[np.linspace(0, len(places) - 1, _PAIRED).astype(np.int64)]


def _unit(features: Floats) -> Singles:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: Singles = (features / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit


def _nearest_first(found: list[Twins]) -> list[Twins]:
    return sorted(found, key=lambda twins: -twins.similarity)
