"""Images that belong together: given groups, near copies, and frames of one scene.

Divided without a look at them, an image is measured on whose twin was learned from, and the
figures are too good. What is a twin is told by the data itself: a pair counts by how far it lies
beyond the pairs of that data that have nothing to do with each other, of its features and of its
difference hash together.

Two things keep unrelated images apart. Thresholds are taken from the *far* side of the pairs,
where no twin is, so that they hold also where most images have one. And groups are clusters by
average linkage, so that a chain of pairs does not join what lies far apart.

Where frames change as much as scenes differ, the order of the images helps, that of their names:
in a class whose neighbours mostly are more alike than images further on, neighbours may be of one
scene at a likeness from which on more pairs of neighbours are than pairs of others.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainer.arrays import Bools, Doubles, Floats, Ints, Looks, Singles
from trainer.looks import bits as bits_of
from trainer.looks import scenes, spread, unit

TWIN = 8.5
"""Spreads beyond unrelated pairs that one pair of a group must reach, in classes of `_USUAL`
images: as many as one in a hundred photos of the same insects by strangers comes to."""
NEAR = 6.2
"""What the pairs of a group reach on average: frames of one scene have 7 to 25."""
MAX_PAIRS = 100_000
MAX_ACROSS = 20_000
"""Images; of more, twins under two classes are not sought."""
_LEAST = 0.3
"""The cosine below which two images are not twins, however few there are to compare them with."""
_PER_DECADE = 1.7
"""What it grows by with ten times the images of a class, of which each has ten times as many pairs
that come by chance to any threshold: as the tail of unrelated photos and drawings does."""
_USUAL = 200
_FEW = 50
"""Below so many images of a class it stays as it is."""
_NEAREST = 10_000
"""Images of a class that each is held against, before and after it: frames follow one another."""
_HASHED = 1.0
"""Spreads of the hash that unrelated images may come to; what is beyond is added."""
_LIKE = 2.0
"""Spreads beyond that from which on the hash of two images is taken for like."""
_LEAST_BITS = 2.0
"""The least spread of the hash's distances: of images that all have one look."""
_SHRUNK = 10
"""Images at which a class's mean counts half: what is common to two images is the class where
there are many, and themselves where there are few."""
_TRUSTED = 20
"""Images at which the spread of a class counts as much as that of a usual class."""
_SAMPLED = 400
"""Images of a class whose pairs are looked at to know unrelated ones."""
_LARGEST = 3000
"""Images that are clustered at once."""
_KEPT = 100
"""Pairs of an image with later ones that are kept, the nearest: a film has thousands."""
_KEPT_ACROSS = 5
"""The same for pairs under two classes."""
_WHOLE = np.float32(0.9999)
"""A cosine beyond it is taken for it: that of 1 has no z."""
_BLOCK = 256
_RUN = 12
"""Images that order alone joins, at most, held against those up to twice as far on: kinds that lie
together in the names, such as breeds, are longer, and in groups so small they do little harm."""
_ORDERED = 0.65
"""The share of neighbours that belong together at least where the order is believed."""
_BY_CHANCE = 1e-4
"""How likely a class may come to that in a random order."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of every image, and how it was found."""

    of: Ints
    """int64 [n]: the groups' numbers, from 0, in the order of their first images."""
    pairs: Ints
    """int64 [m, 2]: places of near copies and frames of one scene, the nearest first, at most
    `MAX_PAIRS`; of a pair under two classes, both places are in the same group too."""
    similarities: Singles
    """float32 [m]: cosines of their features, -1 to 1, without what is common to the class."""
    twin_share: float
    """Of the images, those that have such a twin, 0 to 1."""

    @property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.of.max(initial=-1)) + 1


@dataclass(frozen=True)
class _Unrelated:
    """Location and spread of unrelated pairs: of Fisher's z of their cosine, and of hash bits."""

    z: float
    z_spread: float
    bits: float
    bits_spread: float
    opposite: float
    """Of cosines, what the least are below 0: unrelated images may be as alike as unlike."""
    is_pooled: bool = False
    """Of pairs across classes alone, as no class has images enough: what a class has in common
    looks like a twin there, so that without a like hash there is none."""

    @property
    def least(self) -> float:
        """The cosine that a twin has at least."""
        return max(_LEAST, self.opposite)

    def score(self, cosines: Singles, bits: Singles) -> Singles:
        """Returns how many spreads pairs lie beyond unrelated ones."""
        z = np.arctanh(np.clip(cosines, -_WHOLE, _WHOLE))
        looks = (self.bits - bits) / self.bits_spread - _HASHED
        score: Singles = (z - self.z) / self.z_spread + np.maximum(looks, 0)
        if self.is_pooled:
            score = np.where(looks >= _LIKE, score, np.minimum(score, 0))
        return score


