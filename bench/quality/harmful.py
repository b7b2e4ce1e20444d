"""Writes down how often adapting to a domain does harm, and how often that is caught."""

import argparse
from collections.abc import Sequence
from itertools import permutations

import numpy as np

from bench.quality import harm
from bench.quality.document import Section, mean, share
from bench.quality.measuring import Measuring, Sets

LEAST_CAUGHT = 0.80
MOST_LOST = 0.10
SEEDS = 3


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


def _adapted(sets: Sets, source: str, target: str, seed: int) -> list[harm.Row]:
    known, asked = sets.whole[source], sets.whole[target]
    return harm.of_pair(
        (source, known.features, np.array(known.classes)[known.targets]),
        (target, asked.features, np.array(asked.classes)[asked.targets]),
        seed,
    )


def section(rows: Sequence[harm.Row]) -> Section:
    """Writes the outcomes by the kind of target, and the two bounds."""
    found = Section("Harm of adapting")
    found.say(
        f"{len(rows)} adaptations on frozen features, each measured on target images that it did "
        "not see. *Harmful*: the paired 95 % interval of adapted less source-only lies wholly "
        "below 0; *caught*: source-only was kept, or what is served is flagged. *Gaining*: "
        f"{100 * harm.WORTH:.0f} points or more; *lost*: caught all the same. *Gain* and *served* "
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
        counts = harm.summary(some)
        lines.append((
            called, str(len(some)),
            mean([r.gain for r in some], 0.01, 1),
            mean([r.served - r.source_only for r in some], 0.01, 1),
            f"{counts.caught} of {counts.harmful}", f"{counts.lost} of {counts.gaining}",
        ))  # fmt: skip
    head = ("target", "jobs", "gain", "served", "harmful: caught", "gaining: lost")
    found.table(head, lines)
    counts = harm.summary(rows)
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
