"""Perceptual hashes of images: how far two differ, and classes that show hardly more than a scene.

Of a class that is one film every pair is related, so that none stands out among its pairs. What
tells is the layout: in photos it has nothing to do with the class, and two of a class differ in
as many bits as two of different classes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from trainer.arrays import Bools, Floats, Ints, Looks, Singles

_ONE = 0.6
"""Of the bits by which images of different classes differ, what half of a class's pairs may come
to where it is a scene. Frames have 0.1 to 0.6, classes of photos, drawings and tiles 0.67 to 1."""
_FREE = 22.0
"""Bits by which images of different classes must differ: below, all have much the same layout, as
digits have, and a class may well have one of its own."""
_SAME_BITS = 10
"""Unrelated photos differ in 32, and hardly ever in fewer than 16."""
_SAME_COSINE = 0.8
"""Of features without their mean: resaved, scaled and cropped copies of photos have 0.8 to 0.98."""
_BLOCK = 1024
_LEAST = 8
_SAMPLED = 400
_LARGEST = 3000


def bits(first: Looks, second: Looks) -> Singles:
    """Returns in how many bits hashes [n] and [m] differ, float32 [n, m]."""
    differing: Singles = np.bitwise_count(first[:, None] ^ second).astype(np.float32)
    return differing


def copied(features: Floats, looks: Looks, known_features: Floats, known_looks: Looks) -> Bools:
    """Marks images [m] of which another set [n] has a copy beyond doubt: in hash and features.

    For sets of which no image is the frame of another's: resaved, scaled and slightly cropped
    copies are found, and no more.
    """
    mean = known_features.mean(axis=0)
    own, known = (unit(rows - mean) for rows in (features, known_features))
    marked = np.zeros(len(looks), np.bool_)
    for start in range(0, len(looks), _BLOCK):
        rows = slice(start, start + _BLOCK)
        is_copy = bits(looks[rows], known_looks) <= _SAME_BITS
        is_copy &= own[rows] @ known.T >= _SAME_COSINE
        marked[rows] = is_copy.any(axis=1)
    return marked


def unit(features: Floats) -> Floats:
    """Scales features [n, d] to length one."""
    scaled: Floats = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return scaled


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
