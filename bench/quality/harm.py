"""Counts how often adapting to a domain does harm, and how often the trainer says so.

From each domain to each other with the same classes, the target whole and in parts
that make adapting dangerous: one class alone, three classes, shares that halve from
class to class. A half of a part is adapted to, the other measured on. An adaptation is
harmful where the 95 % interval of adapted less source-only accuracy lies below 0.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from bench.quality.document import Section, mean, share
from bench.quality.measuring import Measuring, Sets
from trainer.adaptation import frozen
from trainer.arrays import Floats, Ints
from trainer.methods import feature_based
from trainer.reporting import comparisons

Names = npt.NDArray[np.str_]

LEAST_CAUGHT = 0.80
MOST_LOST = 0.10
SEEDS = 3
WORTH = 0.05
"""Accuracy gained that it is a loss to forgo."""
MOST_SINGLES = 7
DRAWS = 5
"""Of three classes, and of shifted shares."""


@dataclass(frozen=True)
class Row:
    """An adaptation, measured on target images that it did not see."""

    source: str
    target: str
    part: str
    """`whole`, `one class`, `three classes` or `shifted shares`."""
    seed: int
    images: int
    """Adapted to; about as many are measured on."""
    source_only: float
    """Its accuracy."""
    adapted: float
    """The accuracy of the adapted head that looks best, kept or not."""
    low: float
    """Of the 95 % interval of the difference."""
    high: float
    is_kept_or_flagged: bool
    """Source-only is kept and a warning says why; with always_adapt it warns all the same."""

    @property
    def gain(self) -> float:
        """Returns the accuracy that adapting gains."""
        return self.adapted - self.source_only

    @property
    def served(self) -> float:
        """Returns the accuracy of what is served by default."""
        return self.source_only if self.is_kept_or_flagged else self.adapted

    @property
    def is_harmful(self) -> bool:
        """Tells whether adapting is worse beyond chance."""
        return self.high < 0


@dataclass(frozen=True)
class Summary:
    """Counts adaptations; what `make quality` bounds."""

    harmful: int
    caught: int
    """Harmful ones that were kept or flagged: to be 80 % or more."""
    gaining: int
    """Those that gain `WORTH` or more."""
    lost: int
    """Gaining ones that were kept from serving: to be 10 % or fewer."""


def of_pair(
    source: tuple[str, Floats, Names], target: tuple[str, Floats, Names], seed: int
) -> list[Row]:
    """Measures all parts of one target; either is a name, features [n, d], class names [n]."""
    from_name, known, known_names = source
    to_name, asked, asked_names = target
    classes, targets = np.unique(known_names, return_inverse=True)
    right = np.searchsorted(classes, asked_names)
    names = tuple(classes.tolist())
    source_only = feature_based.linear_probe(known, targets, None, names, seed, threads=1)
    rng = np.random.default_rng([seed, 0xA12])
    rows = []
    for part, places in parts(right, rng):
        seen, held = halves(right, places, rng)
        if min(len(seen), len(held)) < 2:
            continue
        found = frozen.adapt(
            known, targets, asked[seen], source_only, "auto", seed, always_adapt=True
        )
        before = source_only.probabilities(asked[held]).argmax(axis=1)
        compared = comparisons.compare(
            comparisons.Measured(frozen.SOURCE_ONLY, before),
            found.logits(asked[held]).argmax(axis=1),
            right[held],
        )
        rows.append(
            Row(
                source=from_name,
                target=to_name,
                part=part,
                seed=seed,
                images=len(seen),
                source_only=compared.accuracy,
                adapted=compared.accuracy + compared.difference,
                low=compared.difference_low,
                high=compared.difference_high,
                is_kept_or_flagged=bool(found.doubt),
            )
        )
    return rows


def parts(targets: Ints, rng: np.random.Generator) -> list[tuple[str, Ints]]:
    """Draws parts of images with classes [n]: what each is called, and the images' places."""
    classes = int(targets.max()) + 1
    found = [("whole", np.arange(len(targets)))]
    singles = rng.permutation(classes)[:MOST_SINGLES] if classes > MOST_SINGLES else range(classes)
    found += [("one class", np.flatnonzero(targets == c)) for c in singles]
    if classes > 3:
        for _ in range(DRAWS):
            three = rng.choice(classes, 3, replace=False)
            found.append(("three classes", np.flatnonzero(np.isin(targets, three))))
    for _ in range(DRAWS):
        kept = []
        for rank, c in enumerate(rng.permutation(classes)):
            own = rng.permutation(np.flatnonzero(targets == c))
            kept.append(own[: int(np.ceil(len(own) / 2**rank))])
        found.append(("shifted shares", np.sort(np.concatenate(kept))))
    return found


