"""Uploads of many images: seconds, and memory of the service and of its readers.

    python -m bench.upload [FOLDER] [--images 10000] [--classes 10] [--runs 3]

FOLDER holds photos in a folder per class, of which the images are made as by
`bench.scale`; without one the photographs of scikit-learn stand in. Each run has a
service of its own. Memory is what processes have filled without pages of files, looked at
twenty times a second.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from graftml import Client

from bench.photographs import given_or_written
from bench.running import anonymous_mib, service, spread
from bench.scale import write

_LOOK_S = 0.05


class Peaks(threading.Thread):
    """Watches a process and its children; holds the most that each side took, MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._end = threading.Event()
        self.before = anonymous_mib(pid)
        self.service = self.children = 0.0
        # Trainers that wait are none of the upload's.
        self._others = {child.pid for child in self._process.children(recursive=True)}

    def run(self) -> None:
        """Looks until `stop`."""
        while not self._end.wait(_LOOK_S):
            children = [c.pid for c in self._process.children() if c.pid not in self._others]
            self.service = max(self.service, anonymous_mib(self._process.pid))
            total = 0.0
            for pid in children:
                with suppress(OSError, ValueError):
                    total += anonymous_mib(pid)
            self.children = max(self.children, total)

    def stop(self) -> None:
        """Ends the watch."""
        self._end.set()
        self.join()


def measure(folder: Path, data_dir: Path) -> tuple[float, float, float, float]:
    """Uploads a folder once: seconds, the service's MiB before and at most, its readers' MiB."""
    with service(data_dir, "--warm-trainers=0") as running, Client(running.address) as client:
        peaks = Peaks(running.pid)
        peaks.start()
        started = time.monotonic()
        client.upload_dataset(folder)
        seconds = time.monotonic() - started
        peaks.stop()
    return seconds, peaks.before, peaks.service, peaks.children


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the median of the runs, least and most."""
    parser = argparse.ArgumentParser(description="uploads of many images: seconds and memory")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as temporary,
        given_or_written(given.folder) as photographs,
    ):
        photos = sorted(path for path in photographs.rglob("*") if path.is_file())
        folder = write(photos, Path(temporary) / "images", given.images, given.classes)
        rows = [measure(folder, Path(temporary) / f"data{run}") for run in range(given.runs)]
    names = ("seconds", "service before, MiB", "service at most, MiB", "readers at most, MiB")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name:22} {spread(values)}, n = {len(rows)}")


if __name__ == "__main__":
    main()
