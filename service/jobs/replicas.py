"""Leases: which processes live, and what becomes of the jobs of those that do not.

A process registers under a random id that is never given again, and renews its lease by the
database's clock; no lease is ever compared with another clock. Any replica puts back the jobs
whose owner has no lease. On a database that one process has to itself nobody else lives: what
an earlier process left is put back at the start, without waiting for its lease to end. A stop
is noted there in a file, too, for when the database cannot be written at that time.
"""

import logging
import secrets
from pathlib import Path
from typing import Any

from service.domain import JobState
from service.errors import Reason
from service.jobs import records
from service.jobs.claims import crashed, put_back
from service.jobs.records import JobRecord, StateChanged
from service.jobs.store import JobStore
from service.ops import failpoints
from service.storage.database import Connection, now_s

LEASE_S = 15.0
_DRAINING = (
    " AND EXISTS (SELECT 1 FROM replicas WHERE replicas.replica_id = jobs.owner"
    " AND replicas.is_draining = 1)"
)
_MESSAGE = "the service ended while the trainer worked; the job starts again"
_DRAINED = "drained-"

log = logging.getLogger(__name__)


class Replicas:
    """All replicas, as one of them sees them; every method may be called from any thread."""

    def __init__(
        self,
        jobs: JobStore,
        name: str = "",
        release: str = "",
        lease_s: float = LEASE_S,
        folder: Path | None = None,
    ) -> None:
        """`name` and `release` say for people which machine this is, and which version runs.

        `folder`, the data folder, is where a stop is noted beside an exclusive database.
        """
        self._jobs = jobs
        self._database = jobs.database
        self._name, self._release = name, release
        self._lease_s = lease_s
        self._folder = folder if self.is_alone else None
        self._has_registered = False

    @property
    def is_alone(self) -> bool:
        """Tells whether no other replica can live."""
        return self._database.is_exclusive

    def register(self) -> str:
        """Begins a life of this process; returns its id."""
        replica_id = secrets.token_hex(8)
        drained = list(self._folder.glob(f"{_DRAINED}*")) if self._folder else []
        with self._database.transaction() as connection:
            now = now_s(connection)
            if self.is_alone and not self._has_registered:
                connection.execute("UPDATE replicas SET lease_until_s = 0")
                for file in drained:
                    _mark_draining(connection, file.name.removeprefix(_DRAINED))
            connection.execute(
                "INSERT INTO replicas (replica_id, name, release, lease_until_s)"
                " VALUES (?, ?, ?, ?)",
                (replica_id, self._name, self._release, now + self._lease_s),
            )
        self._has_registered = True
        for file in drained:
            file.unlink(missing_ok=True)
        return replica_id

    def beat(self, replica_id: str) -> bool:
        """Renews a lease; False where the replica was given up, and its jobs with it."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "UPDATE replicas SET lease_until_s = ? WHERE replica_id = ? RETURNING replica_id",
                (now_s(connection) + self._lease_s, replica_id),
            ).fetchone()
            return row is not None

    def drain(self, replica_id: str) -> None:
        """Notes that a replica was told to stop: what it cannot put back has not crashed."""
        if self._folder is not None:
            # First, since it needs no room and waits for nobody who holds the database.
            try:
                _note_of(self._folder, replica_id).touch()
            except OSError:
                log.exception("a stop cannot be noted in the data folder")
        with self._database.transaction() as connection:
            _mark_draining(connection, replica_id)

    def leave(self, replica_id: str) -> None:
        """Ends a life; jobs that are still its own are reaped by the next replica that looks."""
        with self._database.transaction() as connection:
            has_left = connection.execute(
                "DELETE FROM replicas WHERE replica_id = ? AND NOT EXISTS (SELECT 1 FROM jobs"
                " WHERE jobs.state = ? AND jobs.owner = replicas.replica_id)",
                (replica_id, JobState.RUNNING),
            ).rowcount
        if has_left and self._folder is not None:
            _note_of(self._folder, replica_id).unlink(missing_ok=True)

    def reap(self, max_crashes: int) -> list[JobRecord]:
        """Takes running jobs from owners without a lease; returns them as they are then.

        They wait for another attempt, or have failed at `max_crashes`, or are cancelled where
        that was asked for. It counts as a crash, since the job may be why its process died,
        unless that one was draining. Replicas that were given up are forgotten.
        """
        with self._database.transaction() as connection:
            now = now_s(connection)
            changes: dict[str, StateChanged] = {}
            for row in self._orphans(connection, now, _DRAINING, crash=0):
                changes[row["job_id"]] = StateChanged(JobState.QUEUED, None, _MESSAGE)
            for row in self._orphans(connection, now, "", crash=1):
                changes[row["job_id"]] = crashed(
                    Reason.TRAINER_CRASHED, _MESSAGE, row["crashes"], max_crashes
                )
            for job_id, change in changes.items():
                put_back(connection, job_id, records.number(connection, job_id), change)
                self._jobs.note(job_id)
            connection.execute("DELETE FROM replicas WHERE lease_until_s <= ?", (now,))
            reaped = [records.get(connection, job_id) for job_id in changes]
        if reaped:
            failpoints.reach("job.reaped")
        return reaped

    def _orphans(self, connection: Connection, now: float, more: str, *, crash: int) -> list[Any]:
        """Puts running jobs whose owner has no lease back into the queue; returns their rows."""
        return connection.execute(
            "UPDATE jobs SET state = ?, owner = NULL, progress_json = NULL,"  # nosec B608  # noqa: S608 - our words
            " crashes = crashes + ? WHERE state = ? AND NOT EXISTS (SELECT 1 FROM replicas"
            f" WHERE replicas.replica_id = jobs.owner AND replicas.lease_until_s > ?){more}"
            " RETURNING job_id, crashes",
            (JobState.QUEUED, crash, JobState.RUNNING, now),
        ).fetchall()


def mark_all_draining(connection: Connection) -> None:
    """Notes in a copy of a database that no process died of the jobs that run in it."""
    connection.execute("UPDATE replicas SET is_draining = 1")


def _mark_draining(connection: Connection, replica_id: str) -> None:
    connection.execute("UPDATE replicas SET is_draining = 1 WHERE replica_id = ?", (replica_id,))


def _note_of(folder: Path, replica_id: str) -> Path:
    return folder / f"{_DRAINED}{replica_id}"
