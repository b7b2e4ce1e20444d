"""Measures how good heads are and whether what Graft reports is true; `make quality` runs it.

    python -m bench.quality [FOLDER] [--keep FOLDER] [--out FILE] [--jobs N] [--draws N]
                            [--only SECTION ...] [--networks [--epochs N]]

FOLDER holds data sets, each a folder with a folder of images per class; by default those that the
tests use. Writes Markdown to FILE and prints it; exits with 1 where a stated bound is missed.
Features are kept in a folder from run to run.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench.quality import (
    accuracy,
    decisions,
    gates,
    harm,
    images,
    outliers,
    probabilities,
    quantised,
    ranking,
    reported,
    thousand,
)
from bench.quality.document import Section
from bench.quality.frozen_job import Cost, Stopwatch
from bench.quality.measuring import Measuring, Sets, load
from service.ops.cpus import available_cores, describe

ROOT = Path(__file__).parents[2]

SECTIONS: dict[str, Callable[[Measuring, argparse.Namespace], Section]] = {
    "accuracy": accuracy.run,
    "decisions": decisions.run,
    "outliers": outliers.run,
    "ranking": ranking.run,
    "reported": reported.run,
    "gate": gates.run,
    "harm": harm.run,
    "probabilities": probabilities.run,
    "int8": quantised.run,
    "thousand": thousand.run,
}
"""In their order on the page; each measures and writes down its own."""


def head(sets: Sets, skipped: list[str], cost: Cost) -> str:
    """Returns the beginning of the document: what was measured on, and with what."""
    measured_on = ", ".join(
        f"{name} ({len(s)} images, {len(s.classes)} classes)" for name, s in sets.whole.items()
    )
    frames = sum(map(len, sets.filmed.values()))
    absent = f" Skipped, since absent: {', '.join(skipped)}." if skipped else ""
    return (
        "# How good Graft's heads are, and whether what it reports is true\n\n"
        "`make quality` measures this again and writes this file; it fails where a bound is "
        "missed.\n\n"
        f"Measured on {measured_on}, and on {frames} frames of scenes made from them."
        f"{absent} Features of {images.BACKBONE} in fp32. {describe()}; "
        f"{cost.seconds / 60:.0f} minutes, features kept ({cost.processor_s / 60:.0f} minutes of "
        "processor time).\n"
    )


def main() -> None:
    """Runs the measurements; exits with 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of data sets")
    parser.add_argument("--keep", type=Path, default=ROOT / ".quality", help="where features stay")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence" / "quality.md")
    parser.add_argument("--jobs", type=int, default=480, help="whose reports are checked, about")
    parser.add_argument("--draws", type=int, default=10, help="held against scikit-learn, a size")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--networks", action="store_true", help="train some too: an hour more")
    parser.add_argument("--epochs", type=int, help="of these, instead of the recipe's")
    arguments = parser.parse_args()
    folder = arguments.folder or images.data_root()
    sets = load(folder, arguments.keep, _log, has_frames=set(arguments.only) != {"int8"})
    skipped = [] if arguments.folder else [n for n in images.WANTED if n not in sets.whole]
    stopwatch = Stopwatch()
    sections = []
    with Measuring(sets, available_cores()) as measuring:
        for name in arguments.only:
            section_s = Stopwatch()
            sections.append(SECTIONS[name](measuring, arguments))
            print(sections[-1].markdown(), flush=True)
            _log(f"{name}: {section_s.cost().seconds:.0f} s")
    written = [section.markdown() for section in sections]
    beginning = head(sets, skipped, stopwatch.cost())
    arguments.out.write_text("\n".join([beginning, *written]))
    missed = [promise for s in sections for promise, is_kept in s.bounds if not is_kept]
    if missed:
        sys.exit("missed:\n" + "\n".join(f"  {promise}" for promise in missed))


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
