"""How long the service takes to be SERVING, and what it holds and burns while idle.

    python -m bench.start [--runs 5] [--data-dir FOLDER]

Time runs from the start of the process to its word that it serves. Memory (RSS and PSS, MiB)
and CPU are those of the service alone, after 5 s of idleness.
"""

import argparse
import tempfile
import time
from pathlib import Path

import psutil

from bench.running import service, spread
from service.ops.cpus import describe

IDLE_S = 5.0


def measure(data_dir: Path, *flags: str) -> dict[str, float]:
    """Starts the service once and ends it."""
    started = time.monotonic()
    with service(data_dir, *flags, keeps_features=True) as running:
        serving_s = time.monotonic() - started
        watched = psutil.Process(running.pid)
        before = watched.cpu_times()
        time.sleep(IDLE_S)
        after = watched.cpu_times()
        memory = watched.memory_full_info()
        busy_s = (after.user + after.system) - (before.user + before.system)
        return {
            "serving_s": serving_s,
            "rss_mib": memory.rss / 2**20,
            "pss_mib": memory.pss / 2**20,
            "idle_cpu_percent": 100 * busy_s / IDLE_S,
        }


def main() -> None:
    """Prints median and range of every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, help="an existing data folder; else a fresh one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.data_dir or Path(temporary)
        runs = [measure(folder) for _ in range(arguments.runs)]
    print(f"{describe()}, n = {len(runs)}")
    for key in runs[0]:
        print(f"{key:18} {spread([run[key] for run in runs], '.2f')}")


if __name__ == "__main__":
    main()
