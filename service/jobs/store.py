"""Jobs and their events, as callers see them: started, listed, read, cancelled, deleted.

Owns, with the other modules of this package, the tables jobs, job_events and replicas. Events are
numbered without gaps. What is asked with a tenant finds that one's alone. What workers write
stands in `claims`. Which changes of state are legal stands in `service.domain` and, enforced, in
the database. A notice carries a job's id and says "look again", nothing else.
"""

import secrets
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial

import msgspec

from service.contract import DEFAULT_BACKBONE
from service.domain import JobKind, JobState, check_name
from service.errors import AlreadyExists, Reason, WrongState, bad_field
from service.jobs import records
from service.jobs.records import JobEvent, JobRecord, StateChanged, found, record_of
from service.jobs.request import JobRequest, RankRequest
from service.ops import failpoints
from service.storage import dataset_rows, holds, pagination
from service.storage.database import Connection, Database, marks, now_s

MAX_EVENTS = 1000
"""Most events that one read answers with."""
MAX_DELETED = 100
"""Jobs that one transaction of the retention deletes, or deletes events of."""
DAY_S = 86_400.0

Listener = Callable[[str], None]
"""Gets the id of a job that has changed."""


class JobStore:
    """All jobs; every method may be called from any thread."""

    def __init__(
        self,
        database: Database,
        max_queued: int,
        is_shared: Callable[[], bool] = lambda: False,
        default_backbone: str = DEFAULT_BACKBONE,
    ) -> None:
        """`is_shared` says whether there are several tenants: each has half of the queue then."""
        self.database = database
        self._max_queued = max_queued
        self._is_shared = is_shared
        self._default_backbone = default_backbone
        self._listeners: list[Listener] = []

    def listen(self, listener: Listener) -> None:
        """Calls `listener` after every change of a job, from the writer's thread.

        It must not block and must not open a transaction.
        """
        self._listeners.append(listener)

    def note(self, job_id: str) -> None:
        """Tells the listeners once the running transaction is committed."""
        for listener in self._listeners:
            self.database.after_commit(partial(listener, job_id))

    def create(
        self,
        request: JobRequest | RankRequest,
        request_id: str,
        message: bytes,
        max_open_jobs: int | None = None,
    ) -> tuple[JobRecord, bool]:
        """Queues a job, or finds the one that this request id made before.

        `message` is the request as it came, serialised. Returns the job and whether it is
        new. Raises AlreadyExists (REQUEST_ID_REUSED) where the earlier request was another
        one, NotFound (DATASET_NOT_FOUND), InvalidInput
        (DATASET_UNUSABLE), OverQuota (concurrent_jobs, rankings) where the tenant has
        `max_open_jobs` of its kind that have not ended, or Exhausted (QUEUE_FULL).
        """
        tenant, kind = request.tenant, request.kind
        request_json = msgspec.json.encode(request)
        with self.database.transaction(f"tenant:{tenant}") as connection:
            known = _asked_before(connection, tenant, request_id, message)
            if known is not None:
                return known, False
            records.check_open_jobs(connection, tenant, kind, max_open_jobs)
            records.check_queue(connection, tenant, self._max_queued, is_shared=self._is_shared())
            job_id, now = _new_id(connection), now_s(connection)
            connection.execute(
                "INSERT INTO jobs (job_id, tenant, request_id, kind, model, device, request_json,"
                " message, state, create_time_s, last_event_s, last_sequence, size_bytes)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?)",
                (
                    job_id,
                    tenant,
                    request_id or None,
                    kind,
                    request.model if isinstance(request, JobRequest) else "",
                    request.device,
                    request_json.decode(),
                    message,
                    JobState.QUEUED,
                    now,
                    now,
                    len(request_json) + len(message) + records.BESIDE_REQUEST_BYTES,
                ),
            )
            if isinstance(request, JobRequest):
                connection.executemany(
                    "INSERT INTO job_labels (job_id, key, value) VALUES (?, ?, ?)",
                    [(job_id, key, value) for key, value in request.labels.items()],
                )
            records.add_event(connection, job_id, 1, now, StateChanged(JobState.QUEUED))
            self._hold(connection, job_id, request)
            self.note(job_id)
            failpoints.reach("job.creating")
            return records.get(connection, job_id), True

    def check_open(self, tenant: str, kind: JobKind, max_open_jobs: int | None = None) -> None:
        """Raises OverQuota or Exhausted, as `create`, where no job of a tenant can be taken."""
        with self.database.read() as connection:
            records.check_open_jobs(connection, tenant, kind, max_open_jobs)
            records.check_queue(connection, tenant, self._max_queued, is_shared=self._is_shared())

    def is_known(self, request_id: str, tenant: str) -> bool:
        """Tells whether a tenant's request with this id has made a job; never of the empty id."""
        with self.database.read() as connection:
            row = connection.execute(
                "SELECT 1 FROM jobs WHERE tenant = ? AND request_id = ?", (tenant, request_id)
            ).fetchone()
            return row is not None

    def get(self, job_id: str, tenant: str) -> JobRecord:
        """Returns one job of a tenant; raises NotFound (JOB_NOT_FOUND)."""
        with self.database.read() as connection:
            return _own(connection, job_id, tenant)

    def events(
        self, job_id: str, tenant: str, after_sequence: int, limit: int = MAX_EVENTS
    ) -> list[JobEvent]:
        """Returns the job's events after a number, oldest first; raises NotFound (JOB_NOT_FOUND).

        Those of a job that ended long ago may be gone, but for the last.
        """
        if after_sequence < 0:
            raise bad_field(
                "after_sequence",
                f"after_sequence is {after_sequence}: it must be 0 (for all events) or more",
            )
        with self.database.read() as connection:
            kept = connection.execute(
                "SELECT sequence, time_s, payload_json FROM job_events JOIN jobs USING (job_id)"
                " WHERE job_id = ? AND tenant = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (job_id, tenant, after_sequence, min(limit, MAX_EVENTS)),
            ).fetchall()
            if not kept:
                _own(connection, job_id, tenant)
        return [
            JobEvent(row["sequence"], row["time_s"], records.decode(row["payload_json"]))
            for row in kept
        ]

    def request_cancel(self, job_id: str, tenant: str) -> JobRecord:
        """Cancels a queued job; notes the wish for a running one, whose trainer must stop first.

        Raises NotFound, or WrongState (JOB_FINISHED).
        """
        with self.database.transaction() as connection:
            asked = connection.execute(
                "UPDATE jobs SET cancel_requested = 1 WHERE job_id = ? AND tenant = ?"
                " AND state IN (?, ?) RETURNING state",
                (job_id, tenant, JobState.QUEUED, JobState.RUNNING),
            ).fetchone()
            if asked is None:
                record = _own(connection, job_id, tenant)
                raise WrongState(
                    Reason.JOB_FINISHED, f"{job_id} has ended already, it is {record.state}"
                )
            if asked["state"] == JobState.QUEUED:
                numbered = records.number(connection, job_id)
                records.end(connection, job_id, numbered, StateChanged(JobState.CANCELLED))
            self.note(job_id)
            return records.get(connection, job_id)

    def delete(self, job_id: str, tenant: str) -> None:
        """Deletes a job that has ended, with its events; its version stays.

        Raises NotFound, or WrongState (JOB_NOT_FINISHED).
        """
        with self.database.transaction(f"tenant:{tenant}") as connection:
            gone = connection.execute(
                "DELETE FROM jobs WHERE job_id = ? AND tenant = ? AND end_time_s IS NOT NULL"
                " RETURNING job_id",
                (job_id, tenant),
            ).fetchone()
            if gone is None:
                record = _own(connection, job_id, tenant)
                raise WrongState(
                    Reason.JOB_NOT_FINISHED,
                    f"{job_id} is {record.state}: cancel it, or wait for its end, and delete it "
                    "then",
                )
            self.note(job_id)

    def delete_old(self, older_than_s: float) -> int:
        """Deletes jobs that ended longer ago, with their events; returns how many."""
        deleted = 0
        while True:
            with self.database.transaction() as connection:
                gone = connection.execute(
                    "DELETE FROM jobs WHERE job_id IN (SELECT job_id FROM jobs"
                    " WHERE end_time_s < ? ORDER BY end_time_s LIMIT ?) RETURNING job_id",
                    (now_s(connection) - older_than_s, MAX_DELETED),
                ).fetchall()
            deleted += len(gone)
            if len(gone) < MAX_DELETED:
                return deleted

    def delete_old_events(self, older_than_s: float) -> int:
        """Deletes events of jobs that ended longer ago, but for each one's last; returns how many.

        Goes from job to job, so that the table of events needs no index beside its key.
        """
        deleted, after = 0, (0.0, "")
        while True:
            with self.database.transaction() as connection:
                ended = connection.execute(
                    "SELECT job_id, last_sequence, end_time_s FROM jobs WHERE end_time_s < ?"
                    " AND (end_time_s, job_id) > (?, ?) ORDER BY end_time_s, job_id LIMIT ?",
                    (now_s(connection) - older_than_s, *after, MAX_DELETED),
                ).fetchall()
                for job in ended:
                    gone = connection.execute(
                        "DELETE FROM job_events WHERE job_id = ? AND sequence < ?"
                        " RETURNING LENGTH(payload_json) AS size",
                        (job["job_id"], job["last_sequence"]),
                    ).fetchall()
                    if gone:
                        connection.execute(
                            "UPDATE jobs SET size_bytes = size_bytes - ? WHERE job_id = ?",
                            (sum(row["size"] for row in gone), job["job_id"]),
                        )
                    deleted += len(gone)
            if len(ended) < MAX_DELETED:
                return deleted
            after = ended[-1]["end_time_s"], ended[-1]["job_id"]

    def open_ones(self, job_ids: Collection[str]) -> set[str]:
        """Returns those of these ids whose jobs have not ended."""
        with self.database.read() as connection:
            kept = connection.execute(
                f"SELECT job_id FROM jobs WHERE job_id IN ({marks(job_ids)})"  # nosec B608  # noqa: S608 - marks
                " AND end_time_s IS NULL",
                tuple(job_ids),
            )
            return {row["job_id"] for row in kept}

    def counts_by_state(self) -> dict[str, int]:
        """Counts the jobs in each state, 0 included."""
        with self.database.read() as connection:
            kept = connection.execute("SELECT state, COUNT(*) AS n FROM jobs GROUP BY state")
            return {**{state.value: 0 for state in JobState}, **{r["state"]: r["n"] for r in kept}}

    # Last of the public ones, since its name hides the type in what follows.
    def list(
        self,
        page_size: int,
        page_token: str,
        states: Collection[JobState],
        model: str,
        tenant: str,
        kind: JobKind | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> tuple[list[JobRecord], str]:
        """Returns a page of a tenant's jobs, newest first, and the token of the next, or "".

        No states means all states, no model all models, no kind both. Only jobs with all of
        `labels`.
        """
        limit = pagination.size(page_size)
        (before,) = pagination.key("jobs", tenant, page_token, str) or ("~",)
        query, values = "SELECT * FROM jobs WHERE tenant = ? AND job_id < ?", [tenant, before]
        if states:
            query += f" AND state IN ({marks(states)})"
            values += sorted(states)
        if model:
            check_name(model, "model")
            query += " AND model = ?"
            values.append(model)
        if kind is not None:
            query += " AND kind = ?"
            values.append(kind)
        for label in (labels or {}).items():
            query += (
                " AND EXISTS (SELECT 1 FROM job_labels AS l"
                " WHERE l.job_id = jobs.job_id AND l.key = ? AND l.value = ?)"
            )
            values += label
        with self.database.read() as connection:
            kept = connection.execute(f"{query} ORDER BY job_id DESC LIMIT ?", (*values, limit + 1))
            shown, more = pagination.page(kept, limit, "message")
        jobs = [record_of(row) for row in shown]
        return jobs, pagination.token("jobs", tenant, jobs[-1].job_id) if more else ""

    @staticmethod
    def stored_bytes(connection: Connection, tenant: str) -> int:
        """Counts what a tenant's jobs take: requests, messages and, once ended, events."""
        (stored,) = connection.execute(
            "SELECT COALESCE(SUM(size_bytes), 0) FROM jobs WHERE tenant = ?", (tenant,)
        ).fetchone()
        return int(stored)

    def _hold(self, connection: Connection, job_id: str, request: JobRequest | RankRequest) -> None:
        """Keeps what a job works with from being deleted; raises NotFound or InvalidInput."""
        tenant = request.tenant
        named = [request.dataset_id] if request.dataset_id else []
        for dataset_id in named:
            is_alone = isinstance(request, RankRequest) or request.base is None
            dataset_rows.check_usable(connection, tenant, dataset_id, is_alone=is_alone)
        if isinstance(request, JobRequest):
            if target := request.target_dataset_id:
                field = "domain_adaptation.target_dataset_id"
                dataset_rows.check_usable(connection, tenant, target, field, is_target=True)
                named.append(target)
            named += [source.dataset_id for source in request.base_sources if source.dataset_id]
        holds.hold(connection, tenant, "dataset", named, job_id)
        backbones = request.backbone_names(self._default_backbone)
        holds.hold(connection, tenant, "backbone", backbones, job_id)


def _own(connection: Connection, job_id: str, tenant: str) -> JobRecord:
    """Returns a tenant's job; raises NotFound (JOB_NOT_FOUND), of another's too."""
    row = connection.execute(
        "SELECT * FROM jobs WHERE job_id = ? AND tenant = ?", (job_id, tenant)
    ).fetchone()
    return found(row, job_id)


def _asked_before(
    connection: Connection, tenant: str, request_id: str, message: bytes
) -> JobRecord | None:
    if not request_id:
        return None
    row = connection.execute(
        "SELECT * FROM jobs WHERE tenant = ? AND request_id = ?", (tenant, request_id)
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
    return record_of(row)


def _new_id(connection: Connection) -> str:
    # Later jobs sort later, even in one millisecond and when the clock went back.
    (newest,) = connection.execute("SELECT MAX(job_id) FROM jobs").fetchone()
    floor = int(newest.split("-")[1], 16) + 1 if newest else 0
    return f"job-{max(time.time_ns() // 1_000_000, floor):012x}-{secrets.token_hex(8)}"