def find(features: Floats, looks: Looks, targets: Ints, given: Sequence[str]) -> Groups:
    """Groups all images of a job: features [n, d], hashes [n], classes [n], given names [n].

    Equal names, "" excepted, are one group, and near copies join groups of different names only
    where they are beyond doubt. Images come in the order of their names, or in one that says
    nothing. About 1 s of one core for 5,000 images of 1,280 features. Of
    classes beyond 10,000 images each is held against the 10,000 around it, in the given order.
    """
    count = len(features)
    if not count:
        return Groups(
            np.empty(0, np.int64), np.empty((0, 2), np.int64), np.empty(0, np.float32), 0.0
        )
    labels, inverse = np.unique(targets, return_inverse=True)
    classes = [np.flatnonzero(inverse == label) for label in range(len(labels))]
    mean = features.mean(axis=0)
    centres = np.empty((len(classes), features.shape[1]), np.float32)
    for label, places in enumerate(classes):
        weight = len(places) / (len(places) + _SHRUNK)
        centres[label] = mean + weight * (features[places].mean(axis=0) - mean)
    own = _unit(features - centres[inverse])
    unrelated = _of_classes(own, looks, classes)
    found = _Found()
    for places, pairs in zip(classes, unrelated, strict=True):
        more = _more(len(places))
        _within(found, own, looks, places, pairs, more)
        _in_order(found, own, looks, places, pairs, more)
    for members in scenes(looks, classes):
        first = np.full(len(members) - 1, members[0])
        cosines_of = own[members[1:]] @ own[members[0]]
        found.add(first, members[1:], cosines_of, np.zeros(len(first), np.float32))
    if len(classes) > 1 and count <= MAX_ACROSS:
        _across(found, features, looks, inverse, centres, unrelated)
    return _joined(found, list(given))


def sides(groups: Ints, digests: Sequence[str], ages: Ints) -> Doubles:
    """Returns each image's number in [0, 1), the same for a group, by groups and ages [n].

    From the sha256 of the digest of the group's oldest image (of the least age, 0; then of the
    least digest), so that every job draws the same for it, whatever was added since.
    """
    order = np.lexsort((np.array(digests, dtype=str), ages, groups))
    _, firsts, inverse = np.unique(groups[order], return_index=True, return_inverse=True)
    drawn = [_drawn(digests[place]) for place in order[firsts]]
    numbers = np.empty(len(groups))
    numbers[order] = np.array(drawn)[inverse]
    return numbers


def _drawn(digest: str) -> float:
    salted = hashlib.sha256(f"graft side\0{digest}".encode()).digest()
    return int.from_bytes(salted[:6], "big") / 2**48


class _Found:
    """Pairs that belong together: places, cosines, and spreads beyond unrelated pairs."""

    def __init__(self) -> None:
        self.first: list[Ints] = []
        self.second: list[Ints] = []
        self.cosines: list[Singles] = []
        self.beyond: list[Singles] = []
        """Over the threshold `TWIN`, below 0 for pairs of a group that are less alike."""

    def add(self, first: Ints, second: Ints, cosines: Singles, beyond: Singles) -> None:
        self.first.append(first)
        self.second.append(second)
        self.cosines.append(cosines)
        self.beyond.append(beyond)


