"""Whatever dies or stands still, a job ends once, with the version of its last attempt.

Processes work on the jobs of one database with short leases, and are killed, and stopped for
longer than their leases; afterwards the history in the tables is judged. With the fence switched
off the same judge must find something, or it would see nothing.
"""

import itertools
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.contract import Note
from service.domain import JobKind, JobState
from service.jobs import records
from service.jobs.claims import Claims
from service.jobs.records import StateChanged
from service.jobs.replicas import Replicas
from service.jobs.store import JobStore
from service.storage.database import Database
from tests.unit.jobs.fencing import MOST_CRASHES, work

ROOT = Path(__file__).parents[3]
GUARD_S = 300.0
WORKERS = 4
ROUNDS = 7
"""Processes that are killed or stopped, at least; until one has left a job behind."""
LOOKS = 20_000
"""While a process is stopped: it may hold the database, and then nobody takes its jobs."""


class Workers:
    """Worker processes on one database."""

    def __init__(self, folder: Path, fence: str) -> None:
        self._folder, self._fence = folder, fence
        self.running: list[subprocess.Popen[bytes]] = []
        for _ in range(WORKERS):
            self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.unit.jobs.fencing", self._folder, self._fence]
        self.running.append(subprocess.Popen(command, cwd=ROOT))  # type: ignore[arg-type]

    def kill_one(self, draw: random.Random) -> None:
        victim = draw.choice(self.running)
        assert victim.poll() is None, "a worker failed by itself"
        victim.kill()
        victim.wait(GUARD_S)
        self.running.remove(victim)
        self.start()

    @contextmanager
    def one_stopped(self, draw: random.Random) -> Iterator[str]:
        """Yields the name of its replica."""
        victim = draw.choice(self.running)
        assert victim.poll() is None, "a worker failed by itself"
        victim.send_signal(signal.SIGSTOP)
        try:
            yield str(victim.pid)
        finally:
            victim.send_signal(signal.SIGCONT)

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait(GUARD_S)


@contextmanager
def workers(folder: Path, fence: str) -> Iterator[Workers]:
    started = Workers(folder, fence)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "data", busy_timeout_s=GUARD_S, is_exclusive=False)
    with database.transaction() as connection:
        connection.execute("CREATE TABLE made (job_id TEXT NOT NULL, attempt INTEGER NOT NULL)")
    yield database
    database.close()


def count(database: Database, query: str, *values: object) -> int:
    with database.read() as connection:
        return int(connection.execute(query, values).fetchone()[0])


def ended(database: Database) -> int:
    return count(database, "SELECT COUNT(*) FROM jobs WHERE end_time_s IS NOT NULL")


def stop_one(database: Database, running: Workers, draw: random.Random) -> None:
    """Stops a worker until its replica was given up, or for long where nobody can do that."""
    with running.one_stopped(draw) as name:
        for _ in range(LOOKS):
            if not count(database, "SELECT COUNT(*) FROM replicas WHERE name = ?", name):
                return


def wrong(database: Database) -> list[str]:
    """Judges the history of all jobs, under way or ended."""
    found = []
    with database.read() as connection:
        made: dict[str, list[int]] = {}
        for row in connection.execute("SELECT * FROM made"):
            made.setdefault(row["job_id"], []).append(row["attempt"])
        for job in connection.execute("SELECT * FROM jobs").fetchall():
            kept = connection.execute(
                "SELECT sequence, payload_json FROM job_events WHERE job_id = ? ORDER BY sequence",
                (job["job_id"],),
            ).fetchall()
            payloads = [records.decode(row["payload_json"]) for row in kept]
            if [row["sequence"] for row in kept] != list(range(1, job["last_sequence"] + 1)):
                found.append("its events have gaps")
            attempt = 0
            for payload in payloads:
                is_change = isinstance(payload, StateChanged)
                attempt += is_change and payload.state is JobState.RUNNING
                if isinstance(payload, Note) and payload.text != str(attempt):
                    found.append(f"an event of attempt {payload.text} in attempt {attempt}")
            ends = [isinstance(p, StateChanged) and p.state.is_final for p in payloads]
            is_over = job["end_time_s"] is not None
            if any(ends[:-1]) or ends[-1] != is_over:
                found.append("it ended more than once, or not at its end")
            if made.get(job["job_id"], []) != ([job["attempts"]] if is_over else []):
                found.append(f"its versions are of {made.get(job['job_id'])}")
    return found


def test_every_job_ends_once_with_the_version_of_its_last_attempt(
    shared: Database, tmp_path: Path
) -> None:
    draw = random.Random(4)
    give_up_s = time.monotonic() + GUARD_S
    with workers(tmp_path / "data", "on") as running:
        for number in itertools.count():
            if number >= ROUNDS and count(shared, "SELECT SUM(crashes) FROM jobs") > 0:
                break
            # Until jobs have ended after every harm.
            before = ended(shared)
            while ended(shared) < before + WORKERS:
                assert time.monotonic() < give_up_s, "no job ends any more"
            if number % 3 == 2:
                running.kill_one(draw)
            else:
                stop_one(shared, running, draw)

    # At rest one that is left does what was left.
    jobs = JobStore(shared, 10**6)
    claims, replicas = Claims(jobs), Replicas(jobs, lease_s=GUARD_S)
    with shared.transaction() as connection:
        connection.execute("UPDATE replicas SET lease_until_s = 0")
    replicas.reap(MOST_CRASHES)
    owner = replicas.register()
    while (job := claims.claim(owner, JobKind.FINE_TUNE, ["auto"])) is not None:
        assert work(claims, job, replicas)
    assert wrong(shared) == []
    assert ended(shared) == count(shared, "SELECT COUNT(*) FROM jobs")


def test_without_the_fence_the_judge_finds_what_is_wrong(shared: Database, tmp_path: Path) -> None:
    draw = random.Random(4)
    give_up_s = time.monotonic() + GUARD_S
    with workers(tmp_path / "data", "off") as running:
        while not wrong(shared):
            assert time.monotonic() < give_up_s, "nothing was found"
            before = ended(shared)
            while ended(shared) < before + WORKERS:
                assert time.monotonic() < give_up_s, "no job ends any more"
            stop_one(shared, running, draw)
