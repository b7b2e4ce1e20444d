"""Folds for cross-validation: by groups, stratified by class."""

import numpy as np

from trainer.arrays import Doubles, Ints

FOLDS = 5
FOLDS_OF_FEW = 10
"""Where images are few, a fifth of them is missed, and more folds take little time."""
_FEW_IMAGES = 1000


def deal(
    targets: Ints,
    groups: Ints | None = None,
    order: Doubles | None = None,
    count: int | None = None,
) -> Ints:
    """Deals images to folds: the fold, int64 [n], of each; -1 for those always learned from.

    Images of one group, `groups` int64 [n], share a fold; without it each is its own.
    Every class is spread evenly by its number of images: group by group, the largest
    first, then by `order` float64 [n] (the least of a group's images; without it their
    place), each to the fold that holds least of the class and, among equals, least of all.
    A group that holds a class alone is never held out, so every fold leaves each
    class something to learn from. Without `count`, `count_for` says how many folds.
    """
    n = len(targets)
    groups = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    if count is None:
        count = count_for(targets, groups)
    classes = int(targets.max()) + 1
    pairs, images = np.unique(groups * classes + targets, return_counts=True)
    owner, label = pairs // classes, pairs % classes
    first = np.searchsorted(owner, np.arange(owner[-1] + 2))
    shares = np.bincount(label, minlength=classes)
    place = np.full(owner[-1] + 1, np.inf)
    np.minimum.at(place, groups, np.arange(n) if order is None else order)
    # Class by class, the rarest first: it has the least choice.
    rarest = np.minimum.reduceat(shares[label] * classes + label, first[:-1])
    turns = np.lexsort((place, -np.bincount(groups), rarest))

    held = [[0] * count for _ in range(classes)]
    """Images by class and fold: lists, as the loop below is one of small steps."""
    total = [0] * count
    left = shares.tolist()
    is_safe = [False] * classes
    """Something is always learned."""
    fold = np.full(owner[-1] + 1, -1)
    parts = list(zip(label.tolist(), images.tolist(), strict=True))
    is_alone = np.logical_or.reduceat(shares[label] == 1, first[:-1])
    for c in label[is_alone[owner]]:
        is_safe[c] = True
    for group in turns:
        own = parts[first[group] : first[group + 1]]
        free = set(range(count))
        for c, _ in own:
            left[c] -= 1
            # The last group of a class may not join all others of it in one fold.
            if not left[c] and not is_safe[c]:
                taken = [f for f, images_held in enumerate(held[c]) if images_held]
                free -= set(taken) if len(taken) == 1 else set()
        if is_alone[group] or not free:
            for c, _ in own:
                is_safe[c] = True
            continue
        best = min(free, key=lambda f: (sum(held[c][f] * m for c, m in own), total[f], f))
        fold[group] = best
        for c, m in own:
            held[c][best] += m
            total[best] += m
    return fold[groups]


def count_for(targets: Ints, groups: Ints) -> int:
    """How many folds suit the images: no more than most images' classes have groups.

    So of small classes every fold holds out as much, and none is learned from more
    images than another; a rare class among large ones changes nothing.
    """
    classes = int(targets.max()) + 1
    owned = np.unique(groups * classes + targets) % classes
    of_class = np.bincount(owned, minlength=classes)
    most = FOLDS_OF_FEW if len(targets) <= _FEW_IMAGES else FOLDS
    return int(np.clip(np.median(of_class[targets]), 2, most))
