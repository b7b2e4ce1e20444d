"""Reported accuracy against accuracy on images that the job never saw.

Many small jobs draw their images from real sets, in strata: plain; bursts, where a scene comes
as several frames, with or without saying so; nine to one, two classes; and at most ten images a
class. Each reports an accuracy with its interval; the head that it would serve is measured on all
that was not drawn.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from bench.quality import frozen_job
from bench.quality.document import Section, mean, share
from bench.quality.images import ImageSet
from bench.quality.measuring import Measuring, Sets
from trainer.arrays import Doubles, Ints

Stratum = Literal["plain", "bursts", "bursts, scenes given", "nine to one", "at most ten a class"]
STRATA: tuple[Stratum, ...] = get_args(Stratum)
OVERALL, EACH = 0.93, 0.90
"""Shares of jobs whose reported accuracy must be within 1.96 standard errors of the truth."""
_Z = 1.959964
_HELD_OUT = 5
"""Scenes of each class that are never drawn, at least."""


@dataclass(frozen=True)
class Drawn:
    """One job's images, and those that it is held against."""

    name: str
    stratum: Stratum
    train: ImageSet
    held_out: ImageSet
    seed: int


@dataclass(frozen=True)
class Outcome:
    """One job's report beside the truth."""

    name: str
    stratum: Stratum
    images: int
    scenes: int
    groups: int
    """As the job found them."""
    reported: float
    low: float
    high: float
    true: float
    true_error: float
    """Standard error of `true`, by scenes."""

    @property
    def reported_error(self) -> float:
        """Returns the standard error that the reported interval implies."""
        return (self.high - self.low) / (2 * _Z)

    @property
    def is_inside(self) -> bool:
        """Returns whether report and truth differ by no more than both their errors explain."""
        error = math.hypot(self.reported_error, self.true_error)
        return abs(self.reported - self.true) <= _Z * error + 1e-12

    @property
    def contains_true(self) -> bool:
        """Returns whether the reported interval contains the truth as it was measured."""
        return self.low <= self.true <= self.high


def is_burst(stratum: Stratum) -> bool:
    """Returns whether a scene comes as several frames."""
    return stratum.startswith("bursts")