def halves(targets: Ints, places: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Divides places into two of about the same shares of classes; a lone image falls in one."""
    side = np.zeros(len(places), dtype=np.int64)
    for c in np.unique(targets[places]):
        own = rng.permutation(np.flatnonzero(targets[places] == c))
        side[own] = (np.arange(len(own)) + rng.integers(2)) % 2
    return places[side == 0], places[side == 1]


def summary(rows: Sequence[Row]) -> Summary:
    """Counts what the trainer caught, and what its caution cost."""
    harmful = [row for row in rows if row.is_harmful]
    gaining = [row for row in rows if row.gain >= WORTH]
    return Summary(
        harmful=len(harmful),
        caught=sum(row.is_kept_or_flagged for row in harmful),
        gaining=len(gaining),
        lost=sum(row.is_kept_or_flagged for row in gaining),
    )


def run(measuring: Measuring, _: argparse.Namespace) -> Section:
    """Adapts between all sets of the same classes."""
    sets = measuring.sets.whole
    tasks = [
        (source, target, seed)
        for seed in range(SEEDS)
        for source, target in permutations(sets, 2)
        if sets[source].classes == sets[target].classes
    ]
    return section([row for rows in measuring.all(_adapted, tasks)[0] for row in rows])


def _adapted(sets: Sets, source: str, target: str, seed: int) -> list[Row]:
    known, asked = sets.whole[source], sets.whole[target]
    return of_pair(
        (source, known.features, np.array(known.classes)[known.targets]),
        (target, asked.features, np.array(asked.classes)[asked.targets]),
        seed,
    )


def section(rows: Sequence[Row]) -> Section:
    """Writes the outcomes by the kind of target, and the two bounds."""
    found = Section("Harm of adapting")
    found.say(
        f"{len(rows)} adaptations on frozen features, each measured on target images that it did "
        "not see. *Harmful*: the paired 95 % interval of adapted less source-only lies wholly "
        "below 0; *caught*: source-only was kept, or what is served is flagged. *Gaining*: "
        f"{100 * WORTH:.0f} points or more; *lost*: caught all the same. *Gain* and *served* "
        "(less source-only, as by default): points, mean ± standard error."
    )
    kinds = list(dict.fromkeys((r.source, r.target, r.part) for r in rows))
    cells = [("*all*", list(rows))]
    cells += [
        (f"{k[0]} to {k[1]}, {k[2]}", [r for r in rows if (r.source, r.target, r.part) == k])
        for k in kinds
    ]
    lines = []
    for called, some in cells:
        counts = summary(some)
        lines.append((
            called, str(len(some)),
            mean([r.gain for r in some], 0.01, 1),
            mean([r.served - r.source_only for r in some], 0.01, 1),
            f"{counts.caught} of {counts.harmful}", f"{counts.lost} of {counts.gaining}",
        ))  # fmt: skip
    head = ("target", "jobs", "gain", "served", "harmful: caught", "gaining: lost")
    found.table(head, lines)
    counts = summary(rows)
    if rows:
        found.bound(
            f"at least 80 % of harmful ones caught: {share(counts.caught, counts.harmful)}",
            counts.caught >= LEAST_CAUGHT * counts.harmful,
        )
        found.bound(
            f"at most 10 % of gaining ones lost: {share(counts.lost, counts.gaining)}",
            counts.lost <= MOST_LOST * counts.gaining,
        )
    else:
        found.say("Skipped: no two sets have the same classes.")
    return found
