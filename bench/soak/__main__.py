"""Everything at once, for as long as it takes to trust the service: `make soak MINUTES=30`.

    python -m bench.soak [FOLDER] [--minutes 30] [--out soak] [--seed 0]

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
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from graftml import Client

from bench.photographs import given_or_written
from bench.soak import drawing, verdict
from bench.soak.book import Book
from bench.soak.certificate import write_certificate
from bench.soak.hostile import Abandoning, Hostile, seen
from bench.soak.killing import Killer
from bench.soak.load import Order, Target
from bench.soak.recording import Loading, Recorder, Shares
from bench.soak.served import Served, Tenant, write_access
from bench.soak.tuning import (
    STABLE,
    Pace,
    Pairs,
    Tuner,
    cancel_a_job,
    make_stable,
    subsets,
    sure_labels,
)
from bench.soak.using import Datasets, Exports, OpenInference, Rankings
from service.ops.cpus import describe

PART = 0.7
CALLERS = 16
LOAD_TIMEOUT_S = 10.0
SETTLE_S = 2.0
"""From the last call to the last look."""
_JOIN_S = 400.0

Step = Callable[[], object]


class Soak:
    """One soak of a server that runs, with the threads that do it."""

    def __init__(
        self, served: Served, tenants: list[Tenant], folder: Path, seed: int, *, trains: bool
    ) -> None:
        self.book = Book()
        self.known: dict[str, int] = {}
        """Images of the steady load that each tenant's stable model surely knows."""
        self._trains = trains
        self.stop = threading.Event()
        self._served = served
        self._tenants = tenants
        self._data = subsets(folder)
        self._seed = seed
        self._stack = ExitStack()
        self._threads: list[threading.Thread] = []
        self.clients = {
            tenant.name: self._stack.enter_context(tenant.client(served.door)) for tenant in tenants
        }

    def prepare(self) -> None:
        """A stable model of each tenant."""
        for tenant in self._tenants:
            make_stable(self.clients[tenant.name], self.book, tenant, self._of(tenant)[0])

    def load(self, part: float, capacity_s: float, max_rate: float) -> Loading:
        """Measures what the server carries, and begins to send a part of that."""
        photos = [str(photo) for pairs in self._data for _, photo in pairs]
        door = self._served.door
        return Loading(
            Order(
                door.address, door.certificate.decode(), door.key.decode(), photos,
                [self._target(tenant) for tenant in self._tenants], CALLERS, capacity_s, part,
                max_rate, LOAD_TIMEOUT_S, self._seed,
            ),
            self.book,
        )  # fmt: skip

    def _target(self, tenant: Tenant) -> Target:
        pairs = [pair for some in self._of(tenant) for pair in some]
        labels = sure_labels(self.clients[tenant.name], pairs)
        self.known[tenant.name] = len([label for label in labels if label])
        if self._trains:
            # Else nothing would tell a wrong label from a right one.
            enough = 2 * self.known[tenant.name] >= len(labels)
            self.book.expect("a stable model is sure of little", enough, f"{self.known}")
        classes = sorted({label for label, _ in pairs})
        return Target(tenant.reader, STABLE, classes, labels)

    def _of(self, tenant: Tenant) -> list[Pairs]:
        return [[(tenant.label(label), photo) for label, photo in pairs] for pairs in self._data]

    def begin(self, pace: Pace) -> None:
        """Starts the threads."""
        book, door = self.book, self._served.door
        for number, tenant in enumerate(self._tenants):
            client, seed = self.clients[tenant.name], self._seed + 100 * number
            others = [each for each in self._tenants if each is not tenant]
            data, photo = self._of(tenant), self._data[0][0][1]
            tuner = Tuner(client, book, tenant, data, seed, has_gates=self._trains)
            hostile = Hostile(door, book, tenant, others[0] if others else None, photo, seed + 1)
            abandoning = Abandoning(door, book, tenant, photo, seed + 2)
            protocol = OpenInference(door, book, tenant, photo, seed + 3)
            for each in (hostile, abandoning, protocol):
                self._stack.callback(each.close)
            # What one tenant does a period, two do in two.
            many = len(self._tenants)
            for name, every_s, step in (
                ("tuner", pace.fine_tune_s, tuner.step),
                ("canceller", pace.cancel_s, self._canceller(client, tenant, data[1], seed + 4)),
                # Equal ones of both tenants.
                ("datasets", pace.dataset_s, Datasets(client, book, self._data[2], seed + 5).step),
                ("exports", pace.export_s, Exports(client, book, tenant, data[0]).step),
                ("hostile", pace.hostile_s, hostile.step),
                ("abandoning", pace.abandon_s, abandoning.step),
                ("protocol", pace.look_s, protocol.step),
                ("looker", pace.look_s, lambda client=client: seen(client, book)),  # type: ignore[misc]
            ):
                self._repeat(f"{name} of {tenant.name}", every_s * many, step, number / many)
            if self._trains:
                ranked = Rankings(client, book, data[3])
                phase = (number + 0.5) / many
                self._repeat(f"rankings of {tenant.name}", pace.rank_s * many, ranked.step, phase)
        killer = Killer(self._served, book, self.stop, self._seed + 7)
        self._repeat("killer", pace.kill_s, killer.step, 0.5)

    def end(self) -> None:
        """Lets every thread end what it is at."""
        self.stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
            self.book.expect("a call never ended", not thread.is_alive(), thread.name)

    def close(self) -> None:
        """Ends the connections."""
        self._stack.close()

    def _repeat(self, name: str, every_s: float, step: Step, phase: float) -> None:
        def repeat() -> None:
            with self.book.at_work(name):
                due_s = self.book.now_s() + every_s * phase
                while not self.stop.wait(max(0.0, due_s - self.book.now_s())):
                    # One that takes longer than its period does not catch up.
                    due_s = max(due_s + every_s, self.book.now_s())
                    step()

        thread = threading.Thread(target=repeat, name=name)
        self._threads.append(thread)
        thread.start()

    def _canceller(self, client: Client, tenant: Tenant, pairs: Pairs, seed: int) -> Step:
        draw = random.Random(seed)
        return lambda: cancel_a_job(
            client, self.book, tenant, pairs, self.stop, draw.choice([0.0, draw.uniform(0, 2)])
        )


