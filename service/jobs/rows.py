"""SQL that the stores of this package share: jobs read, numbered and ended, their events added.

Every function works in its caller's transaction. A change of a job and its event are one
transaction, so neither is ever without the other.
"""

from typing import Any

from service.domain import JobKind, JobState
from service.errors import Exhausted, OverQuota, Reason
from service.jobs import events
from service.jobs.events import Payload, StateChanged
from service.jobs.records import JobRecord, found
from service.storage import holds
from service.storage.database import Connection, now_s

BESIDE_REQUEST_BYTES = 1024
"""About what a job takes in the database beside its request and its events."""
EVENT_BYTES = (
    "(SELECT COALESCE(SUM(LENGTH(payload_json)), 0) FROM job_events"
    " WHERE job_events.job_id = jobs.job_id)"
)
"""What a job's events count for its tenant's quota, in characters."""
LATER = "last_event_s = CASE WHEN last_event_s > ? THEN last_event_s ELSE ? END"
"""Sets the time of a new event: a clock may be put back, and events do not go back with it."""
_RETRY_AFTER_S = 30.0


def get(connection: Connection, job_id: str) -> JobRecord:
    """Returns a job, whosever it is, for the server's own work; raises NotFound."""
    row = connection.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    return found(row, job_id)


def number(connection: Connection, job_id: str) -> tuple[int, float]:
    """Returns the number and the time of a job's next event; locks its row."""
    now = now_s(connection)
    row = connection.execute(
        f"UPDATE jobs SET last_sequence = last_sequence + 1, {LATER} WHERE job_id = ?"  # nosec B608  # noqa: S608 - our words
        " RETURNING last_sequence, last_event_s",
        (now, now, job_id),
    ).fetchone()
    return int(row["last_sequence"]), float(row["last_event_s"])


def add_event(
    connection: Connection, job_id: str, sequence: int, time_s: float, payload: Payload
) -> None:
    """Adds an event that was numbered."""
    connection.execute(
        "INSERT INTO job_events (job_id, sequence, time_s, payload_json) VALUES (?, ?, ?, ?)",
        (job_id, sequence, time_s, events.encode(payload)),
    )


def end(
    connection: Connection,
    job_id: str,
    numbered: tuple[int, float],
    change: StateChanged,
    *,
    version: int = 0,
    is_candidate: bool = False,
    result_json: str | None = None,
) -> None:
    """Ends a job: it holds nothing any more. Its row is locked and its event numbered."""
    add_event(connection, job_id, *numbered, change)
    connection.execute(
        "UPDATE jobs SET state = ?, owner = NULL, end_time_s = ?, version = ?, is_candidate = ?,"  # nosec B608  # noqa: S608 - our words
        " result_json = ?, error_reason = ?, error_message = ?, progress_json = NULL,"
        f" cancel_requested = 0, size_bytes = size_bytes + {EVENT_BYTES} WHERE job_id = ?",
        (
            change.state,
            numbered[1],
            version,
            int(is_candidate),
            result_json,
            change.reason,
            change.message,
            job_id,
        ),
    )
    holds.release(connection, job_id)


def check_open_jobs(
    connection: Connection, tenant: str, kind: JobKind, max_open: int | None
) -> None:
    """Raises OverQuota when a tenant has so many jobs of a kind that have not ended.

    Its subject is `concurrent_jobs`, or `rankings`. None means no limit.
    """
    if max_open is None:
        return
    (count,) = connection.execute(
        "SELECT COUNT(*) FROM jobs WHERE tenant = ? AND kind = ? AND state IN (?, ?)",
        (tenant, kind, JobState.QUEUED, JobState.RUNNING),
    ).fetchone()
    if count < max_open:
        return
    is_ranking = kind is JobKind.RANKING
    if is_ranking and max_open == 0:
        raise OverQuota(
            "rankings", "you may have no jobs, and rank no backbones either: ask the operator"
        )
    raise OverQuota(
        "rankings" if is_ranking else "concurrent_jobs",
        f"{count} of your {'rankings' if is_ranking else 'jobs'} wait or run, and {max_open} may "
        "at once: wait for one to end, or cancel one",
        retry_after_s=_RETRY_AFTER_S,
    )


def check_queue(connection: Connection, tenant: str, max_queued: int, *, is_shared: bool) -> None:
    """Raises Exhausted (QUEUE_FULL) where so many jobs wait, or half as many of one tenant.

    The latter, rounded up, where several tenants share the queue.
    """
    queued, own = connection.execute(
        "SELECT COUNT(*), COUNT(*) FILTER (WHERE tenant = ?) FROM jobs WHERE state = ?",
        (tenant, JobState.QUEUED),
    ).fetchone()
    if queued >= max_queued:
        full = f"{queued} jobs wait already, the most allowed"
    elif is_shared and own >= (max_queued + 1) // 2:
        full = f"{own} of your jobs wait already, the most of one tenant"
    else:
        return
    raise Exhausted(Reason.QUEUE_FULL, f"{full}: try again later", retry_after_s=_RETRY_AFTER_S)


def marks(values: Any) -> str:
    """Returns a question mark for each value, as a list in SQL."""
    return ", ".join("?" for _ in values)
