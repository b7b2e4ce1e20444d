"""Perceptual hashes of images: how far two differ, and classes that show hardly more than a scene.

Of a class that is one film every pair is related, so that none stands out among its pairs. What
tells is the layout: in photos it has nothing to do with the class, and two of a class differ in
as many bits as two of different classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

Looks = npt.NDArray[np.uint64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_ONE = 0.6
"""Of the bits by which images of different classes differ, what half of a class's pairs may come
to where it is a scene. Frames have 0.1 to 0.6, classes of photos, drawings and tiles 0.67 to 1."""
_FREE = 22.0
"""Bits by which images of different classes must differ: below, all have much the same layout, as
digits have, and a class may well have one of its own."""
_LEAST = 8
_SAMPLED = 400
_LARGEST = 3000


def bits(first: Looks, second: Looks) -> Singles:
    """Returns in how many bits hashes [n] and [m] differ, float32 [n, m]."""
    differing: Singles = np.bitwise_count(first[:, None] ^ second).astype(np.float32)
    return differing


def scenes(looks: Looks, classes: Sequence[Ints]) -> Iterator[Ints]:
    """Finds images of one scene in classes that are hardly more; yields their places.

    `looks` are hashes [n], `classes` the places of each class's images.
    """
    if len(classes) < 2:
        return
    per_class = max(2, _SAMPLED // len(classes))
    some = [spread(places, per_class) for places in classes]
    place, label = np.concatenate(some), np.repeat(np.arange(len(some)), [len(s) for s in some])
    across = bits(looks[place], looks[place])[label[:, None] != label]
    if (usual := float(np.median(across))) < _FREE:
        return
    for places in classes:
        if not _LEAST <= len(places) <= _LARGEST:
            continue
        sample = looks[spread(places, _SAMPLED)]
        pairs = bits(sample, sample)[np.triu_indices(len(sample), 1)]
        if np.median(pairs) > _ONE * usual:
            continue
        distances = squareform(bits(looks[places], looks[places]), checks=False)
        labels = fcluster(linkage(distances, "average"), _ONE * usual, "distance")
        for own in np.unique(labels):
            members = places[labels == own]
            if len(members) > 1:
                yield members


def spread(places: Ints, most: int) -> Ints:
    """Returns so many of the places at most, evenly."""
    if len(places) <= most:
        return places
    return places[np.linspace(0, len(places) - 1, most).astype(np.int64)]
