"""Jobs as workers see them: claimed, and written to under a fence.

Every write of a worker begins with one statement that locks the job's row, judges whether the
claim still holds, `(owner, attempts)`, and numbers the event. Where it does not hold, `LeaseLost`
is raised and nothing is written: the replica was taken for dead, and its job was given to
another. `attempts` only grows, so a claim that was lost never holds again.
"""

from collections.abc import Callable, Collection

import msgspec

from service.contract import BackbonesRanked, DataFound, Progressed
from service.domain import JobKind, JobState
from service.errors import Reason
from service.jobs import records
from service.jobs.records import JobEvent, JobRecord, Payload, Published, StateChanged, record_of
from service.jobs.store import JobStore
from service.ops import failpoints
from service.storage import dataset_rows, holds
from service.storage.database import Connection, marks, now_s
from service.storage.version_rows import Publication


class LeaseLost(Exception):  # noqa: N818 - named for what happened
    """The job is not this worker's any more: it stops its trainer and writes nothing."""

    def __init__(self, job: JobRecord) -> None:
        super().__init__(f"attempt {job.attempts} at {job.job_id} has lost its lease")


class Claims:
    """What workers do with jobs; every method may be called from any thread.

    Methods that take a job want the record that `claim` returned.
    """

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._database = jobs.database

    def claim(self, owner: str, kind: JobKind, devices: Collection[str]) -> JobRecord | None:
        """Takes a queued job of a kind that asked for one of these devices; it is RUNNING then.

        Tenants take turns: who has the fewest running jobs of the kind comes first, then who
        started one the longest ago; of a tenant's the oldest is taken that is not deferred.
        No two callers ever get the same one, and a replica without a lease gets none.
        """
        query = (
            "UPDATE jobs SET state = ?, owner = ?, attempts = attempts + 1,"  # nosec B608  # noqa: S608 - marks
            " start_time_s = CASE WHEN last_event_s > ? THEN last_event_s ELSE ? END,"
            f" last_sequence = last_sequence + 1, {records.LATER}"
            " WHERE state = ? AND EXISTS (SELECT 1 FROM replicas WHERE replica_id = ?"
            " AND lease_until_s > ?) AND job_id = (SELECT MIN(job_id) FROM jobs AS queued"
            " WHERE state = ? AND kind = ? AND not_before_s <= ?"
            f" AND device IN ({marks(devices)}) GROUP BY tenant ORDER BY"
            " (SELECT COUNT(*) FROM jobs AS running WHERE running.tenant = queued.tenant"
            " AND running.kind = ? AND running.state = ?),"
            # A start in the future was noted before the clock was put back.
            " (SELECT COALESCE(MAX(started.start_time_s), 0) FROM jobs AS started"
            " WHERE started.tenant = queued.tenant AND started.kind = ?"
            " AND started.start_time_s <= ?), MIN(job_id) LIMIT 1) RETURNING *"
        )
        with self._database.transaction() as connection:
            now = now_s(connection)
            row = connection.execute(
                query,
                (
                    *(JobState.RUNNING, owner, now, now, now, now),
                    *(JobState.QUEUED, owner, now, JobState.QUEUED, kind, now, *devices),
                    *(kind, JobState.RUNNING, kind, now),
                ),
            ).fetchone()
            if row is None:
                return None
            job, numbered = record_of(row), (row["last_sequence"], row["last_event_s"])
            change = StateChanged(JobState.RUNNING)
            records.add_event(connection, job.job_id, *numbered, change)
            self._jobs.note(job.job_id)
        failpoints.reach("claim.committed")
        return job

    def append(self, job: JobRecord, payload: Payload) -> JobEvent:
        """Keeps what happened to a running job, with the progress or the summary that it tells."""
        column, value = "", ""
        if isinstance(payload, Progressed):
            column, value = "progress_json", msgspec.json.encode(payload).decode()
        elif isinstance(payload, DataFound):
            column, value = "summary_json", msgspec.json.encode(payload.summary).decode()
        with self._database.transaction() as connection:
            sequence, time_s = self._fence(connection, job, column, value)
            records.add_event(connection, job.job_id, sequence, time_s, payload)
            self._jobs.note(job.job_id)
        return JobEvent(sequence, time_s, payload)

    def hold(self, job: JobRecord, dataset_id: str, *, is_target: bool = False) -> None:
        """Keeps a dataset that a job made of an archive from being deleted before its end.

        Raises NotFound (DATASET_NOT_FOUND).
        """
        with self._database.transaction(f"tenant:{job.tenant}") as connection:
            self._fence(connection, job, numbers=0)
            dataset_rows.check_usable(connection, job.tenant, dataset_id, is_target=is_target)
            holds.hold(connection, job.tenant, "dataset", [dataset_id], job.job_id)

    def succeed(self, job: JobRecord, publish: Callable[[Connection], Publication]) -> JobRecord:
        """Ends a running job with a version: all of it happens, or nothing.

        `publish` makes the version in the transaction. A cancel that was asked for and not done
        is too late.
        """
        with self._database.transaction(f"tenant:{job.tenant}") as connection:
            numbered = self._fence(connection, job)
            made = publish(connection)
            manifest = made.manifest
            published = Published(
                manifest.model,
                made.version,
                manifest.headline,
                manifest.gate_failures,
                manifest.calibrated,
                manifest.gate_verdict,
            )
            records.add_event(connection, job.job_id, *numbered, published)
            records.end(
                connection,
                job.job_id,
                records.number(connection, job.job_id),
                StateChanged(JobState.SUCCEEDED),
                version=made.version,
                is_candidate=published.is_candidate,
            )
            record = self._noted(connection, job)
            failpoints.reach("job.succeeding")
        failpoints.reach("publish.committed")
        return record

    def succeed_ranking(self, job: JobRecord, ranked: BackbonesRanked) -> JobRecord:
        """Ends a running job with a ranking."""
        result = msgspec.json.encode(ranked).decode()
        return self._end(job, StateChanged(JobState.SUCCEEDED), result)

    def fail(self, job: JobRecord, reason: Reason, message: str) -> JobRecord:
        """Ends a running job without a result."""
        return self._end(job, StateChanged(JobState.FAILED, reason, message))

    def cancelled(self, job: JobRecord) -> JobRecord:
        """Ends a running job whose trainer was stopped because that was asked for."""
        return self._end(job, StateChanged(JobState.CANCELLED))

    def requeue(self, job: JobRecord, message: str) -> JobRecord:
        """Has a running job wait for another attempt, at once and through no fault of its own.

        One whose cancel was asked for is cancelled instead; so it is with the next two.
        """
        with self._database.transaction() as connection:
            numbered = self._fence(connection, job)
            put_back(connection, job.job_id, numbered, StateChanged(JobState.QUEUED, None, message))
            return self._noted(connection, job)

    def crash(self, job: JobRecord, reason: Reason, message: str, max_crashes: int) -> JobRecord:
        """Has a job whose attempt ended without a result wait for another one.

        It fails with this reason when `max_crashes` attempts have.
        """
        with self._database.transaction() as connection:
            numbered = self._fence(connection, job)
            connection.execute(
                "UPDATE jobs SET crashes = crashes + 1 WHERE job_id = ?", (job.job_id,)
            )
            change = crashed(reason, message, job.crashes + 1, max_crashes)
            put_back(connection, job.job_id, numbered, change)
            return self._noted(connection, job)

    def defer(
        self,
        job: JobRecord,
        reason: Reason,
        message: str,
        delay_s: Callable[[float], float],
        give_up_s: float,
    ) -> JobRecord:
        """Has a running job wait for what it lacks: a disk with room, or a database.

        `delay_s` says how long, by how long it has waited already. One that was deferred
        first more than `give_up_s` ago fails with what it waits for.
        """
        with self._database.transaction() as connection:
            numbered = self._fence(connection, job)
            now = now_s(connection)
            since = now if job.waiting_since_s is None else job.waiting_since_s
            change = StateChanged(JobState.QUEUED, None, f"{message}; the job starts again")
            if now - since > give_up_s:
                change = StateChanged(JobState.FAILED, reason, message)
            connection.execute(
                "UPDATE jobs SET waiting_since_s = ?, not_before_s = ? WHERE job_id = ?",
                (since, now + delay_s(max(0.0, now - since)), job.job_id),
            )
            put_back(connection, job.job_id, numbered, change)
            return self._noted(connection, job)

    def to_cancel(self, owner: str) -> set[str]:
        """Returns a replica's running jobs whose cancel was asked for."""
        with self._database.read() as connection:
            kept = connection.execute(
                "SELECT job_id FROM jobs WHERE state = ? AND owner = ? AND cancel_requested = 1",
                (JobState.RUNNING, owner),
            )
            return {row["job_id"] for row in kept}

    def due_s(self) -> float | None:
        """Returns how long until the next deferred job may be claimed; None where none is."""
        with self._database.read() as connection:
            now = now_s(connection)
            (due,) = connection.execute(
                "SELECT MIN(not_before_s) FROM jobs WHERE state = ? AND not_before_s > ?",
                (JobState.QUEUED, now),
            ).fetchone()
            return None if due is None else float(due) - now

    def _end(
        self, job: JobRecord, change: StateChanged, result_json: str | None = None
    ) -> JobRecord:
        with self._database.transaction() as connection:
            numbered = self._fence(connection, job)
            records.end(connection, job.job_id, numbered, change, result_json=result_json)
            return self._noted(connection, job)

    def _noted(self, connection: Connection, job: JobRecord) -> JobRecord:
        self._jobs.note(job.job_id)
        return records.get(connection, job.job_id)

    def _fence(
        self,
        connection: Connection,
        job: JobRecord,
        column: str = "",
        value: str = "",
        *,
        numbers: int = 1,
    ) -> tuple[int, float]:
        """Returns the number and the time of the next event; raises LeaseLost.

        Sets a column, too, where one is named.
        """
        now = now_s(connection)
        also = f", {column} = ?" if column else ""
        row = connection.execute(
            f"UPDATE jobs SET last_sequence = last_sequence + ?, {records.LATER}{also}"  # nosec B608  # noqa: S608 - our words
            " WHERE job_id = ? AND owner = ? AND attempts = ? AND state = ?"
            " RETURNING last_sequence, last_event_s",
            (
                *(numbers, now, now, *([value] if column else [])),
                *(job.job_id, job.owner, job.attempts, JobState.RUNNING),
            ),
        ).fetchone()
        if row is None:
            raise LeaseLost(job)
        return int(row["last_sequence"]), float(row["last_event_s"])


def crashed(reason: Reason, message: str, crashes: int, max_crashes: int) -> StateChanged:
    """Returns what becomes of a job whose attempts ended so often without a result."""
    if crashes < max_crashes:
        return StateChanged(JobState.QUEUED, reason, message)
    last = f"{message}; that was attempt {crashes} of {max_crashes}, the last"
    return StateChanged(JobState.FAILED, reason, last)


def put_back(
    connection: Connection, job_id: str, numbered: tuple[int, float], change: StateChanged
) -> None:
    """Makes a job QUEUED or FAILED, or CANCELLED where that was asked for.

    Its row is locked, and its event numbered.
    """
    asked = connection.execute("SELECT cancel_requested FROM jobs WHERE job_id = ?", (job_id,))
    if asked.fetchone()["cancel_requested"]:
        change = StateChanged(JobState.CANCELLED)
    if change.state is not JobState.QUEUED:
        records.end(connection, job_id, numbered, change)
        return
    connection.execute(
        "UPDATE jobs SET state = ?, owner = NULL, progress_json = NULL"
        " WHERE job_id = ? AND state = ?",
        (JobState.QUEUED, job_id, JobState.RUNNING),
    )
    records.add_event(connection, job_id, *numbered, change)
