"""A worker of jobs on a database that it shares, for processes that are killed and stopped.

`python -m tests.unit.jobs.fencing FOLDER FENCE`: registers as a replica, claims jobs, writes a few
events of each and a row of the table `made` as its version, and takes up what others left; makes
a job where none waits. Each event tells the attempt that wrote it. Where FENCE is "off" its
writes are judged by nothing.
"""

import os
import sqlite3
import sys
from pathlib import Path

from service.contract import Note
from service.domain import JobKind
from service.jobs import records
from service.jobs.claims import Claims, LeaseLost
from service.jobs.records import JobRecord
from service.jobs.replicas import Replicas
from service.jobs.store import JobStore
from service.storage.database import Connection, Database
from service.storage.version_rows import Publication
from tests.unit.jobs.conftest import request
from tests.unit.storage.conftest import manifest

LEASE_S = 0.3
EVENTS = 8
MOST_CRASHES = 10**9


class WithoutFence(Claims):
    """Writes whatever became of its claim."""

    def _fence(
        self,
        connection: Connection,
        job: JobRecord,
        column: str = "",
        value: str = "",
        *,
        numbers: int = 1,
    ) -> tuple[int, float]:
        del column, value, numbers
        return records.number(connection, job.job_id)


def work(claims: Claims, job: JobRecord, replicas: Replicas) -> bool:
    """Does a claimed job to its end; False where the replica was given up meanwhile."""

    def publish(connection: Connection) -> Publication:
        connection.execute(
            "INSERT INTO made (job_id, attempt) VALUES (?, ?)", (job.job_id, job.attempts)
        )
        return Publication(1, manifest(job.job_id))

    for _ in range(EVENTS):
        if not replicas.beat(job.owner):
            return False
        claims.append(job, Note("info", str(job.attempts)))
    claims.succeed(job, publish)
    return True


def run(claims: Claims, jobs: JobStore, replicas: Replicas) -> None:
    while True:
        owner = replicas.register()
        is_alive = True
        while is_alive and replicas.beat(owner):
            replicas.reap(MOST_CRASHES)
            job = claims.claim(owner, JobKind.FINE_TUNE, ["auto"])
            if job is None:
                jobs.create(request(), "", b"")
                continue
            try:
                is_alive = work(claims, job, replicas)
            except (LeaseLost, sqlite3.IntegrityError):
                continue  # the schema, too, knows which changes of state are legal


def main() -> None:
    database = Database(Path(sys.argv[1]), busy_timeout_s=300, is_exclusive=False)
    jobs = JobStore(database, 10**6)
    claims = Claims(jobs) if sys.argv[2] == "on" else WithoutFence(jobs)
    run(claims, jobs, Replicas(jobs, str(os.getpid()), lease_s=LEASE_S))


if __name__ == "__main__":
    main()
