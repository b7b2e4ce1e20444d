"""Jobs and their events as rows hold them, and the SQL that the stores of this package share.

Jobs are read, numbered and ended here, their events added. Every function with a connection works
in its caller's transaction. A change of a job and its event are one transaction, so neither is
ever without the other.
"""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from service.contract import BackbonesRanked, DataFound, EpochEnded, Note, Progressed
from service.domain import Figure, JobKind, JobState, ReadSummary, Verdict
from service.errors import Exhausted, NotFound, OverQuota, Reason
from service.jobs.request import JobRequest, RankRequest
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


class StateChanged(msgspec.Struct, frozen=True, tag="state"):
    """The job moved to another state; `reason` and `message` say why, where there is a why."""

    state: JobState
    reason: Reason | None = None
    message: str = ""


class Published(msgspec.Struct, frozen=True, tag="published"):
    """The job's version is there; one with gate failures is a candidate."""

    model: str
    version: int
    figure: Figure | None
    """The manifest's headline; None where nothing could be measured."""
    gate_failures: list[str] = []
    calibrated: bool = False
    gate: Literal[Verdict, "none"] = "none"
    """The worst verdict of its gate's conditions."""

    @property
    def is_candidate(self) -> bool:
        """Whether no alias points to it."""
        return bool(self.gate_failures)


Payload = StateChanged | Progressed | EpochEnded | DataFound | Note | Published

_decoder = msgspec.json.Decoder(Payload)


class JobEvent(msgspec.Struct, frozen=True):
    """One event; numbered from 1 within its job, without gaps."""

    sequence: int
    time_s: float
    payload: Payload

    @property
    def is_last(self) -> bool:
        """Whether none can follow."""
        return isinstance(self.payload, StateChanged) and self.payload.state.is_final


def encode(payload: Payload) -> str:
    """Returns the payload as the store keeps it."""
    return msgspec.json.encode(payload).decode()


def decode(text: str) -> Payload:
    """Returns what `encode` was given."""
    payload: Payload = _decoder.decode(text)
    return payload


@dataclass(frozen=True)
class JobRecord:
    """One job as it is now."""

    job_id: str
    kind: JobKind
    request: JobRequest | RankRequest
    message: bytes
    """The request as it came, serialised, its inline images replaced by their datasets."""
    state: JobState
    create_time_s: float
    start_time_s: float | None
    end_time_s: float | None
    version: int
    """0 unless a fine-tuning has SUCCEEDED."""
    error_reason: Reason | None
    error_message: str
    last_sequence: int
    progress: Progressed | None
    owner: str
    """The replica that works on it; "" unless RUNNING."""
    attempts: int
    """How often it was claimed. With `owner` it is the fence of what a worker writes."""
    crashes: int
    """How many attempts ended without a result, through nobody's wish."""
    cancel_requested: bool
    is_candidate: bool
    """Whether its version was a candidate when the job ended."""
    waiting_since_s: float | None
    """When it was deferred first, by the database's clock."""
    summary: ReadSummary | None = None
    """What became of the files of its data, once they were read."""
    ranking: BackbonesRanked | None = None
    """The result of a ranking that has SUCCEEDED."""

    @property
    def tenant(self) -> str:
        """Returns the tenant that it belongs to."""
        return self.request.tenant

    @property
    def label(self) -> str:
        """Returns what logs and metrics call its model; "" for a ranking."""
        return str(self.request.key) if isinstance(self.request, JobRequest) else ""

    @property
    def method(self) -> str:
        """Returns what metrics call its method: the request's, or "ranking"."""
        if isinstance(self.request, RankRequest):
            return self.kind.value
        return str(self.request.method.__struct_config__.tag)


def record_of(row: Any) -> JobRecord:
    """Returns the job of a row of the table jobs."""
    kind = JobKind(row["kind"])
    request: JobRequest | RankRequest = (
        msgspec.json.decode(row["request_json"], type=JobRequest)
        if kind is JobKind.FINE_TUNE
        else msgspec.json.decode(row["request_json"], type=RankRequest)
    )
    progress, summary, result = row["progress_json"], row["summary_json"], row["result_json"]
    return JobRecord(
        job_id=row["job_id"],
        kind=kind,
        request=request,
        message=row["message"],
        state=JobState(row["state"]),
        create_time_s=row["create_time_s"],
        start_time_s=row["start_time_s"],
        end_time_s=row["end_time_s"],
        version=row["version"],
        error_reason=Reason(row["error_reason"]) if row["error_reason"] else None,
        error_message=row["error_message"],
        last_sequence=row["last_sequence"],
        progress=msgspec.json.decode(progress, type=Progressed) if progress else None,
        owner=row["owner"] or "",
        attempts=row["attempts"],
        crashes=row["crashes"],
        cancel_requested=bool(row["cancel_requested"]),
        is_candidate=bool(row["is_candidate"]),
        waiting_since_s=row["waiting_since_s"],
        summary=msgspec.json.decode(summary, type=ReadSummary) if summary else None,
        ranking=msgspec.json.decode(result, type=BackbonesRanked) if result else None,
    )


def found(row: Any, job_id: str) -> JobRecord:
    """Returns the job of a row; raises NotFound (JOB_NOT_FOUND) where there is none."""
    if row is None:
        raise NotFound(
            Reason.JOB_NOT_FOUND,
            f"no job has the id {job_id[:80]!r}: the list of jobs shows which there are",
        )
    return record_of(row)


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
        (job_id, sequence, time_s, encode(payload)),
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