def draw(images: ImageSet, filmed: ImageSet | None, stratum: Stratum, seed: int) -> Drawn | None:
    """Draws one job's images; None where the set has too few of them.

    What is held out are the images of scenes that nothing was drawn from.
    """
    rng = np.random.default_rng([seed, STRATA.index(stratum)])
    pool = filmed if is_burst(stratum) else images
    if pool is None:
        return None
    if stratum == "nine to one":
        pool = _two_classes(pool, rng)
    wanted: dict[int, int] = {}
    counts = {k: len(np.unique(pool.scenes[pool.targets == k])) for k in range(len(pool.classes))}
    few = int(rng.integers(3, 11))
    part = rng.uniform(0.3, 0.6)
    scenes = int(rng.integers(4, 13))
    for k, count in counts.items():
        if stratum == "plain":
            wanted[k] = max(11, round(part * count)) if count >= 20 else 0
        elif is_burst(stratum):
            wanted[k] = scenes
        elif stratum == "at most ten a class":
            wanted[k] = few
    if stratum == "nine to one":
        # Class 0 is the rare one.
        most = min(counts[0] - _HELD_OUT, (counts[1] - _HELD_OUT) // 9, 20)
        if most < 4:
            return None
        rare = int(rng.integers(min(5, most), most + 1))
        wanted = {0: rare, 1: 9 * rare}
    kept = [k for k, count in counts.items() if 0 < wanted[k] <= count - _HELD_OUT]
    if len(kept) < 2:
        return None
    pool = pool.of_classes(kept)
    train: list[Ints] = []
    for place, k in enumerate(kept):
        scenes_of_it = rng.permutation(np.unique(pool.scenes[pool.targets == place]))
        own = [np.flatnonzero((pool.scenes == s) & (pool.targets == place)) for s in scenes_of_it]
        learned = np.concatenate(own[: wanted[k]])
        train.append(learned if is_burst(stratum) else learned[: wanted[k]])
    # In the order of files, in which frames follow one another.
    learned = np.sort(np.concatenate(train))
    held_out = np.flatnonzero(~np.isin(pool.scenes, pool.scenes[learned]))
    held_counts = np.bincount(pool.targets[held_out], minlength=len(kept))
    if held_counts.min() < _HELD_OUT:
        return None
    return Drawn(images.name, stratum, pool.at(learned), pool.at(held_out), seed)


def _two_classes(images: ImageSet, rng: np.random.Generator) -> ImageSet:
    """Returns one class against all others, or against one other where there are but two."""
    rare = int(rng.integers(len(images.classes)))
    return replace(
        images,
        targets=(images.targets != rare).astype(np.int64),
        classes=(images.classes[rare], "other"),
    )


def measure(drawn: Drawn) -> Outcome | None:
    """Runs one job; None where it reports no figure."""
    is_given = drawn.stratum == "bursts, scenes given"
    job = frozen_job.run(drawn.train, drawn.seed, "given" if is_given else "found")
    if job.figure is None:
        return None
    served = job.probabilities(drawn.held_out)
    targets = drawn.held_out.targets
    right = (served.argmax(axis=1) == targets).astype(np.float64)
    shares = np.bincount(drawn.train.targets, minlength=len(drawn.train.classes)) / len(drawn.train)
    true, error = by_scenes(right, targets, drawn.held_out.scenes, shares)
    return Outcome(
        drawn.name,
        drawn.stratum,
        len(drawn.train),
        len(np.unique(drawn.train.scenes)),
        len(np.unique(job.groups)),
        job.figure.accuracy,
        job.figure.accuracy_low,
        job.figure.accuracy_high,
        true,
        error,
    )


def by_scenes(values: Doubles, targets: Ints, scenes: Ints, shares: Doubles) -> tuple[float, float]:
    """Returns a mean by class, weighted by `shares` of classes, and its standard error by scenes.

    The mix of classes is that of the images learned from. A class whose images are all alike is
    taken as if it had one scene more of 0 and one of 1 (Agresti and Coull 1998): its error is
    not none.
    """
    middle, variance = 0.0, 0.0
    for k, weight in enumerate(shares):
        own = targets == k
        _, scene = np.unique(scenes[own], return_inverse=True)
        count, sizes = int(scene.max()) + 1, np.bincount(scene)
        of_class = float(values[own].mean())
        middle += weight * of_class
        if values[own].std() == 0:
            variance += weight**2 * float(
                np.var(np.append(np.full(count, of_class), (0, 1))) / count
            )
        else:
            sums = np.bincount(scene, values[own] - of_class)
            squared = (sums**2).sum() / sizes.sum() ** 2 * count / max(1, count - 1)
            variance += weight**2 * float(squared)
    return middle, math.sqrt(variance)


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Runs about `arguments.jobs` jobs, as many of each stratum of each set."""
    sets = measuring.sets.whole
    each = max(1, round(arguments.jobs / len(sets) / len(STRATA)))
    tasks = [
        (name, stratum, seed)
        for seed in range(each)
        for name in sets
        for stratum in STRATA
        if name in measuring.sets.filmed or not is_burst(stratum)
    ]
    return section(*measuring.all(_measured, tasks))


def _measured(sets: Sets, name: str, stratum: Stratum, seed: int) -> Outcome | None:
    drawn = draw(sets.whole[name], sets.filmed.get(name), stratum, seed)
    return None if drawn is None else measure(drawn)


def section(outcomes: Sequence[Outcome], unmeasured: int) -> Section:
    """Writes down how often reports were true."""
    found = Section("Reported accuracy against the truth")
    found.say(
        f"{len(outcomes)} jobs on frozen features. *Inside*: reported and held-out accuracy "
        "differ by at most 1.96 standard errors of the difference, the reported one's from its "
        "interval, the other's by scenes: images that the trainer groups in the whole set, and "
        "frames of one photograph. *In interval*: the reported 95 % interval contains the "
        "held-out accuracy (which has an error of its own, so 95 % is more than can be reached). "
        "*Too high*: reported less held-out, points, mean ± standard error. *Half width* of the "
        "reported interval, points, mean. Shares with 95 % Wilson intervals."
        + (
            f" {unmeasured} more had too few images to draw or reported no figure."
            if unmeasured
            else ""
        )
    )
    rows = [_row("all", outcomes)]
    rows += [_row(f"*{s}*", [o for o in outcomes if o.stratum == s]) for s in STRATA]
    names = list(dict.fromkeys(o.name for o in outcomes))
    rows += [_row(n, [o for o in outcomes if o.name == n]) for n in names]
    head = ("jobs", "inside", "in interval", "too high", "half width", "groups found / scenes")
    found.table(head, rows)
    found.say("By set and stratum, jobs inside of all:")
    found.table(
        ("set", *STRATA),
        [
            (n, *(_inside([o for o in outcomes if (o.name, o.stratum) == (n, s)]) for s in STRATA))
            for n in names
        ],
    )
    for called, some, least in [
        ("all jobs", list(outcomes), OVERALL),
        *((s, [o for o in outcomes if o.stratum == s], EACH) for s in STRATA),
    ]:
        inside = sum(o.is_inside for o in some)
        found.bound(
            f"at least {100 * least:.0f} % inside, {called}: {share(inside, len(some))}",
            bool(some) and inside >= least * len(some),
        )
    return found


def _inside(some: Sequence[Outcome]) -> str:
    return f"{sum(o.is_inside for o in some)} of {len(some)}" if some else "-"


def _row(called: str, some: Sequence[Outcome]) -> tuple[str, ...]:
    if not some:
        return (called, *["-"] * 5)
    n = len(some)
    half = sum(o.high - o.low for o in some) / 2 / n
    return (
        called,
        share(sum(o.is_inside for o in some), n),
        share(sum(o.contains_true for o in some), n),
        mean([o.reported - o.true for o in some], 0.01, 1),
        f"{100 * half:.1f}",
        f"{sum(o.groups for o in some) / sum(o.scenes for o in some):.2f}",
    )
