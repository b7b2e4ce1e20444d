"""Whether an out-of-distribution score tells what a head was not made for, and how often it errs.

Heads learn half of a set's classes. Near images are of the other half, which look alike; far ones
are of other sets. The score that serves (distance and energy) is held against the distance alone,
on the same images of the same head.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from scipy import stats

from bench.quality.document import Section, half_width
from bench.quality.images import ImageSet
from bench.quality.measuring import Measuring, Sets
from service.engine.head import Head
from trainer import folds, linear, outliers
from trainer.arrays import Floats, Ints
from trainer.methods.feature_based import as_head

PER_CLASS = (5, 20, 50)
RATES = (0.01, 0.05, 0.2)
"""Of false alarms that are asked for."""
NEAR, FAR = 0.75, 0.98
"""Areas that are to be reached, means over sets."""
_HELD_OUT = 5
"""Images of each class that are never drawn, at least."""
_MOST_ASKED = 300
"""Images of each kind that are scored."""


class OfSet(Protocol):
    """What was measured on one set."""

    @property
    def name(self) -> str:
        """The set's."""


T = TypeVar("T", bound=OfSet)


@dataclass(frozen=True)
class Row:
    """Areas under the curve (the chance that a strange image scores above a familiar one)."""

    name: str
    per_class: int
    near: float
    near_by_distance: float
    far: float
    far_by_distance: float
    alarms: tuple[float, ...]
    """The part of familiar images above 1 at each of `RATES`."""


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Measures draws of every set."""
    tasks = [
        (name, per_class, seed)
        for name in measuring.sets.whole
        for per_class in PER_CLASS
        for seed in range(arguments.draws)
    ]
    return section(measuring.all(_measured, tasks)[0])


def _measured(sets: Sets, name: str, per_class: int, seed: int) -> Row | None:
    return measure(sets.whole, name, per_class, seed)


def measure(sets: Mapping[str, ImageSet], name: str, per_class: int, seed: int) -> Row | None:
    """Measures one draw; None where half of the classes that are large enough are fewer than two.

    Sets below the same folder are no far images of each other: they show the same things.
    """
    images, rng = sets[name], np.random.default_rng([seed, per_class])
    large = np.flatnonzero(np.bincount(images.targets) >= per_class + _HELD_OUT)
    known = np.sort(rng.permutation(large)[: len(images.classes) // 2])
    if len(known) < 2:
        return None
    of_class = [rng.permutation(np.flatnonzero(images.targets == k)) for k in known]
    learned = np.concatenate([own[:per_class] for own in of_class])
    familiar = images.features[np.concatenate([own[per_class:] for own in of_class])]
    near = images.features[np.flatnonzero(~np.isin(images.targets, known))]
    folder = name.rpartition("/")[0] or name
    far = np.concatenate([
        _some(s.features, rng) for n, s in sets.items() if (n.rpartition("/")[0] or n) != folder
    ])  # fmt: skip
    asked = [_some(each, rng) for each in (familiar, near)] + [far]
    head, fits = _fitted(images.features[learned], np.searchsorted(known, images.targets[learned]))
    if fits is None:
        return None
    said = [head.log_probabilities(each) for each in asked]
    joined = [[fit.outliers.scores(f, p) for f, p in zip(asked, said, strict=True)] for fit in fits]
    distance = [fits[0].outliers.distances(each) for each in asked]
    # The offset and the scale, which the rate sets, change no order but of what is cut off at 0.
    return Row(
        name,
        per_class,
        near=auroc(joined[0][0], joined[0][1]),
        near_by_distance=auroc(distance[0], distance[1]),
        far=auroc(joined[0][0], joined[0][2]),
        far_by_distance=auroc(distance[0], distance[2]),
        alarms=tuple(float((scores[0] > 1).mean()) for scores in joined),
    )


def _some(features: Floats, rng: np.random.Generator) -> Floats:
    return features[rng.permutation(len(features))[:_MOST_ASKED]]


def _fitted(features: Floats, targets: Ints) -> tuple[Head, list[outliers.Fitted] | None]:
    """Fits a head and, for each of `RATES`, what tells outliers, as a job does."""
    classes = int(targets.max()) + 1
    dealt = folds.deal(targets)
    fitted = linear.fit(features, targets, classes, None, 0, threads=1, folds=dealt)
    head = as_head(fitted, tuple(map(str, range(classes))))
    if fitted.out_of_fold is None:
        return head, None
    train = outliers.Images(features, outliers.logarithms(fitted.out_of_fold))
    none = train.at(np.empty(0, np.int64))
    found = [outliers.fit(train, targets, dealt, none, false_alarms=rate) for rate in RATES]
    return head, [each for each in found if each is not None]


def auroc(familiar: Floats, strange: Floats) -> float:
    """Returns the chance that one of scores [m] is above one of scores [n]; ties count half."""
    above = stats.mannwhitneyu(strange, familiar, method="asymptotic").statistic
    return float(above / (len(familiar) * len(strange)))


def section(rows: Sequence[Row]) -> Section:
    """Writes down the areas, with the difference to the distance alone, and the false alarms."""
    found = Section("Out of distribution")
    found.say(
        "Area under the ROC curve of the out-of-distribution score, heads on half of a set's "
        "classes. *Near*: images of the other half; *far*: of other sets. In brackets that of the "
        "distance alone; *more*: the difference, paired by draw, with 95 % t-intervals over draws, "
        "which share a set's images; over all, with the set as the unit. *Alarms*: familiar images "
        "above 1 where " + ", ".join(f"{rate:.0%}" for rate in RATES) + " were allowed."
    )
    table = []
    for per_class in dict.fromkeys(r.per_class for r in rows):
        own = [r for r in rows if r.per_class == per_class]
        for name in dict.fromkeys(r.name for r in own):
            some = [r for r in own if r.name == name]
            table.append(_cells(f"{name}, {per_class} a class", [[r] for r in some]))
        table.append(_cells(f"*all, {per_class} a class*", by_set(own)))
    table.append(_cells("*all*", by_set(rows)))
    found.table(("set", "draws", "near", "more", "far", "more", "alarms, %"), table)
    near, far = (
        mean_of([mean_of([area(r)[0] for r in unit]) for unit in by_set(rows)])
        for area in (_near, _far)
    )
    found.bound(f"near at least {NEAR} on average: {near:.3f}", near >= NEAR)
    found.bound(f"far at least {FAR} on average: {far:.3f}", far >= FAR)
    return found


def _near(row: Row) -> tuple[float, float]:
    return row.near, row.near_by_distance


def _far(row: Row) -> tuple[float, float]:
    return row.far, row.far_by_distance


def _cells(called: str, units: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    cells = [called, str(sum(map(len, units)))]
    for area in (_near, _far):
        ours = mean_of([mean_of([area(r)[0] for r in unit]) for unit in units])
        alone = mean_of([mean_of([area(r)[1] for r in unit]) for unit in units])
        more = [mean_of([area(r)[0] - area(r)[1] for r in unit]) for unit in units]
        cells += [f"{ours:.3f} ({alone:.3f})", f"{mean_of(more):+.3f} ±{half_width(more):.3f}"]
    alarms = (
        mean_of([mean_of([r.alarms[k] for r in unit]) for unit in units]) for k in range(len(RATES))
    )
    return (*cells, " / ".join(f"{100 * part:.1f}" for part in alarms))


def by_set(rows: Sequence[T]) -> list[list[T]]:
    """Returns the rows of each set."""
    return [[r for r in rows if r.name == name] for name in dict.fromkeys(r.name for r in rows)]


def mean_of(values: Sequence[float]) -> float:
    """Returns the mean; NaN of none."""
    return sum(values) / len(values) if values else math.nan
