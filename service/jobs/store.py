"""Jobs and their events: what was asked, how far it is, how it ended.

Owns the tables jobs and job_events. Every change of a job and its event are one
transaction, so neither is ever without the other; events are numbered without
gaps. A job is its model's tenant's; what is asked with a tenant finds that one's
alone, as if there were no others. What takes a job's id alone is the server's own
work, on whosever job. Which changes of state are legal stands in `service.domain` and,
enforced, in the database. Listeners hear of every job that got an event.
"""

import secrets
import time
from collections.abc import Callable, Collection, Iterable
from functools import partial

import msgspec

from service.contract import DataFound, Progressed
from service.domain import JobState, check_name, plain_name, tenant_key, tenant_of
from service.errors import AlreadyExists, InvalidInput, Reason
from service.jobs import events, rows
from service.jobs.events import JobEvent, Payload, Published, StateChanged
from service.jobs.request import JobRequest, check_request_id
from service.jobs.rows import JobRecord
from service.ops import failpoints
from service.storage import pages
from service.storage.database import Connection, Database
from service.storage.records import Publication

__all__ = ["JobRecord", "JobStore"]

MAX_EVENTS = 1000
"""Most events that one read answers with."""

Listener = Callable[[str, JobEvent | None], None]
"""Hears of a job and its new event; of None when its cancel was asked for."""


