"""Publish, serve, delete, over and over, while callers of another model go on.

    python -m bench.churn [FOLDER] [--minutes 30] [--callers 2]
    python -m bench.churn [FOLDER] --cycles 5000 [--own-backbones] [--callers 2]

A stable model is called all the time by a few callers of the closed loop; beside
them a churner fine-tunes small models, has each one's first answer, moves an
alias to it, and deletes the model three rounds later. No call may fail that
should succeed, and neither memory, threads nor file descriptors may grow. One
line a minute, a verdict at the end.

With --cycles there are several churners and nothing is trained (see
`bench.instant`): thousands of models in minutes, each on a backbone that all
share, or with --own-backbones each on one of its own.
"""

import argparse
import collections
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from graftml import NO_RETRY, Client, GraftError

from bench.instant import OWN_BACKBONES
from bench.photographs import given_or_written
from bench.running import anonymous_mib, service

KEPT = 3
"""Models of a churner that live at once."""
SETTLED_MIN = 3.0
SETTLED_CYCLES = 1000.0
"""Growth counts from here on: caches and arenas are filled."""
CHURNERS = 4
"""Where nothing is trained."""
LINES = 20
"""That `--cycles` prints."""


class Tally:
    """What happened so far; written by several threads, each call under the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ok: collections.Counter[str] = collections.Counter()
        self.failed: collections.Counter[str] = collections.Counter()

    def did(self, what: str) -> None:
        """Counts a success."""
        with self._lock:
            self.ok[what] += 1

    def fail(self, what: str, error: Exception) -> None:
        """Counts a failure; the first one is told at once."""
        with self._lock:
            self.failed[f"{what}: {type(error).__name__}"] += 1
            first = self.failed.total() == 1
        if first:
            print(f"the first failure, {what}: {error!r}", flush=True)


def call_all_the_time(
    address: str, images: list[Path], tally: Tally, stop: threading.Event
) -> None:
    """A caller of the stable model."""
    with Client(address, retry=NO_RETRY) as client:
        while not stop.is_set():
            for image in images:
                if stop.is_set():
                    return
                try:
                    client.predict(image, model="stable")
                    tally.did("calls")
                except GraftError as error:
                    tally.fail("call", error)


def churn(
    address: str,
    images: list[Path],
    numbers: Iterator[int],
    tally: Tally,
    stop: threading.Event,
) -> None:
    """Fine-tunes, predicts, moves an alias, deletes."""
    pairs = [(image.parent.name, image) for image in images]
    with Client(address, retry=NO_RETRY) as client:
        living: collections.deque[str] = collections.deque()
        while not stop.is_set():
            name = f"churn-{next(numbers)}"
            try:
                version = client.fine_tune(pairs, name=name).wait(timeout_s=300).version
                tally.did("published")
                client.predict(images[0], model=name)
                client.set_alias(name, "live", version)
                client.predict(images[1], model=name, alias="live")
                tally.did("served")
                living.append(name)
                if len(living) > KEPT:
                    client.delete_model(living.popleft(), force=True)
                    tally.did("deleted")
            except GraftError as error:
                tally.fail("churn", error)


@dataclass(frozen=True)
class Seen:
    """What the service took, at one moment."""

    at: float
    """Minutes or cycles."""
    mib: float
    descriptors: int
    threads: int


def watch(
    pid: int, tally: Tally, now: Callable[[], float], every: float, last: float, unit: str
) -> list[Seen]:
    """Looks whenever `now` has got on by `every`, until it has come to `last`; a line each."""
    process = psutil.Process(pid)
    seen: list[Seen] = []
    while (due := (len(seen) + 1) * every) <= last:
        while now() < due:
            time.sleep(0.1)
        seen.append(Seen(now(), anonymous_mib(pid), process.num_fds(), process.num_threads()))
        print(
            f"{seen[-1].at:5.0f} {unit}: {dict(tally.ok)}, failed {tally.failed.total()}, "
            f"{seen[-1].mib:.1f} MiB, {seen[-1].descriptors} fds, {seen[-1].threads} threads",
            flush=True,
        )
    return seen


def print_verdict(seen: list[Seen], settled: float, unit: str) -> None:
    """How memory, file descriptors and threads went since they had settled."""
    seen = [each for each in seen if each.at >= settled] or seen
    if len(seen) < 2:
        return
    places = [each.at for each in seen]
    slope = statistics.linear_regression(places, [each.mib for each in seen]).slope
    scale = 1 if unit == "min" else 1000
    memory, descriptors, threads = (
        f"{values[0]:.0f} to {values[-1]:.0f} ({min(values):.0f} to {max(values):.0f})"
        for values in (
            [each.mib for each in seen],
            [each.descriptors for each in seen],
            [each.threads for each in seen],
        )
    )
    print(
        f"from {places[0]:.0f} to {places[-1]:.0f} {unit}: memory {memory} MiB, "
        f"{slope * scale:+.2f} MiB per {scale} {unit}; file descriptors {descriptors}; "
        f"threads {threads}"
    )


def main() -> None:
    """Prints the lines and the verdict; exits with 1 when a call failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--cycles", type=int, default=0, help="in the place of minutes")
    parser.add_argument("--own-backbones", action="store_true", help="with --cycles")
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument(
        "--flags", nargs="*", default=[], help="of graft-server run, without the --"
    )
    arguments = parser.parse_args()
    is_fast = arguments.cycles > 0
    if arguments.own_backbones:
        os.environ[OWN_BACKBONES] = "1"
    tally, stop, numbers = Tally(), threading.Event(), itertools.count()
    with given_or_written(arguments.folder) as folder, tempfile.TemporaryDirectory() as data:
        images = [
            photo
            for label in sorted(path for path in folder.iterdir() if path.is_dir())
            for photo in sorted(label.glob("*.jpg"))[: 1 if is_fast else 8]
        ]
        flags = [f"--{flag}" for flag in arguments.flags]
        module = "bench.instant" if is_fast else "service"
        with service(Path(data), *flags, module=module) as running:
            with Client(running.address) as client:
                client.wait_ready(30)
                client.fine_tune(folder, name="stable").wait(timeout_s=600)
            work = [(call_all_the_time, (images, tally, stop))] * arguments.callers
            work += [(churn, (images, numbers, tally, stop))] * (CHURNERS if is_fast else 1)
            threads = [
                threading.Thread(target=target, args=(running.address, *given))
                for target, given in work
            ]
            for thread in threads:
                thread.start()
            if is_fast:
                unit, settled = "cycles", SETTLED_CYCLES
                every, last = arguments.cycles / LINES, float(arguments.cycles)
                seen = watch(running.pid, tally, lambda: tally.ok["served"], every, last, unit)
            else:
                unit, settled, begun = "min", SETTLED_MIN, time.monotonic()
                seen = watch(
                    running.pid, tally, lambda: (time.monotonic() - begun) / 60, 1.0,
                    arguments.minutes, unit,
                )  # fmt: skip
            stop.set()
            for thread in threads:
                thread.join(300)
    print_verdict(seen, settled, unit)
    print(f"done {dict(tally.ok)}; failed {dict(tally.failed) or 'none'}")
    sys.exit(bool(tally.failed))


if __name__ == "__main__":
    main()
