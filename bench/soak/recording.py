"""What is seen of the server every second, kept as JSON lines and for the image."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench.soak.book import OK, REFUSALS, Book
from bench.soak.load import Order, Started, Window
from bench.soak.served import Served

PREDICT = "Predict, the steady load"
_STORED_EVERY = 10
"""Samples: a walk through all files."""
_MAY = frozenset({OK, *REFUSALS})


class Loading:
    """The process that sends the steady load."""

    def __init__(self, order: Order, book: Book) -> None:
        self._book = book
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.soak.load"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the load could not be started")
        self.started = msgspec.json.decode(line, type=Started)
        self.outcomes: Counter[str] = Counter()
        self._new: list[Window] = []
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="load")
        self._reader.start()

    def cpu_s(self) -> float:
        """Processor time of its process, which must live."""
        return float(sum(psutil.Process(self._process.pid).cpu_times()[:2]))

    def windows(self) -> list[Window]:
        """What ended since this was last asked for."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def end(self) -> None:
        """Lets the calls under way end. One that died is a finding."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join()
        self._book.expect("the load died", code == 0, f"with code {code}")

    def kill(self) -> None:
        """Ends it at once, where it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._book.at_work("the reader of the load"):
            for line in self._process.stdout:
                window = msgspec.json.decode(line, type=Window)
                self.outcomes.update(window.outcomes)
                for outcome, count in window.outcomes.items():
                    self._book.count(PREDICT, outcome, _MAY, window.sample, count)
                with self._lock:
                    self._new.append(window)


class Shares:
    """Who used the machine's processors since this was made."""

    def __init__(self, served: Served, loading: Loading) -> None:
        self._of = {
            "server and trainers": served.cpu_s,
            "load generator": loading.cpu_s,
            "driver": lambda: float(sum(psutil.Process().cpu_times()[:2])),
            "everything": _busy_s,
        }
        self._begun = time.monotonic()
        self._before = self._now()

    def percent(self) -> dict[str, float]:
        """Of all processors together; `others` is what is none of the soak's."""
        all_s = (time.monotonic() - self._begun) * (psutil.cpu_count() or 1)
        now = self._now()
        used = {name: 100 * (now[name] - before) / all_s for name, before in self._before.items()}
        return {**used, "others": 2 * used["everything"] - sum(used.values())}

    def _now(self) -> dict[str, float]:
        return {name: cpu_s() for name, cpu_s in self._of.items()}


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times[:7]) - times.idle - times.iowait)


class Recorder:
    """Samples the server until it is stopped."""

    def __init__(
        self, served: Served, loading: Loading, book: Book, file: Path, every_s: float
    ) -> None:
        self.samples: list[dict[str, Any]] = []
        self._served = served
        self._loading = loading
        self._book = book
        self._file = file
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._thread.start()

    def stop(self) -> None:
        """Takes the last sample."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._book.at_work("the recorder"), self._file.open("w") as file:
            while True:
                is_last = self._stop.wait(self._every_s)
                try:
                    sample = self._sample()
                except (OSError, psutil.Error, KeyError) as error:
                    self._book.find("the server cannot be looked at", repr(error))
                else:
                    self.samples.append(sample)
                    file.write(json.dumps(sample) + "\n")
                if is_last:
                    return
                if not self._served.is_alive:
                    self._book.find("the server ended", "it must serve to the end")
                    return

    def _sample(self) -> dict[str, Any]:
        now = self._served.figures()
        windows = self._loading.windows()
        outcomes: Counter[str] = Counter()
        for window in windows:
            outcomes.update(window.outcomes)
        good = outcomes.pop(OK, 0)
        stored = {}
        if len(self.samples) % _STORED_EVERY == 0:
            stored["stored_mib"] = round(self._served.stored_mib(), 2)
        seconds = max(1, len(windows))
        return {
            "at_s": round(self._book.now_s(), 2),
            "pss_mib": round(now.pss_mib, 1),
            "anonymous_mib": round(now.anonymous_mib, 1),
            "descriptors": now.descriptors,
            "threads": now.threads,
            "trainers_mib": round(now.trainers_mib, 1),
            "trainers": now.trainers,
            "jobs": now.jobs,
            "good": good / seconds if windows else None,
            "refused": outcomes.total() / seconds if windows else None,
            "p50_ms": _most(window.p50_ms for window in windows),
            "p99_ms": _most(window.p99_ms for window in windows),
            "lag_p99_ms": _most(window.lag_p99_ms for window in windows),
            **stored,
        }


def _most(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(max(known), 2) if known else None
