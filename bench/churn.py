"""Publish, serve, delete, over and over, while callers of another model go on.

    python -m bench.churn [FOLDER] [--minutes 30] [--callers 2]

A stable model is called all the time by a few callers of the closed loop; beside
them a churner fine-tunes small models, has each one's first answer, moves an
alias to it, and deletes the model three rounds later. No call may fail that
should succeed, and neither memory nor file descriptors may grow. One line a
minute, a verdict at the end.
"""

import argparse
import collections
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from graft import NO_RETRY, Client, GraftError

from bench.photographs import given_or_written
from bench.running import pss_mib, service

KEPT = 3
"""Models of the churner that live at once."""
SETTLED_MIN = 3
"""Growth counts from here on: caches and arenas are filled."""


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
    address: str, pictures: list[Path], tally: Tally, stop: threading.Event
) -> None:
    """A caller of the stable model."""
    with Client(address, retry=NO_RETRY) as client:
        while not stop.is_set():
            for picture in pictures:
                if stop.is_set():
                    return
                try:
                    client.predict(picture, model="stable")
                    tally.did("calls")
                except GraftError as error:
                    tally.fail("call", error)


def churn(address: str, pictures: list[Path], tally: Tally, stop: threading.Event) -> None:
    """Fine-tunes, predicts, moves an alias, deletes."""
    pairs = [(picture.parent.name, picture) for picture in pictures]
    with Client(address, retry=NO_RETRY) as client:
        living: collections.deque[str] = collections.deque()
        number = 0
        while not stop.is_set():
            name = f"churn-{number}"
            number += 1
            try:
                version = client.fine_tune(pairs, name=name).wait(timeout_s=300).version
                tally.did("published")
                client.predict(pictures[0], model=name)
                client.set_alias(name, "live", version)
                client.predict(pictures[1], model=name, alias="live")
                tally.did("served")
                living.append(name)
                if len(living) > KEPT:
                    client.delete_model(living.popleft())
                    tally.did("deleted")
            except GraftError as error:
                tally.fail("churn", error)


def watch(pid: int, minutes: float, tally: Tally) -> list[tuple[float, float, int]]:
    """A line a minute; returns minute, MiB and file descriptors."""
    process = psutil.Process(pid)
    seen = []
    for minute in range(1, int(minutes) + 1):
        time.sleep(60)
        mib, fds = pss_mib(pid), process.num_fds()
        seen.append((float(minute), mib, fds))
        print(
            f"{minute:3} min: {dict(tally.ok)}, failed {sum(tally.failed.values())}, "
            f"{mib:.0f} MiB, {fds} fds, {process.num_threads()} threads",
            flush=True,
        )
    return seen


def main() -> None:
    """Prints the lines and the verdict; exits with 1 when a call failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument("--flags", nargs="*", default=[], help="of graft-server, without the --")
    arguments = parser.parse_args()
    tally, stop = Tally(), threading.Event()
    with given_or_written(arguments.folder) as folder, tempfile.TemporaryDirectory() as data:
        pictures = [
            photo
            for label in sorted(path for path in folder.iterdir() if path.is_dir())
            for photo in sorted(label.glob("*.jpg"))[:8]
        ]
        flags = [f"--{flag}" for flag in arguments.flags]
        with service(Path(data), *flags) as running:
            with Client(running.address) as client:
                client.wait_ready(30)
                client.fine_tune(folder, name="stable").wait(timeout_s=600)
            threads = [
                threading.Thread(
                    target=call_all_the_time, args=(running.address, pictures, tally, stop)
                )
                for _ in range(arguments.callers)
            ]
            threads.append(
                threading.Thread(target=churn, args=(running.address, pictures, tally, stop))
            )
            for thread in threads:
                thread.start()
            seen = watch(running.pid, arguments.minutes, tally)
            stop.set()
            for thread in threads:
                thread.join(300)
    settled = [entry for entry in seen if entry[0] >= SETTLED_MIN] or seen
    minutes = [entry[0] for entry in settled]
    if len(settled) > 1:
        slope = statistics.linear_regression(minutes, [entry[1] for entry in settled]).slope
        print(
            f"from minute {minutes[0]:g}: memory {settled[0][1]:.0f} to {settled[-1][1]:.0f} MiB, "
            f"{slope:+.2f} MiB a minute; file descriptors {settled[0][2]} to {settled[-1][2]}"
        )
    print(f"done {dict(tally.ok)}; failed {dict(tally.failed) or 'none'}")
    sys.exit(bool(tally.failed))


if __name__ == "__main__":
    main()