def _of_classes(own: Singles, looks: Looks, classes: Sequence[Ints]) -> list[_Unrelated]:
    """Returns unrelated pairs by class: small classes' as usual classes' are."""
    known = np.full((len(classes), 5), np.nan)
    for row, places in enumerate(classes):
        if len(places) < 3:
            continue
        some = spread(places, _SAMPLED)
        upper = np.triu_indices(len(some), 1)
        cosines, bits = (own[some] @ own[some].T)[upper], bits_of(looks[some], looks[some])[upper]
        known[row] = _far_side(cosines, bits)
    sizes = np.array([len(places) for places in classes])
    is_usual = sizes >= _SHRUNK
    if is_usual.any():
        # Of two in the middle the lower, so that a class that is all alike decides for no other.
        usual = np.quantile(known[is_usual], 0.5, axis=0, method="lower")
    else:
        every = spread(np.concatenate(classes), _SAMPLED)
        upper = np.triu_indices(len(every), 1)
        if not len(upper[0]):
            return [_Unrelated(0.0, 1.0, 32.0, 4.0, 0.0, is_pooled=True)] * len(classes)
        cosines, bits = (
            (own[every] @ own[every].T)[upper],
            bits_of(looks[every], looks[every])[upper],
        )
        usual = np.array(_far_side(cosines, bits))
    weights = (sizes / (sizes + _TRUSTED))[:, None]
    mixed = np.where(np.isnan(known), usual, weights * known + (1 - weights) * usual)
    # Of a class of many kinds, such as breeds of dogs, most pairs lie together and the pairs of a
    # kind far from them: its spread says too little.
    mixed[:, 1] = np.maximum(mixed[:, 1], usual[1])
    is_pooled = not is_usual.any()
    return [replace(_Unrelated(*row), is_pooled=is_pooled) for row in mixed.tolist()]


def _far_side(cosines: Singles, bits: Singles) -> tuple[float, float, float, float, float]:
    """Returns location and spread of pairs by the quarter of them that is least alike.

    As of a normal distribution, whose quarter lies 0.674 spreads from its middle and whose
    twentieth 1.645: twins, be they half of all pairs, are on the other side.
    """
    quantiles = np.clip(np.quantile(cosines, (0.05, 0.25)), -_WHOLE, _WHOLE)
    far, quarter = np.arctanh(quantiles)
    spread = max(float(quarter - far) / 0.971, 1e-3)
    bits_quarter, bits_far = np.quantile(bits, (0.75, 0.95))
    bits_spread = max(float(bits_far - bits_quarter) / 0.971, _LEAST_BITS)
    return (
        float(quarter) + 0.674 * spread, spread,
        float(bits_quarter) - 0.674 * bits_spread, bits_spread, -float(quantiles[0]),
    )  # fmt: skip


def _within(
    found: _Found, own: Singles, looks: Looks, places: Ints, unrelated: _Unrelated, more: float
) -> None:
    """Finds the groups of one class, and their pairs."""
    # Less than `TWIN` does: that a group has a sure pair keeps strangers apart already.
    near = NEAR + more / 2
    edges: list[tuple[Ints, Ints, Singles, Singles]] = []
    for start in range(0, len(places), _BLOCK):
        rows = places[start : start + _BLOCK]
        columns = places[start : start + _BLOCK + _NEAREST]
        cosines = own[rows] @ own[columns].T
        score = unrelated.score(cosines, bits_of(looks[rows], looks[columns]))
        score[np.tril_indices(len(rows), 0, len(columns))] = -np.inf
        is_near = (score >= near) & (cosines >= unrelated.least)
        i, j = np.nonzero(is_near & _nearest(score, _KEPT))
        edges.append((start + i, start + j, cosines[i, j], score[i, j]))
    first, second, cosines, score = (np.concatenate(each) for each in zip(*edges, strict=True))
    if not len(first):
        return

    def scores(members: Ints) -> Singles:
        at = places[members]
        return unrelated.score(own[at] @ own[at].T, bits_of(looks[at], looks[at]))

    def is_one(members: Ints) -> bool:
        some = spread(members, _SAMPLED)
        return bool(scores(some)[np.triu_indices(len(some), 1)].mean() >= near)

    cluster = np.arange(len(places))
    for members in _components(first, second, score, len(places), is_one):
        if len(members) > _LARGEST:
            cluster[members] = members[0]
            continue
        pairs = scores(members)[np.triu_indices(len(members), 1)]
        # Distances may not be negative; the highest score of a pair is far below this.
        distances = np.maximum(1000.0 - pairs.astype(np.float64), 0)
        labels = fcluster(linkage(distances, "average"), 1000.0 - near, "distance")
        cluster[members] = members[np.unique(labels, return_index=True)[1][labels - 1]]
    is_same = cluster[first] == cluster[second]
    # A group has a pair that is beyond doubt.
    sure = np.unique(cluster[first[is_same & (score >= TWIN + more)]])
    is_kept = is_same & np.isin(cluster[first], sure)
    found.add(
        places[first[is_kept]], places[second[is_kept]], cosines[is_kept],
        score[is_kept] - (TWIN + more),
    )  # fmt: skip


