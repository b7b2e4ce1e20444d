"""Measures whether what Graft reports is true; what `make quality` runs.

    python -m bench.quality [FOLDER] [--keep FOLDER] [--out FILE] [--jobs N] [--draws N]
                            [--only SECTION ...] [--networks [--epochs N]]

FOLDER holds data sets, each a folder with a folder of images per class; by default those that the
tests use. Writes Markdown to FILE and prints it; exits with 1 where a stated bound is missed.
Features are kept in a folder from run to run.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np

from bench.quality import (
    gates,
    harm,
    harmful,
    images,
    networks,
    probabilities,
    regression,
    reported,
    thousand,
)
from bench.quality.document import Section
from bench.quality.measuring import Measuring, Sets, load

ROOT = Path(__file__).parents[2]
HARM_SEEDS = 3
GATE_RUNS = 2000
"""Simulated comparisons of each setting."""


def _reports(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    sets = measuring.sets.whole
    each = max(1, round(arguments.jobs / len(sets) / len(reported.STRATA)))
    tasks = [
        (name, stratum, seed)
        for seed in range(each)
        for name in sets
        for stratum in reported.STRATA
        if name in measuring.sets.filmed or not reported.is_burst(stratum)
    ]
    return reported.section(*measuring.all(_report, tasks))


def _report(sets: Sets, name: str, stratum: reported.Stratum, seed: int) -> reported.Outcome | None:
    drawn = reported.draw(sets.whole[name], sets.filmed.get(name), stratum, seed)
    return None if drawn is None else reported.measure(drawn)


def _gates(measuring: Measuring, _: argparse.Namespace) -> Section:
    tasks = [(setting, GATE_RUNS, 0) for setting in gates.settings()]
    return gates.section(measuring.all(_gate, tasks)[0])


def _gate(_: Sets, setting: gates.Setting, runs: int, seed: int) -> gates.Outcome:
    return gates.simulate(setting, runs, seed)


def _harm(measuring: Measuring, _: argparse.Namespace) -> Section:
    sets = measuring.sets.whole
    tasks = [
        (source, target, seed)
        for seed in range(HARM_SEEDS)
        for source, target in permutations(sets, 2)
        if sets[source].classes == sets[target].classes
    ]
    return harmful.section([row for rows in measuring.all(_adapted, tasks)[0] for row in rows])


def _adapted(sets: Sets, source: str, target: str, seed: int) -> list[harm.Row]:
    known, asked = sets.whole[source], sets.whole[target]
    return harm.of_pair(
        (source, known.features, np.array(known.classes)[known.targets]),
        (target, asked.features, np.array(asked.classes)[asked.targets]),
        seed,
    )


def _probabilities(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    tasks = [
        (n, per_class, 0) for per_class in probabilities.PER_CLASS for n in measuring.sets.whole
    ]
    answers, _unasked = measuring.all(_asked, tasks)
    trained = []
    if arguments.networks:
        files = images.find(arguments.folder or images.data_root())
        trained = [networks.ask(s, files[n], arguments.keep, arguments.epochs)
                   for n, s in measuring.sets.whole.items()]  # fmt: skip
    return probabilities.section([each for some in answers for each in some], trained)


def _asked(sets: Sets, name: str, per_class: int | None, seed: int) -> list[probabilities.Asked]:
    return probabilities.ask(sets.whole[name], per_class, seed)


def _thousand(measuring: Measuring, _: argparse.Namespace) -> Section:
    return thousand.section(measuring.all(_of_many, [(4, 2.0), (10, 3.0), (4, 0.0)])[0])


def _of_many(sets: Sets, per_class: int, spread: float) -> thousand.Outcome:
    if spread:
        return thousand.measure(*thousand.made(thousand.CLASSES, per_class, spread, 0), 0)
    filmed = list(sets.filmed.values())
    return thousand.measure(*thousand.of_scenes(filmed, thousand.CLASSES, 0), 0)


def _regression(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    tasks = [
        (n, per_class, seed)
        for seed in range(arguments.draws)
        for n in measuring.sets.whole
        for per_class in regression.PER_CLASS
    ]
    return regression.section(measuring.all(_pair, tasks)[0])


def _pair(sets: Sets, name: str, per_class: int, seed: int) -> regression.Pair | None:
    return regression.compare(sets.whole[name], per_class, seed)


SECTIONS: dict[str, Callable[[Measuring, argparse.Namespace], Section]] = {
    "reported": _reports,
    "gate": _gates,
    "harm": _harm,
    "probabilities": _probabilities,
    "thousand": _thousand,
    "regression": _regression,
}


def head(sets: Sets, skipped: list[str], cores: int, seconds: float) -> str:
    """Returns the beginning of the document: what was measured on, and with what."""
    cpu = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        lines = facts.read_text().splitlines()
        cpu = next((row.partition(": ")[2] for row in lines if row.startswith("model name")), cpu)
    measured_on = ", ".join(
        f"{name} ({len(s)} images, {len(s.classes)} classes)" for name, s in sets.whole.items()
    )
    frames = sum(map(len, sets.filmed.values()))
    absent = f" Skipped, since absent: {', '.join(skipped)}." if skipped else ""
    return (
        "# Whether what Graft reports is true\n\n"
        "`make quality` measures this again and writes this file; it fails where a bound is "
        "missed.\n\n"
        f"Measured on {measured_on}, and on {frames} frames of scenes made from them."
        f"{absent} Features of {images.BACKBONE} in fp32. {cores} cores of {cpu}; "
        f"{seconds / 60:.0f} minutes, features kept.\n"
    )


def main() -> None:
    """Runs the measurements; exits with 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of data sets")
    parser.add_argument("--keep", type=Path, default=ROOT / ".quality", help="where features stay")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--jobs", type=int, default=480, help="whose reports are checked, about")
    parser.add_argument("--draws", type=int, default=10, help="held against scikit-learn, a size")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--networks", action="store_true", help="train some too: an hour more")
    parser.add_argument("--epochs", type=int, help="of these, instead of the recipe's")
    arguments = parser.parse_args()
    sets = load(arguments.folder or images.data_root(), arguments.keep, _log)
    skipped = [] if arguments.folder else [n for n in images.WANTED if n not in sets.whole]
    cores = len(os.sched_getaffinity(0))
    began = time.monotonic()
    sections = []
    with Measuring(sets, cores) as measuring:
        for name in arguments.only:
            started = time.monotonic()
            sections.append(SECTIONS[name](measuring, arguments))
            print(sections[-1].markdown(), flush=True)
            _log(f"{name}: {time.monotonic() - started:.0f} s")
    written = [section.markdown() for section in sections]
    beginning = head(sets, skipped, cores, time.monotonic() - began)
    arguments.out.write_text("\n".join([beginning, *written]))
    missed = [promise for s in sections for promise, is_kept in s.bounds if not is_kept]
    if missed:
        sys.exit("missed:\n" + "\n".join(f"  {promise}" for promise in missed))


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
