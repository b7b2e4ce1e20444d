"""Chooses what a backbone sees of long images: the middle of them, or all of it.

Quick heads tell by their cross-validated losses on a sample of the training images, which alone are
run both ways; all others are run once, as was chosen. Where the sample does not tell with each of a
job's folds left out, the head that serves is chosen among both framings of all images, so that
no image chooses by what it is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service.contract import Auto, FeatureBased, JobSpec
from service.domain import Framing
from trainer import folds, groups, linear
from trainer.arrays import Bools, Doubles, Ints
from trainer.data import Part
from trainer.divided import looks_of
from trainer.features import Features
from trainer.linear import Candidate
from trainer.penalty import LEARNED

LONG = 1.3
"""The longer side over the shorter of images, from which on a square out of their middle may
miss what tells their classes apart."""
BOTH: tuple[Framing, ...] = ("crop", "whole")
_LEAST, _MOST = 96, 1000
"""Images of a sample, and a tenth of all in between."""
_WORTH = 1.5
"""Of fewer images than so many times the sample all are seen both ways."""
_OF_CLASS = 4
"""Of a class in the sample at least; of more classes than that leaves room for, some."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the sample tells."""

    digests: tuple[str, ...]
    """Of the images [m] that heads answered which did not learn from them."""
    losses: Mapping[Framing, Sequence[Doubles]]
    """Their losses [m] by each quick head on each framing, nats."""

    @property
    def best(self) -> Framing:
        """The framing of the least loss; all of the images must win by a hundredth."""
        return self._best(np.ones(len(self.digests), np.bool_))

    def is_sure(self, digests: Sequence[str], dealt: Ints) -> bool:
        """Tells whether the images outside of any one fold choose as all of them do.

        `dealt` are folds [n] of the images of these digests.
        """
        fold_of = dict(zip(digests, dealt.tolist(), strict=True))
        own = np.array([fold_of[digest] for digest in self.digests])
        return all(self._best(own != fold) == self.best for fold in np.unique(own[own >= 0]))

    def _best(self, by: Bools) -> Framing:
        if not by.any():
            return "crop"
        crop, whole = (
            min(float(losses[by].mean()) for losses in self.losses[framing]) for framing in BOTH
        )
        return "whole" if whole < LEARNED * crop else "crop"


def is_open(spec: JobSpec, part: Part) -> bool:
    """Tells whether a job is to choose the framing of its images, which are cropped."""
    match spec.method:
        case Auto() | FeatureBased(l2=None):
            return is_compared(spec.framing, part)
    return False


def is_compared(asked: str, part: Part) -> bool:
    """Tells whether framings of images are compared, where the method could."""
    is_long = asked == "auto" and len(part.aspects) and np.median(part.aspects) > LONG
    return bool(is_long) or asked == "compare"


def compare(part: Part, features: Features, threads: int = 0) -> Comparison | None:
    """Compares framings on a sample of cropped images.

    Returns None where all images are as good as few, or where the sample tells nothing.
    """
    places = sample(part.targets, part.digests)
    if not len(places):
        return None
    some = part.take(places)
    cropped = features.all_of(some, "images to choose their framing by", BOTH[1:])
    width = features.blocks[0]
    present, targets = np.unique(some.targets, return_inverse=True)
    given = some.given_groups or ("",) * len(some)
    of = groups.find(cropped[:, :width], looks_of(some), targets, list(given)).of
    dealt = folds.deal(targets, of)
    found: dict[Framing, Sequence[Doubles]] = {}
    for framing in BOTH:
        rows = cropped if framing == "crop" else features.all_of(some.framed(framing))
        last = rows[:, :width]
        heads = [Candidate("last layer, scaled", last, linear.deviation(last))]
        if rows.shape[1] > width:
            layers = np.split(rows, np.cumsum(features.blocks)[:-1], axis=1)
            divisor = np.concatenate([linear.deviation(layer) for layer in layers])
            heads.append(Candidate("last and middle layers", rows, divisor))
        losses = linear.held_out_losses(heads, targets, len(present), dealt, threads)
        if losses is None:
            return None
        found[framing] = losses
    held = np.flatnonzero(dealt >= 0)
    return Comparison(tuple(some.digests[place] for place in held), found)


def sample(targets: Ints, digests: Sequence[str]) -> Ints:
    """Returns places of the images to compare framings on, in order: in turn from each class.

    By their digests, so that a grown dataset compares on the same ones, mostly. None where
    they would be hardly fewer than all.
    """
    size = int(np.clip(len(targets) // 10, _LEAST, _MOST))
    if len(targets) < _WORTH * size:
        return np.arange(0)
    present = np.unique(targets)
    spread = np.linspace(0, len(present) - 1, min(len(present), size // _OF_CLASS))
    some = np.flatnonzero(np.isin(targets, present[spread.round().astype(np.int64)]))
    order = sorted(some.tolist(), key=lambda place: digests[place])
    turns = dict.fromkeys(present.tolist(), 0)
    keyed = []
    for place in order:
        target = int(targets[place])
        keyed.append((turns[target], target, place))
        turns[target] += 1
    return np.array(sorted(place for *_, place in sorted(keyed)[:size]))
