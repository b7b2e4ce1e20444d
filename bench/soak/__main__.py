"""Everything at once, for as long as it takes to trust the service: `make soak MINUTES=30`.

    python -m bench.soak [FOLDER] [--minutes 30] [--out soak.md]

A server with default settings and two tenants carries a steady load of Predict calls
at 70 % of what it was measured to carry. Beside that models are made, served, rolled
back and deleted, trainers are killed, datasets come and go, input is bad, and callers
give up. Every call has outcomes that are right for it; any other is a finding, as is
a job or a version that is lost, a store that the disk does not bear out, or a server
that does not end well. Exits with 1 when there is one. FOLDER holds JPEG photos in a
folder per class; without one the photographs of scikit-learn are cut to pieces.
docs/evidence/soak.md tells how to read what comes out.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bench.photographs import given_or_written
from bench.running import Running, measured, service
from bench.soak import verdict
from bench.soak.book import Book
from bench.soak.hostile import Hostile
from bench.soak.models import STABLE, User
from bench.soak.server import Killer, Sample, Tenant, read_log, watch, write_access
from service import fsck
from service.ops.cpus import describe

PART = 0.7
"""Of what can be carried, as steady load."""
CALLERS = 16
SETTLE_S = 2.0
"""From the last call to the last look."""
DRAIN_TIMEOUT_S = 90.0
_JOIN_S = 400.0
KILL_S = 45.0
MIN_KILLS = 3
"""Tries of which one at least must find a trainer at work."""
EVERY_S: dict[str, float] = {
    "fine_tune": 20, "cancel": 25, "upload": 8, "export": 15, "rank": 180, "look": 3,
    "attack": 0.4, "abandon": 0.7,
}  # fmt: skip
"""How often each of these is done, by the tenants in turn."""


class Soak:
    """A server that runs, with the threads that use it."""

    def __init__(self, running: Running, tenants: list[Tenant], arguments: argparse.Namespace):
        self.book = Book()
        self.stop = threading.Event()
        self.samples: list[Sample] = []
        self.loads: dict[str, dict[str, Any]] = {}
        self._running = running
        self._tenants = tenants
        self._arguments = arguments
        self._threads: list[threading.Thread] = []

    def run(self, folder: Path, data_dir: Path) -> None:
        """Goes from the first model to the last call, and looks for what is lost."""
        arguments, running, book, stop = self._arguments, self._running, self.book, self.stop
        trains, seconds = arguments.module == "service", arguments.minutes * 60
        many = len(self._tenants)
        with ExitStack() as stack:
            users = []
            for tenant in self._tenants:
                users.append(User(running.address, book, tenant, folder, trains=trains))
                stack.callback(users[-1].close)
            try:
                for user in users:
                    user.make_stable()
                rate = self._rate(folder)
                book.begun = time.monotonic()
                for number, (user, tenant) in enumerate(zip(users, self._tenants, strict=True)):
                    self._start(partial(self._load, tenant, folder, rate / many, seconds))
                    hostile = Hostile(running.address, book, tenant, user.data[0][0][1])
                    stack.callback(hostile.close)
                    steps: dict[str, Callable[[], object]] = {
                        "fine_tune": user.fine_tune, "cancel": partial(user.cancel, stop),
                        "upload": user.upload, "export": user.export, "look": user.look,
                        "attack": hostile.attack, "abandon": hostile.abandon,
                    }  # fmt: skip
                    if trains:
                        steps["rank"] = user.rank
                    for name, step in steps.items():
                        # What one tenant would do a period, two do in two.
                        self._repeat(name, EVERY_S[name] * many, step, number / many)
                self._repeat("kill", KILL_S, Killer(running, data_dir, book, stop).step, 0.5)
                self._start(partial(watch, running, book, stop, self.samples))
                stop.wait(seconds)
            except Exception as error:
                book.find("the soak could not go on", repr(error))
            stop.set()
            for thread in self._threads:
                thread.join(_JOIN_S)
                book.expect("a call never ended", not thread.is_alive(), thread.name)
            for user in users:
                user.is_sound()
            killed = [job for job in book.jobs.values() if job.is_killed]
            is_due = trains and book.now_s() > MIN_KILLS * KILL_S
            book.expect("no trainer was killed", not is_due or bool(killed), "none was at work")
            # Once more, when nothing is asked.
            time.sleep(SETTLE_S)
            watch(running, book, stop, self.samples)

    def _to(self, tenant: Tenant, folder: Path) -> list[object]:
        return [
            self._running.address, folder, "--pid", self._running.pid, "--models", STABLE,
            "--token", tenant.reader, "--labels", f"{tenant.name}-", "--timeout", 10,
        ]  # fmt: skip

    def _rate(self, folder: Path) -> float:
        arguments = self._arguments
        to = self._to(self._tenants[0], folder)
        found = measured("load", *to, "--callers", CALLERS, "--seconds", arguments.capacity)
        self.book.expect("calls failed alone", found["errors"] == 0, found["codes"])
        rate: float = min(PART * found["per_second"], arguments.max_rate)
        print(
            f"{describe()}; {arguments}\ncapacity {found['per_second']:.1f} calls/s, steady load "
            f"{rate:.1f} calls/s",
            flush=True,
        )
        return rate

    def _load(self, tenant: Tenant, folder: Path, rate: float, seconds: float) -> None:
        to = self._to(tenant, folder)
        command = [sys.executable, "-m", "bench.serve.load", *map(str, to)]
        command += ["--rate", str(rate), "--seconds", str(seconds), "--warm-up", "0"]
        with self.book.at_work(f"the load of {tenant.name}"):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
            try:
                self.stop.wait()
                # A load that is told to end early has no figures.
                if self.book.now_s() >= seconds:
                    out, _ = process.communicate(timeout=_JOIN_S / 2)
                    self.loads[tenant.name] = json.loads(out)
                    verdict.load_is_carried(self.book, self.loads[tenant.name])
            finally:
                process.kill()
                process.wait()

    def _repeat(
        self, name: str, every_s: float, step: Callable[[], object], phase: float
    ) -> None:  # fmt: skip
        every_s /= self._arguments.faster

        def repeat() -> None:
            with self.book.at_work(name):
                due_s = self.book.now_s() + every_s * phase
                while not self.stop.wait(max(0.0, due_s - self.book.now_s())):
                    # One that takes longer than its period does not catch up.
                    due_s = max(due_s + every_s, self.book.now_s())
                    step()

        self._start(repeat)

    def _start(self, work: Callable[[], object]) -> None:
        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()


def on_signals(then: Callable[..., object]) -> None:
    """Does so at SIGINT and SIGTERM; its server would outlive a soak that just dies."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, then)


