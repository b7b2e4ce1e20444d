"""A job's images in groups that belong together, and what is held out of them.

Frames of a scene and copies are no independent images: folds, sides and intervals go by
groups.
"""

import math
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np

from service.engine.head import Floats
from trainer import division, folds, groups
from trainer.answers import Answer
from trainer.arrays import Bools, Doubles, Ints, Looks
from trainer.data import Data, Files, Part

_NOTHING: Mapping[str, Answer] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Divided:
    """A job's data, and which of its images belong together."""

    data: Data
    found: groups.Groups
    """Of all images: of the training part, then of validation, then of test."""
    sides: Doubles
    """Numbers from 0 to 1 of the training images' groups, the same in every job."""
    chose: Bools
    """Training images [n] that chose the backbone: learned from, and never measured on."""

    @property
    def train(self) -> Ints:
        """Group numbers [n] of the training images."""
        return self.found.of[: len(self.data.train)]

    @property
    def validation(self) -> Ints:
        """Group numbers [m] of the validation images."""
        start = len(self.data.train)
        return self.found.of[start : start + len(self.data.validation)]

    @property
    def test(self) -> Ints:
        """Group numbers of the test images."""
        return self.found.of[len(self.found.of) - len(self.data.test) :]

    @cached_property
    def folds(self) -> Ints:
        """Folds [n] of the training images, see `folds.deal`."""
        return folds.deal(self.data.train.targets, self.train, self.sides)

    @property
    def rounds(self) -> int:
        """Counts the folds."""
        return len(np.unique(self.folds[self.folds >= 0]))

    def dealt(self, learned: Bools) -> tuple[Part, Ints, tuple[str, ...]]:
        """Returns the marked training images, folds of their own, and the classes."""
        part = self.data.train.take(learned)
        own = folds.deal(part.targets, self.train[learned], self.sides[learned])
        return part, own, self.data.classes

    def held_out(self, fraction: float) -> Bools:
        """Marks training images that a network is to be measured on, see `division.held_out`."""
        return division.held_out(self.data.train.targets, self.train, self.sides, fraction)


def divide(
    data: Data,
    features: Floats,
    previous: Mapping[str, Answer] = _NOTHING,
    choosers: Container[str] = (),
) -> Divided:
    """Finds what belongs together, by features [n, d] of all images, part after part.

    `previous` is what an earlier version of the model knew of images, by their digests: they
    stay together, and their groups on their sides. `choosers` are the digests of the images
    that chose the backbone; nothing of their groups is measured on.
    """
    parts = (data.train, data.validation, data.test)
    sizes = Counter(answer.group for answer in previous.values())
    found = groups.find(
        features,
        looks_of(*parts),
        np.concatenate([part.targets for part in parts]),
        [name for part in parts for name in _names(part, previous, sizes)],
    )
    train = data.train
    own = found.of[: len(train)]
    chose = np.array([digest in choosers for digest in train.digests], dtype=np.bool_)
    return Divided(data, found, _sides(train, own, previous), np.isin(own, own[chose]))


def _names(part: Part, previous: Mapping[str, Answer], sizes: Counter[int]) -> list[str]:
    """Names the group of each image: as it came, else the one that it shared before."""
    names = []
    for name, digest in zip(part.given_groups or ("",) * len(part), part.digests, strict=True):
        before = previous.get(digest)
        is_shared = before is not None and sizes[before.group] > 1
        names.append(name or (f"\0{before.group}" if before and is_shared else ""))
    return names


def _sides(train: Part, own: Ints, previous: Mapping[str, Answer]) -> Doubles:
    """Returns the side of each image's group: that which its oldest member had before, if any."""
    sides = groups.sides(own, train.digests, train.ages)
    kept: dict[int, tuple[int, str, float]] = {}
    for digest, age, group in zip(train.digests, train.ages.tolist(), own.tolist(), strict=True):
        before = previous.get(digest)
        if before is None or math.isnan(before.side):
            continue
        oldest = (age, digest, before.side)
        kept[group] = min(kept.get(group, oldest), oldest)
    for row, group in enumerate(own.tolist()):
        if group in kept:
            sides[row] = kept[group][2]
    return sides


def looks_of(*parts: Files) -> Looks:
    """Returns the perceptual hashes of images, uint64 [n]."""
    return np.array(
        [int(look or "0", 16) for part in parts for look in part.looks], dtype=np.uint64
    )


def unlearned(part_groups: Ints, learned: Ints) -> Bools:
    """Marks images of which no copy was learned from, by group numbers of both."""
    marked: Bools = ~np.isin(part_groups, learned)
    return marked


def subset(part: Part, group_numbers: Ints, mask: Bools) -> tuple[Part, Ints]:
    """Returns the marked images with their groups."""
    return part.take(mask), group_numbers[mask]