def run(arguments: argparse.Namespace, folder: Path, data_dir: Path) -> int:
    """The whole soak; returns the exit code."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    flags = [f"--{flag}" for flag in arguments.flags]
    tenants = [Tenant("default")]
    if arguments.access == "yes":
        access_file = data_dir.parent / "access.toml"
        tenants = write_access(access_file, ["acme", "globex"])
        flags.append(f"--access-file={access_file}")
    pair = (b"", b"")
    if arguments.tls == "yes":
        pair, files = write_certificate(data_dir.parent)
        flags += files
    with ExitStack() as stack:
        served = Served(data_dir, arguments.module, flags, *pair)
        stack.callback(served.kill)
        trains = arguments.module == "service"
        soak = Soak(served, tenants, folder, arguments.seed, trains=trains)
        stack.callback(soak.close)
        _on_signals(partial(_interrupted, soak.stop))
        samples, shares = _drive(soak, served, tenants, arguments, stack)
        # Calls that are under way at a drain may take as long as they like.
        soak.close()
        drain_s = verdict.server_ends_well(soak.book, served)
    book = soak.book
    with book.at_work("the check of the stores"):
        verdict.stores_are_sound(book, data_dir)
    (out / "service.log").write_bytes(served.log_file.read_bytes())
    if samples:
        minutes = samples[-1]["at_s"] / 60
        title = f"Graft under mixed load, {minutes:.0f} min, {describe().available_cores} cores"
        (out / "soak.svg").write_text(drawing.draw(samples, book.marks, title))
    text = (
        f"{verdict.table(book)}\n\n{verdict.summary(book, samples)}\n"
        f"drained in {drain_s:.1f} s; {verdict.machine(shares)}\n{verdict.findings(book)}\n"
    )
    print(text)
    (out / "soak.md").write_text(text)
    return 1 if book.findings.counts else 0


def _drive(
    soak: Soak,
    served: Served,
    tenants: list[Tenant],
    arguments: argparse.Namespace,
    stack: ExitStack,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """From the first model to the last call; gives the samples, and who used the processors."""
    book, loading, recorder = soak.book, None, None
    shares: dict[str, float] = {}
    try:
        soak.prepare()
        loading = soak.load(arguments.part, arguments.capacity, arguments.max_rate)
        stack.callback(loading.kill)
        started = loading.started
        print(
            f"{describe()}, {len(tenants)} tenants, access "
            f"file {arguments.access}, TLS {arguments.tls}, seed {arguments.seed}, "
            f"{arguments.minutes:g} minutes, flags {arguments.flags}\n"
            f"capacity {started.capacity:.1f} calls/s, steady load {started.rate:.1f} calls/s, "
            f"images with a label that is checked: {soak.known}",
            flush=True,
        )
        book.begin()
        used = Shares(served, loading)
        file = arguments.out / "samples.jsonl"
        recorder = Recorder(served, loading, book, file, arguments.pace.sample_s)
        soak.begin(arguments.pace)
        while book.now_s() < arguments.minutes * 60 and served.is_alive:
            if soak.stop.wait(min(1.0, max(0.0, arguments.minutes * 60 - book.now_s()))):
                break
        shares = used.percent()
    except Exception as error:
        book.find("the soak could not go on", repr(error))
    soak.end()
    if loading is not None:
        loading.end()
        verdict.load_is_carried(book, loading.outcomes)
    for tenant in tenants:
        with book.at_work("the search for what is lost"):
            verdict.nothing_is_lost(soak.clients[tenant.name], book, tenant)
    if recorder is None:
        return [], shares
    time.sleep(min(SETTLE_S, 10 * arguments.minutes))
    recorder.stop()
    verdict.nothing_piles_up(book, recorder.samples)
    return recorder.samples, shares


def _on_signals(then: Callable[..., object]) -> None:
    # Its server has a session of its own, and would outlive a soak that just dies.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, then)


def _interrupted(stop: threading.Event, *_: object) -> None:
    # The second time it is meant.
    _on_signals(signal.default_int_handler)
    print("ending with what there is", flush=True)
    stop.set()


def main() -> None:
    """Runs it; exits with 1 when there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder for what comes out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--access", choices=("yes", "no"), default="yes", help="two tenants")
    parser.add_argument("--tls", choices=("yes", "no"), default="yes", help="as production has it")
    parser.add_argument("--part", type=float, default=PART, help="of the capacity, as steady load")
    parser.add_argument("--capacity", type=float, default=20, help="seconds it is measured for")
    parser.add_argument("--max-rate", type=float, default=2000, help="of the steady load, calls/s")
    parser.add_argument("--faster", type=float, default=1, help="all else, so many times as often")
    parser.add_argument("--module", default="service", help="bench.instant trains nothing")
    parser.add_argument(
        "--flags", nargs="*", default=[], help="of graft-server run, without the --"
    )
    arguments = parser.parse_args()
    _on_signals(signal.default_int_handler)
    arguments.pace = Pace().faster(arguments.faster)
    with (
        given_or_written(arguments.folder) as folder,
        tempfile.TemporaryDirectory(prefix="graft-soak-") as temporary,
    ):
        inner = folder / "train"
        sys.exit(run(arguments, inner if inner.is_dir() else folder, Path(temporary) / "data"))


if __name__ == "__main__":
    main()
