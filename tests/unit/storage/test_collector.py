"""Whatever dies in between, every blob that a row names is there while the collector runs.

Processes put a few contents, name them and drop them again, a collector with no grace deletes
all the time, and both are killed and stopped; the test reads what rows name all the while. With
the intents switched off the same test must find a hole, or it would see nothing.
"""

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from service.storage.blobs import BlobFolder
from service.storage.collector import Collector
from service.storage.database import Database

ROOT = Path(__file__).parents[3]
GUARD_S = 300.0
ROUNDS = 8
"""Processes that are killed or stopped."""
LOOKS = 20
"""While a process is stopped, or another starts."""
WRITERS = 3


class Processes:
    """Writers and collectors on one folder."""

    def __init__(self, folder: Path, intents: str) -> None:
        self._folder, self._intents = folder, intents
        self._seeds = itertools.count(1)
        self.running: list[subprocess.Popen[bytes]] = []
        for role in ("collect", *["write"] * WRITERS):
            self.start(role)

    def start(self, role: str) -> None:
        self.running.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.unit.storage.collecting"),
                    *(role, self._folder, self._intents, str(next(self._seeds))),
                ],
                cwd=ROOT,
            )
        )

    def harm(self, draw: random.Random) -> "subprocess.Popen[bytes]":
        """Kills one and starts another like it, or stops one; returns it."""
        victim = draw.choice(self.running)
        assert victim.poll() is None, "a process failed by itself"
        if draw.random() < 0.5:
            victim.send_signal(signal.SIGSTOP)
            return victim
        victim.kill()
        victim.wait(GUARD_S)
        self.running.remove(victim)
        self.start(str(victim.args[3]))  # type: ignore[index]
        return victim

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait(GUARD_S)


@contextmanager
def processes(folder: Path, intents: str) -> Iterator[Processes]:
    started = Processes(folder, intents)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def needing(database: Database) -> Iterator[Database]:
    """A database with a table whose rows need blobs, for several processes."""
    with database.transaction() as connection:
        connection.execute(
            "CREATE TABLE needs (id INTEGER PRIMARY KEY AUTOINCREMENT,"
            " digest TEXT NOT NULL REFERENCES blobs (digest))"
        )
        connection.execute("CREATE INDEX needs_by_digest ON needs (digest)")
        connection.execute("CREATE TABLE progress (what TEXT PRIMARY KEY, done INTEGER NOT NULL)")
        connection.execute("INSERT INTO progress VALUES ('named', 0), ('collected', 0)")
        folder = Path(connection.execute("PRAGMA database_list").fetchone()["file"]).parent
    database.close()
    shared = Database(folder, busy_timeout_s=GUARD_S, is_exclusive=False)
    yield shared
    shared.close()


def named(database: Database) -> dict[int, str]:
    """The objects that rows need, by the rows' numbers."""
    with database.read() as connection:
        rows = connection.execute("SELECT * FROM needs JOIN blobs USING (digest)")
        return {row["id"]: f"{row['digest']}-{row['generation']}" for row in rows}


def hole(database: Database, store: BlobFolder) -> str:
    """Looks whether every blob that a row names is there and whole; returns one that is not."""
    for row, name in named(database).items():
        try:
            if sha256(store.path(name).read_bytes()).hexdigest() == name.partition("-")[0]:
                continue
        except FileNotFoundError:
            pass
        # Unless the row has gone since it was read, for no row of that number comes again.
        if row in named(database):
            return name
    return ""


def progress(database: Database) -> dict[str, int]:
    with database.read() as connection:
        return {row["what"]: row["done"] for row in connection.execute("SELECT * FROM progress")}


def test_what_rows_name_is_there_while_the_collector_runs(
    needing: Database, tmp_path: Path
) -> None:
    store = BlobFolder(tmp_path / "data" / "blobs")
    draw = random.Random(20)
    give_up_s = time.monotonic() + GUARD_S
    with processes(tmp_path / "data", "on") as running:
        for _ in range(ROUNDS):
            before = progress(needing)
            victim = running.harm(draw)
            for _ in range(LOOKS):
                assert hole(needing, store) == ""
            victim.send_signal(signal.SIGCONT)
            # Until contents were named, and others collected, after every harm.
            while any(done < before[what] + 5 for what, done in progress(needing).items()):
                assert hole(needing, store) == ""
                assert time.monotonic() < give_up_s, "nothing is named or collected any more"

    # And at rest all that nobody needs goes.
    with needing.transaction() as connection:
        connection.execute("DELETE FROM needs")
    Collector(needing, store, grace_s=0).run()
    assert list(store.names()) == []


def test_without_intents_a_hole_is_found(needing: Database, tmp_path: Path) -> None:
    store = BlobFolder(tmp_path / "data" / "blobs")
    give_up_s = time.monotonic() + GUARD_S
    with processes(tmp_path / "data", "off"):
        while hole(needing, store) == "":
            assert time.monotonic() < give_up_s, "nothing was found"