def _interrupted(stop: threading.Event, *_: object) -> None:
    # The second time it is meant.
    on_signals(signal.default_int_handler)
    print("ending with what there is", flush=True)
    stop.set()


def run(arguments: argparse.Namespace, folder: Path, work: Path) -> int:
    """Runs the whole soak; returns the exit code."""
    data_dir = work / "data"
    tenants = write_access(work / "access.toml", ["acme", "globex"])
    flags = [f"--access-file={work / 'access.toml'}", *(f"--{flag}" for flag in arguments.flags)]
    with service(data_dir, *flags, module=arguments.module, keeps_features=True) as running:
        soak = Soak(running, tenants, arguments)
        on_signals(partial(_interrupted, soak.stop))
        soak.run(folder, data_dir)
        begun = time.monotonic()
        running.process.terminate()
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = running.process.wait(DRAIN_TIMEOUT_S)
        drained_s = time.monotonic() - begun
    verdict.nothing_piles_up(soak.book, soak.samples)
    verdict.server_ended_well(soak.book, code, *read_log(data_dir / "service.log"))
    for line in fsck.problems(data_dir):
        soak.book.find("the stores are broken", line)
    text = verdict.report(soak.book, soak.samples, soak.loads)
    print(f"{text}drained in {drained_s:.1f} s")
    arguments.out.write_text(text)
    return 1 if soak.book.findings else 0


def main() -> None:
    """Runs it; exits with 1 when there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("soak.md"), help="file for the tables")
    parser.add_argument("--capacity", type=float, default=20, help="seconds it is measured for")
    parser.add_argument("--max-rate", type=float, default=2000, help="of the steady load, calls/s")
    parser.add_argument("--faster", type=float, default=1, help="all else, so many times as often")
    parser.add_argument("--module", default="service", help="bench.instant trains nothing")
    parser.add_argument(
        "--flags", nargs="*", default=[], help="of graft-server run, without the --"
    )
    arguments = parser.parse_args()
    on_signals(signal.default_int_handler)
    with (
        given_or_written(arguments.folder) as folder,
        tempfile.TemporaryDirectory(prefix="graft-soak-") as work,
    ):
        inner = folder / "train"
        sys.exit(run(arguments, inner if inner.is_dir() else folder, Path(work)))


if __name__ == "__main__":
    main()
