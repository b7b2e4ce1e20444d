"""Images that are nearly the same, by their features; exact copies are `trainer.data`'s.

Resaved, rescaled or slightly cropped copies, and frames of one scene. Between training
and validation they overstate accuracy; between two classes at least one is wrong.
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
MAX_TRAIN = 10_000
"""Of so many training images, spread evenly, twins are sought: 1 s of one core a thousand
validation images."""
_BLOCK = 1024
_MANY = 0.5
"""Where more have a twin, the features cannot tell images apart."""


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
    is_conclusive: bool = True
    """False where most images look alike to the backbone; the lists are empty then."""


def find(train: Floats, targets: Ints, validation: Floats, alike: float = ALIKE) -> NearDuplicates:
    """From features [n, d] with classes [n], and [m, d]."""
    kept = np.arange(len(train))
    if len(train) > MAX_TRAIN:
        kept = np.linspace(0, len(train) - 1, MAX_TRAIN).astype(np.int64)
    mean = train.mean(axis=0)
    own, asked = _unit(train[kept] - mean), _unit(validation - mean)
    across_parts = []
    for start in range(0, len(asked), _BLOCK):
        similarity = asked[start : start + _BLOCK] @ own.T
        nearest = similarity.argmax(axis=1)
        best = similarity[np.arange(len(nearest)), nearest]
        across_parts += [
            Twins(start + int(i), int(kept[nearest[i]]), float(best[i]))
            for i in np.flatnonzero(best >= alike)
        ]
    across_classes = []
    for start in range(0, len(own), _BLOCK):
        # The rows before have been held against these already.
        similarity = own[start : start + _BLOCK] @ own[start:].T
        rows = kept[start : start + len(similarity)]
        similarity[targets[rows][:, None] == targets[kept[start:]]] = -1
        similarity[np.tril_indices(len(similarity))] = -1
        nearest = similarity.argmax(axis=1)
        best = similarity[np.arange(len(nearest)), nearest]
        across_classes += [
            Twins(int(rows[i]), int(kept[start + nearest[i]]), float(best[i]))
            for i in np.flatnonzero(best >= alike)
        ]
    if len(across_parts) > _MANY * len(asked) or len(across_classes) > _MANY * len(own):
        return NearDuplicates([], [], is_conclusive=False)
    return NearDuplicates(_nearest_first(across_parts), _nearest_first(across_classes))


def _unit(features: Floats) -> Singles:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit: Singles = (features / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit


def _nearest_first(found: list[Twins]) -> list[Twins]:
    return sorted(found, key=lambda twins: -twins.similarity)