def _in_order(
    found: _Found, own: Singles, looks: Looks, places: Ints, unrelated: _Unrelated, more: float
) -> None:
    """Finds runs of neighbours of one class that belong together, where its order tells any."""
    count = len(places)
    if count < _SHRUNK:
        return
    lags = np.arange(1, min(2 * _RUN, count - 1) + 1)
    cosines, scores = (np.full((count, len(lags)), np.nan, np.float32) for _ in range(2))
    for start in range(0, count, _BLOCK):
        rows = places[start : start + _BLOCK]
        columns = places[start : start + _BLOCK + 2 * _RUN]
        i, lag = np.nonzero(np.arange(len(rows))[:, None] + lags < len(columns))
        alike = own[rows] @ own[columns].T
        cosines[start + i, lag] = alike[i, i + lag + 1]
        score = unrelated.score(alike, bits_of(looks[rows], looks[columns]))
        scores[start + i, lag] = score[i, i + lag + 1]
    near = np.sort(scores[:-1, 0])
    far = scores[:, min(_RUN, count // 2) :]
    far = np.sort(far[~np.isnan(far)])
    # By ranks alone (Kolmogorov and Smirnov): at least the largest lead is the share of neighbours
    # of one scene, and there as many pairs of a scene as of others are so alike.
    lead = np.searchsorted(far, near) / len(far) - np.arange(len(near)) / len(near)
    by_chance = np.sqrt(-np.log(_BY_CHANCE) / 2 * (1 / len(near) + 1 / len(far)))
    if lead.max() < max(_ORDERED, by_chance):
        return
    run = _runs(scores[:, : _RUN - 1] - near[lead.argmax()])
    first, lag = np.nonzero(~np.isnan(scores[:, : _RUN - 1]))
    is_same = run[first] == run[first + lag + 1]
    first, lag = first[is_same], lag[is_same]
    found.add(
        places[first], places[first + lag + 1], cosines[first, lag],
        scores[first, lag] - (TWIN + more),
    )  # fmt: skip


def _runs(gains: Singles) -> Ints:
    """Parts images into runs, so that the gains of all pairs within runs [n, lags] are largest.

    Returns the place of each one's run, int64 [n].
    """
    count, most = len(gains), gains.shape[1] + 1
    best, begins = np.zeros(count + 1), np.zeros(count + 1, np.int64)
    inside = np.zeros(1)
    back = np.arange(most)
    for last in range(count):
        at = back[: min(last + 1, most)]
        # Of the runs that end here, by how many images before it they begin.
        own = np.cumsum(gains[last - at[1:], at[1:] - 1], dtype=np.float64)
        inside = np.append(0.0, inside[: len(own)] + own)
        totals = inside + best[last - at]
        begins[last + 1] = last - totals.argmax()
        best[last + 1] = totals.max()
    run = np.zeros(count, np.int64)
    end = count
    while end:
        run[begins[end] : end] = begins[end]
        end = int(begins[end])
    return run


def _components(
    first: Ints, second: Ints, score: Singles, count: int, is_one: Callable[[Ints], bool]
) -> Iterator[Ints]:
    """Yields places that pairs connect: more than can be clustered at once where they are one."""
    labels = _labels(first, second, count)
    sizes = np.bincount(labels)
    for label in np.flatnonzero(sizes > 1):
        members = np.flatnonzero(labels == label)
        if len(members) <= _LARGEST or is_one(members):
            yield members
            continue
        # Loosely connected: its weaker half of pairs is cut.
        inside = labels[first] == label
        strong = inside & (score > np.median(score[inside]))
        if strong.any():
            yield from _components(first[strong], second[strong], score[strong], count, is_one)


def _across(
    found: _Found, features: Floats, looks: Looks, targets: Ints, centres: Singles,
    unrelated: Sequence[_Unrelated],
) -> None:  # fmt: skip
    """Finds twins under two classes: those that would be twins in either."""
    usual = _unit(features - features.mean(axis=0))
    some = spread(np.arange(len(features)), _SAMPLED)
    is_across = np.triu(targets[some][:, None] != targets[some])
    if not is_across.any():
        return
    cosines = usual[some] @ usual[some].T
    apart = _Unrelated(*_far_side(cosines[is_across], bits_of(looks[some], looks[some])[is_across]))
    twin = TWIN + _more(len(features))
    for start in range(0, len(features), _BLOCK):
        rows = slice(start, start + _BLOCK)
        score = apart.score(usual[rows] @ usual[start:].T, bits_of(looks[rows], looks[start:]))
        score[targets[rows][:, None] == targets[start:]] = -np.inf
        score[np.tril_indices(len(score), 0, score.shape[1])] = -np.inf
        is_near = (score >= twin) & _nearest(score, _KEPT_ACROSS)
        score[~is_near] = -np.inf
        i, j = np.nonzero(is_near)
        for label in np.unique(np.concatenate([targets[start + i], targets[start + j]])):
            is_of = (targets[start + i] == label) | (targets[start + j] == label)
            first, second = start + i[is_of], start + j[is_of]
            cosines = np.einsum(
                "nd,nd->n",
                _unit(features[first] - centres[label]),
                _unit(features[second] - centres[label]),
            )
            bits = np.bitwise_count(looks[first] ^ looks[second]).astype(np.float32)
            as_one = unrelated[label].score(cosines, bits)
            as_one[cosines < unrelated[label].least] = -np.inf
            score[i[is_of], j[is_of]] = np.minimum(score[i[is_of], j[is_of]], as_one)
        i, j = np.nonzero(score >= twin)
        first, second = start + i, start + j
        cosines = np.einsum("nd,nd->n", usual[first], usual[second])
        found.add(first, second, cosines, score[i, j] - twin)


def _joined(found: _Found, given: list[str]) -> Groups:
    count = len(given)
    none = np.empty(0, np.int64)
    first, second = (np.concatenate([none, *each]) for each in (found.first, found.second))
    cosines = np.concatenate([np.empty(0, np.float32), *found.cosines])
    beyond = np.concatenate([np.empty(0, np.float32), *found.beyond])
    once = np.unique(first * count + second, return_index=True)[1]
    first, second, cosines, beyond = first[once], second[once], cosines[once], beyond[once]
    names = np.unique(given, return_inverse=True)[1]
    is_named = np.array([bool(name) for name in given])
    # Whoever named groups knows more than features do, but of true copies.
    is_other = is_named[first] & is_named[second] & (names[first] != names[second])
    is_kept = ~is_other | (beyond >= TWIN)
    first, second, cosines = first[is_kept], second[is_kept], cosines[is_kept]
    # Each named image is joined with the first of its name.
    named = np.flatnonzero(is_named)
    _, firsts, inverse = np.unique(names[named], return_index=True, return_inverse=True)
    of = _labels(
        np.concatenate([first, named]), np.concatenate([second, named[firsts][inverse]]), count
    )
    nearest = np.argsort(-cosines, kind="stable")[:MAX_PAIRS]
    _, starts, of = np.unique(of, return_index=True, return_inverse=True)
    return Groups(
        of=np.argsort(np.argsort(starts)).astype(np.int64)[of],
        pairs=np.stack([first[nearest], second[nearest]], axis=1).astype(np.int64),
        similarities=cosines[nearest],
        twin_share=len(np.union1d(first, second)) / count,
    )


def _nearest(score: Singles, count: int) -> Bools:
    """Marks the so many highest of each row."""
    if score.shape[1] <= count:
        return np.ones(score.shape, np.bool_)
    least = np.partition(score, -count, axis=1)[:, -count, None]
    marked: Bools = score >= least
    return marked


def _labels(first: Ints, second: Ints, count: int) -> Ints:
    """Returns the number of the component of each of so many images, int64 [count]."""
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(count, count))
    labels: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


def _more(count: int) -> float:
    return _PER_DECADE * float(np.log10(max(count, _FEW) / _USUAL))


def _unit(features: Floats) -> Singles:
    return unit(features).astype(np.float32)