class JobStore:
    """All jobs; every method may be called from any thread."""

    def __init__(
        self,
        database: Database,
        max_queued: int,
        is_shared: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_shared` says whether there are several tenants: each has half of the queue then."""
        self._database = database
        self._max_queued = max_queued
        self._is_shared = is_shared
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Calls `listener` after every change of a job, from the writer's thread.

        It must not block and must not write to the database.
        """
        self._listeners.append(listener)

    def create(
        self,
        request: JobRequest,
        request_id: str,
        message: bytes,
        max_open_jobs: int | None = None,
    ) -> tuple[JobRecord, bool]:
        """Queues a job, or finds the one that this request id made before.

        `message` is the request as it came, serialised. Returns the job and whether it is
        new. Raises AlreadyExists (REQUEST_ID_REUSED) where the earlier request was another
        one, NotFound (DATASET_NOT_FOUND), InvalidInput
        (DATASET_UNUSABLE), OverQuota (concurrent_jobs) where the tenant has
        `max_open_jobs` that have not ended, or Exhausted (QUEUE_FULL).
        """
        check_request_id(request_id)
        tenant = request.tenant
        with self._database.transaction() as connection:
            known = self._asked_before(connection, tenant, request_id, message)
            if known is not None:
                return known, False
            if max_open_jobs is not None:
                rows.check_open_jobs(connection, tenant, max_open_jobs)
            rows.check_queue(connection, tenant, self._max_queued, is_shared=self._is_shared())
            if request.dataset_id:
                rows.check_dataset(
                    connection, tenant, request.dataset_id, is_alone=request.base is None
                )
            if request.target_dataset_id:
                rows.check_dataset(
                    connection,
                    tenant,
                    request.target_dataset_id,
                    "domain_adaptation.target_dataset_id",
                    is_target=True,
                )
            job_id = _new_id(connection)
            request_json = msgspec.json.encode(request).decode()
            connection.execute(
                "INSERT INTO jobs (job_id, tenant, request_id, model, dataset_id,"
                " device, request_json, message, state, create_time_s)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    job_id,
                    tenant,
                    rows.request_key(tenant, request_id) if request_id else None,
                    request.model,
                    request.dataset_id or None,
                    request.device,
                    request_json,
                    message,
                    JobState.QUEUED,
                    time.time(),
                ),
            )
            rows.count_bytes(connection, tenant, request_json, message)
            beside = {job.dataset_id for job in rows.ancestors(connection, request.base_job_id)}
            rows.use(connection, job_id, {*beside, request.target_dataset_id} - {""})
            self._append(connection, job_id, StateChanged(JobState.QUEUED))
            failpoints.reach("job.creating")
            return rows.get(connection, job_id, tenant), True

    def check_open(self, tenant: str, max_open_jobs: int | None = None) -> None:
        """Raises OverQuota or Exhausted, as `create`, where no job of a tenant can be taken."""
        with self._database.read() as connection:
            if max_open_jobs is not None:
                rows.check_open_jobs(connection, tenant, max_open_jobs)
            rows.check_queue(connection, tenant, self._max_queued, is_shared=self._is_shared())

    def is_known(self, request_id: str, tenant: str) -> bool:
        """Whether a tenant's request with this id has made a job; never of the empty id."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT 1 FROM jobs WHERE request_id = ?", (rows.request_key(tenant, request_id),)
            ).fetchone()
            return row is not None

    def ancestors(self, job_id: str) -> list[JobRecord]:
        """A job and those that made the versions it grew from, oldest first.

        Raises WrongState (BASE_DATA_GONE) for one that is not known.
        """
        with self._database.read() as connection:
            return rows.ancestors(connection, job_id)

    def get(self, job_id: str, tenant: str) -> JobRecord:
        """One job of a tenant; raises NotFound (JOB_NOT_FOUND)."""
        with self._database.read() as connection:
            return rows.get(connection, job_id, tenant)

    def events(
        self, job_id: str, tenant: str, after_sequence: int, limit: int = MAX_EVENTS
    ) -> list[JobEvent]:
        """The job's events after a number, oldest first; raises NotFound (JOB_NOT_FOUND)."""
        if after_sequence < 0:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"after_sequence is {after_sequence}: it must be 0 (for all events) or more",
                field="after_sequence",
            )
        with self._database.read() as connection:
            found = connection.execute(
                "SELECT sequence, time_s, payload_json FROM job_events JOIN jobs USING (job_id)"
                " WHERE job_id = ? AND tenant = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (job_id, tenant, after_sequence, min(limit, MAX_EVENTS)),
            ).fetchall()
            if not found:
                rows.get(connection, job_id, tenant)
        return [
            JobEvent(row["sequence"], row["time_s"], events.decode(row["payload_json"]))
            for row in found
        ]

    def claim(
        self, devices: Collection[str], passed_over: Collection[str] = ()
    ) -> JobRecord | None:
        """Takes a queued job that asked for one of these devices; it is RUNNING then.

        Tenants take turns: who has the fewest running jobs comes first, then who started one
        the longest ago; of a tenant's the oldest is taken. None of those `passed_over`, by
        their ids. No two callers ever get the same one.
        """
        wanted = (*devices, "", "", "")[:3]
        query = (
            "UPDATE jobs SET state = ?, attempts = attempts + 1"  # nosec B608  # noqa: S608 - marks
            " WHERE job_id = (SELECT MIN(job_id) FROM jobs AS queued WHERE state = ?"
            f" AND device IN (?, ?, ?) AND job_id NOT IN ({_marks(passed_over)}) GROUP BY tenant"
            " ORDER BY (SELECT COUNT(*) FROM jobs WHERE tenant = queued.tenant AND state = ?),"
            # A start in the future was noted before the clock was put back.
            " (SELECT COALESCE(MAX(start_time_s), 0) FROM jobs WHERE tenant = queued.tenant"
            " AND start_time_s <= ?), MIN(job_id) LIMIT 1) AND state = ? RETURNING job_id"
        )
        values = (
            *(JobState.RUNNING, JobState.QUEUED, *wanted, *passed_over),
            *(JobState.RUNNING, time.time(), JobState.QUEUED),
        )
        with self._database.transaction() as connection:
            row = connection.execute(query, values).fetchone()
            if row is None:
                return None
            job_id = row["job_id"]
            started = self._append(connection, job_id, StateChanged(JobState.RUNNING))
            connection.execute(
                "UPDATE jobs SET start_time_s = ? WHERE job_id = ?", (started.time_s, job_id)
            )
            return rows.get_any(connection, job_id)

    def append_event(self, job_id: str, payload: Payload) -> JobEvent:
        """Keeps what happened to a running job; raises WrongState (JOB_FINISHED) after its end."""
        with self._database.transaction() as connection:
            rows.check_running(rows.get_any(connection, job_id))
            if isinstance(payload, Progressed):
                connection.execute(
                    "UPDATE jobs SET progress_json = ? WHERE job_id = ?",
                    (msgspec.json.encode(payload).decode(), job_id),
                )
            elif isinstance(payload, DataFound):
                connection.execute(
                    "UPDATE jobs SET summary_json = ? WHERE job_id = ?",
                    (msgspec.json.encode(payload.summary).decode(), job_id),
                )
            return self._append(connection, job_id, payload)

    def check_dataset(
        self,
        dataset_id: str,
        tenant: str,
        field: str = "dataset_id",
        *,
        is_target: bool = False,
        is_alone: bool = False,
    ) -> None:
        """Raises as `rows.check_dataset`."""
        with self._database.read() as connection:
            rows.check_dataset(
                connection, tenant, dataset_id, field, is_target=is_target, is_alone=is_alone
            )

    def use_dataset(self, job_id: str, dataset_id: str) -> None:
        """Notes that a job works on a dataset that its request did not name.

        It cannot be deleted before the job ends. Raises NotFound (DATASET_NOT_FOUND).
        """
        with self._database.transaction() as connection:
            rows.check_dataset(connection, rows.get_any(connection, job_id).tenant, dataset_id)
            connection.execute(
                "UPDATE jobs SET dataset_id = ? WHERE job_id = ?", (dataset_id, job_id)
            )

    def use_target(self, job_id: str, dataset_id: str) -> None:
        """As `use_dataset`, for images of the target."""
        with self._database.transaction() as connection:
            tenant = rows.get_any(connection, job_id).tenant
            rows.check_dataset(connection, tenant, dataset_id, is_target=True)
            rows.use(connection, job_id, [dataset_id])

    def succeed(
        self,
        job_id: str,
        publish: Callable[[Connection], Publication],
    ) -> JobRecord:
        """Ends a running job with a version: all of it happens, or nothing.

        `publish` makes the version in the transaction. A cancel that was asked for
        and not done is too late. For a job that has succeeded already, nothing is
        done.
        """
        with self._database.transaction() as connection:
            record = rows.get_any(connection, job_id)
            if record.state is JobState.SUCCEEDED:
                return record
            rows.check_running(record)
            made = publish(connection)
            manifest = made.manifest
            published = Published(
                record.request.model,
                made.version,
                manifest.headline,
                manifest.gate_failures,
                manifest.calibrated,
                manifest.gate_verdict,
            )
            self._append(connection, job_id, published)
            self._end(connection, job_id, StateChanged(JobState.SUCCEEDED), version=made.version)
            failpoints.reach("job.succeeding")
            return rows.get_any(connection, job_id)

    def fail(self, job_id: str, reason: Reason, message: str) -> JobRecord:
        """Ends a job that has not ended, without a version; raises WrongState (JOB_FINISHED)."""
        with self._database.transaction() as connection:
            rows.check_not_final(rows.get_any(connection, job_id))
            self._end(connection, job_id, StateChanged(JobState.FAILED, reason, message))
            return rows.get_any(connection, job_id)

    def request_cancel(self, job_id: str, tenant: str) -> JobRecord:
        """Cancels a queued job; notes the wish for a running one, whose trainer must stop first.

        Raises NotFound, or WrongState (JOB_FINISHED).
        """
        with self._database.transaction() as connection:
            record = rows.get(connection, job_id, tenant)
            rows.check_not_final(record)
            if record.state is JobState.QUEUED:
                self._end(connection, job_id, StateChanged(JobState.CANCELLED))
            else:
                connection.execute(
                    "UPDATE jobs SET cancel_requested = 1 WHERE job_id = ?", (job_id,)
                )
                self._database.after_commit(partial(self._tell, job_id, None))
            return rows.get(connection, job_id, tenant)

    def cancelled(self, job_id: str) -> JobRecord:
        """Ends a running job whose trainer was stopped because that was asked for."""
        with self._database.transaction() as connection:
            rows.check_running(rows.get_any(connection, job_id))
            self._end(connection, job_id, StateChanged(JobState.CANCELLED))
            return rows.get_any(connection, job_id)

    def to_cancel(self) -> set[str]:
        """The running jobs whose cancel was asked for."""
        with self._database.read() as connection:
            found = connection.execute(
                "SELECT job_id FROM jobs WHERE state = ? AND cancel_requested = 1",
                (JobState.RUNNING,),
            )
            return {row["job_id"] for row in found}

    def requeue(
        self, job_id: str, message: str, crash: Reason | None = None, max_crashes: int = 1
    ) -> JobRecord:
        """Lets a running job wait for another attempt.

        With `crash` the attempt counts against the job, which fails with this
        reason when `max_crashes` have been. One whose cancel was asked for is
        cancelled instead.
        """
        with self._database.transaction() as connection:
            record = rows.get_any(connection, job_id)
            rows.check_running(record)
            self._requeue(connection, record, message, crash, max_crashes)
            return rows.get_any(connection, job_id)

    def requeue_running(self, max_crashes: int, *, was_told: bool = False) -> list[JobRecord]:
        """For the start: nobody works on what is RUNNING then.

        The service ended while it was, so it counts as a crash: the job may be why. Not
        where the service was told to stop and could not put the job back.
        """
        message = "the service ended while the trainer worked; the job starts again"
        crash = None if was_told else Reason.TRAINER_CRASHED
        with self._database.transaction() as connection:
            found = connection.execute(
                f"{rows.SELECT} WHERE state = ? ORDER BY job_id", (JobState.RUNNING,)
            ).fetchall()
            for row in found:
                self._requeue(connection, rows.record_of(row), message, crash, max_crashes)
            return [rows.get_any(connection, row["job_id"]) for row in found]

    def waiting(self) -> set[str]:
        """The queued jobs."""
        with self._database.read() as connection:
            found = connection.execute(
                "SELECT job_id FROM jobs WHERE state = ?", (JobState.QUEUED,)
            )
            return {row["job_id"] for row in found}

    def counts_by_state(self) -> dict[str, int]:
        """How many jobs are in each state, 0 included."""
        with self._database.read() as connection:
            found = connection.execute("SELECT state, COUNT(*) AS n FROM jobs GROUP BY state")
            return {**{state.value: 0 for state in JobState}, **{r["state"]: r["n"] for r in found}}

    # Last of the public ones, since its name hides the type in what follows.
    def list(
        self,
        page_size: int,
        page_token: str,
        states: Collection[JobState],
        model: str,
        tenant: str,
    ) -> tuple[list[JobRecord], str]:
        """A page of a tenant's jobs, newest first, and the token of the next ("" on the last).

        No states means all states, no model all models; else it is one's key.
        """
        limit = pages.size(page_size)
        kind = tenant_key(tenant, "jobs")
        (before,) = pages.key(kind, page_token, str) or ("~",)
        query, values = f"{rows.SELECT} WHERE job_id < ?", [before]
        if states:
            query += f" AND state IN ({_marks(states)})"
            values += sorted(states)
        if model:
            check_name(plain_name(model), "model")
            if tenant_of(model) != tenant:
                return [], ""
        query += " AND model = ?" if model else " AND tenant = ?"
        values.append(model or tenant)
        with self._database.read() as connection:
            found = connection.execute(
                f"{query} ORDER BY job_id DESC LIMIT ?", (*values, limit + 1)
            )
            shown, more = pages.page(found, limit, "message")
        records = [rows.record_of(row) for row in shown]
        return records, pages.token(kind, records[-1].job_id) if more else ""

    def _asked_before(
        self, connection: Connection, tenant: str, request_id: str, message: bytes
    ) -> JobRecord | None:
        if not request_id:
            return None
        row = connection.execute(
            f"{rows.SELECT} WHERE request_id = ?", (rows.request_key(tenant, request_id),)
        ).fetchone()
        if row is None:
            return None
        if row["message"] != message:
            raise AlreadyExists(
                Reason.REQUEST_ID_REUSED,
                f"request_id {request_id!r} started {row['job_id']} with another request: use a "
                "new id for a new request",
                field="request_id",
            )
        return rows.record_of(row)

    def _requeue(
        self,
        connection: Connection,
        record: JobRecord,
        message: str,
        crash: Reason | None,
        max_crashes: int,
    ) -> None:
        job_id = record.job_id
        crashes = record.crashes + (crash is not None)
        connection.execute("UPDATE jobs SET crashes = ? WHERE job_id = ?", (crashes, job_id))
        if record.cancel_requested:
            self._end(connection, job_id, StateChanged(JobState.CANCELLED))
        elif crash is not None and crashes >= max_crashes:
            last = f"{message}; that was attempt {crashes} of {max_crashes}, the last"
            self._end(connection, job_id, StateChanged(JobState.FAILED, crash, last))
        else:
            connection.execute(
                "UPDATE jobs SET state = ?, progress_json = NULL WHERE job_id = ?",
                (JobState.QUEUED, job_id),
            )
            self._append(connection, job_id, StateChanged(JobState.QUEUED, crash, message))

    def _end(
        self, connection: Connection, job_id: str, change: StateChanged, version: int = 0
    ) -> None:
        connection.execute(
            "UPDATE jobs SET state = ?, end_time_s = ?, version = ?, error_reason = ?,"
            " error_message = ?, progress_json = NULL, cancel_requested = 0 WHERE job_id = ?",
            (
                change.state,
                rows.now(connection, job_id),
                version,
                change.reason,
                change.message,
                job_id,
            ),
        )
        self._append(connection, job_id, change)

    def _append(self, connection: Connection, job_id: str, payload: Payload) -> JobEvent:
        (sequence,) = connection.execute(
            "UPDATE jobs SET last_sequence = last_sequence + 1 WHERE job_id = ?"
            " RETURNING last_sequence",
            (job_id,),
        ).fetchone()
        now = rows.now(connection, job_id)
        connection.execute(
            "INSERT INTO job_events (job_id, sequence, time_s, payload_json) VALUES (?, ?, ?, ?)",
            (job_id, sequence, now, events.encode(payload)),
        )
        event = JobEvent(sequence, now, payload)
        self._database.after_commit(partial(self._tell, job_id, event))
        return event

    def _tell(self, job_id: str, event: JobEvent | None) -> None:
        for listener in self._listeners:
            listener(job_id, event)


def _new_id(connection: Connection) -> str:
    # Later jobs sort later, even in one millisecond and when the clock went back.
    (newest,) = connection.execute("SELECT MAX(job_id) FROM jobs").fetchone()
    floor = int(newest.split("-")[1], 16) + 1 if newest else 0
    return f"job-{max(time.time_ns() // 1_000_000, floor):012x}-{secrets.token_hex(8)}"


def _marks(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)
