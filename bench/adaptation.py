"""Measures what adapting to an unlabelled domain brings: every technique, both directions.

    python -m bench.adaptation A B [--seeds 3] [--network] [--epochs N]

A and B are folders with the same classes, a folder per class, of two domains. Each
job learns from one of them with its classes and adapts to the other without; the
target's classes are used to measure with alone, on images that were not adapted to.
Prints the target accuracy of source-only, of each technique on frozen features and of
`auto`; with --network of the one that trains the whole network too, which takes
minutes. Whole jobs of the trainer run, in this process, with one feature cache.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import get_args

import msgspec

from service.contract import (
    NETWORK_TECHNIQUES,
    DomainAdaptation,
    ImageSource,
    JobSpec,
    Technique,
)
from service.ops.cpus import describe
from trainer.reporting.report import Report
from trainer.train import run


def job(
    source: Path, target: Path, method: DomainAdaptation, seed: int, cache: Path
) -> tuple[Report, float]:
    """One whole job; its report, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as out:
        spec = JobSpec(
            job_id="bench",
            model="bench",
            data=ImageSource(folder=str(source.resolve())),
            out_dir=out,
            method=method,
            weights_dir=str(cache.parent / "weights"),
            seed=seed,
            precision="auto",
            target=ImageSource(folder=str(target.resolve())),
            feature_cache=str(cache),
        )
        started = time.monotonic()
        run(spec, lambda _: None)
        seconds = time.monotonic() - started
        return msgspec.json.decode((Path(out) / "report.json").read_bytes(), type=Report), seconds


def main() -> None:
    """Prints a table for each direction."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    one, other = arguments.folders
    techniques: list[Technique] = [
        t for t in get_args(Technique) if arguments.network or t not in NETWORK_TECHNIQUES
    ]
    print(f"{describe()}, {arguments.seeds} seeds")
    means: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "features.sqlite"
        for source, target in ((one, other), (other, one)):
            reached: dict[str, list[float]] = defaultdict(list)
            times: dict[str, list[float]] = defaultdict(list)
            served: dict[str, set[str]] = defaultdict(set)
            for seed in range(arguments.seeds):
                for technique in techniques:
                    method = DomainAdaptation(
                        technique=technique,
                        # `auto` as it is asked for; a technique for what it does itself.
                        always_adapt=technique != "auto",
                        evaluate_on_target=True,
                        epochs=arguments.epochs if technique in NETWORK_TECHNIQUES else None,
                    )
                    report, seconds = job(source, target, method, seed, cache)
                    found = report.adaptation
                    assert found is not None
                    compared = found.comparison
                    assert compared is not None
                    reached[technique].append(compared.accuracy + compared.difference)
                    times[technique].append(seconds)
                    flag = f", flagged {found.doubt}" if found.doubt else ""
                    served[technique].add(found.published + flag)
                    if technique == "auto":
                        reached["source only"].append(compared.accuracy)
            images = report.adaptation.target_images if report.adaptation else 0
            print(f"\n{source.name} to {target.name}, {images} target images")
            for name in ("source only", *techniques):
                values = reached[name]
                means[name].append(statistics.mean(values))
                took = f", {statistics.median(times[name]):6.1f} s" if name in times else ""
                what = f"  ({'; '.join(sorted(served[name]))})" if name in served else ""
                print(
                    f"  {name:14} {statistics.mean(values):.3f} "
                    f"({min(values):.3f} to {max(values):.3f}){took}{what}",
                    flush=True,
                )
    print("\nmean of both directions")
    for name, values in means.items():
        print(f"  {name:14} {statistics.mean(values):.3f}")


if __name__ == "__main__":
    main()
