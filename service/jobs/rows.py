"""One job as a row of the database, read and checked."""

import hashlib
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from service.contract import Progressed
from service.domain import DEFAULT_TENANT, ClassCount, JobState, ReadSummary, tenant_key
from service.errors import Exhausted, InvalidInput, NotFound, OverQuota, Reason, WrongState
from service.ingest.names import shown
from service.jobs.request import JobRequest
from service.storage.database import Connection

MIN_CLASSES = 2
"""That a job needs, with those of its base."""
SELECT = (
    "SELECT jobs.*,"
    " (SELECT is_candidate FROM versions WHERE versions.job_id = jobs.job_id) AS is_candidate"
    " FROM jobs"
)
"""What `record_of` reads, without its conditions."""
_MAX_ANCESTORS = 100
_RETRY_AFTER_S = 30.0
BESIDE_REQUEST_BYTES = 1024
"""About what a job takes in the database beside its request: its row, its first events."""


@dataclass(frozen=True)
class JobRecord:
    """One job as it is now."""

    job_id: str
    request: JobRequest
    message: bytes
    """The request as it came, serialised, its inline images replaced by their datasets."""
    dataset_id: str
    """What it works on, an archive's too; "" for a folder, or while no archive was unpacked."""
    state: JobState
    create_time_s: float
    start_time_s: float | None
    end_time_s: float | None
    version: int
    """0 unless SUCCEEDED."""
    error_reason: Reason | None
    error_message: str
    last_sequence: int
    progress: Progressed | None
    attempts: int
    """How often a trainer was started for it."""
    crashes: int
    """How many of them ended without a result, through nobody's wish."""
    cancel_requested: bool
    is_candidate: bool
    """Its version is one still."""
    summary: ReadSummary | None = None
    """What became of the files of its data, once they were read."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.request.tenant


def check_dataset(
    connection: Connection,
    tenant: str,
    dataset_id: str,
    field: str = "dataset_id",
    *,
    is_target: bool = False,
    is_alone: bool = False,
) -> None:
    """Raises NotFound (DATASET_NOT_FOUND), or InvalidInput for one that has no classes to learn.

    One that `is_alone`, without the images of a base, needs two. Another tenant's is not found.
    """
    row = connection.execute(
        "SELECT is_unlabelled, classes_json FROM datasets WHERE dataset_id = ? AND tenant = ?",
        (dataset_id, tenant),
    ).fetchone()
    if row is None:
        raise NotFound(
            Reason.DATASET_NOT_FOUND,
            f"no dataset has the id {dataset_id[:80]!r}: upload it, or see ListDatasets",
            field=field,
        )
    if row["is_unlabelled"] and not is_target:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"dataset {dataset_id} was uploaded without classes, so that it can be the target of "
            "domain adaptation alone: upload its images with their classes to learn from them",
            field=field,
        )
    if is_alone:
        classes = msgspec.json.decode(row["classes_json"], type=list[ClassCount])
        check_classes([count.label for count in classes], field)


def check_classes(labels: Collection[str], field: str) -> None:
    """Raises InvalidInput (DATASET_UNUSABLE) for fewer classes than can be told apart."""
    if len(labels) < MIN_CLASSES:
        named = f" ({', '.join(map(shown, labels))})" if labels else ""
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the images are of {len(labels)} class{named}, and {MIN_CLASSES} are needed to tell "
            "apart: add images of another class, or grow a version that has some with `base`",
            field=field,
        )


def check_open_jobs(connection: Connection, tenant: str, max_open_jobs: int) -> None:
    """Raises OverQuota (concurrent_jobs) when a tenant has so many that have not ended."""
    (count,) = connection.execute(
        "SELECT COUNT(*) FROM jobs WHERE tenant = ? AND state IN (?, ?)",
        (tenant, JobState.QUEUED, JobState.RUNNING),
    ).fetchone()
    if count >= max_open_jobs:
        raise OverQuota(
            "concurrent_jobs",
            f"{count} of your jobs wait or run, and {max_open_jobs} may at once: wait for one to "
            "end, or cancel one",
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


def count_bytes(connection: Connection, tenant: str, request_json: str, message: bytes) -> None:
    """Adds a new job to what a tenant stores; jobs are never deleted."""
    size = len(request_json.encode()) + len(message) + BESIDE_REQUEST_BYTES
    connection.execute(
        "INSERT INTO job_bytes (tenant, size_bytes) VALUES (?, ?) ON CONFLICT (tenant)"
        " DO UPDATE SET size_bytes = job_bytes.size_bytes + excluded.size_bytes",
        (tenant, size),
    )


def request_key(tenant: str, request_id: str) -> str:
    """A tenant's request id among those of all, as the table keeps it."""
    if tenant == DEFAULT_TENANT:
        return request_id
    # Longer than any id that the default tenant may send.
    return tenant_key(tenant, hashlib.sha512(request_id.encode()).hexdigest())


def use(connection: Connection, job_id: str, dataset_ids: Iterable[str]) -> None:
    """Notes what a job needs beside its own dataset; none of it is deleted before it ends."""
    connection.executemany(
        "INSERT INTO job_datasets (job_id, dataset_id) VALUES (?, ?) ON CONFLICT DO NOTHING",
        [(job_id, dataset_id) for dataset_id in dataset_ids],
    )


def ancestors(connection: Connection, job_id: str) -> list[JobRecord]:
    """A job and those that made the versions it grew from, oldest first.

    Raises WrongState (BASE_DATA_GONE) for a job that is not known, and when
    there are more than 100.
    """
    found: list[JobRecord] = []
    while job_id:
        row = connection.execute(f"{SELECT} WHERE job_id = ?", (job_id,)).fetchone()
        if row is None or len(found) == _MAX_ANCESTORS:
            why = "is not known here" if row is None else f"is one of more than {_MAX_ANCESTORS}"
            raise WrongState(
                Reason.BASE_DATA_GONE,
                f"{job_id}, a job whose images the base grew from, {why}: leave out the base "
                "and send all images",
                field="base",
            )
        found.append(record_of(row))
        job_id = found[-1].request.base_job_id
    return found[::-1]


def check_running(record: JobRecord) -> None:
    """Raises WrongState (JOB_FINISHED) for a job that does not run."""
    if record.state is not JobState.RUNNING:
        raise WrongState(Reason.JOB_FINISHED, f"{record.job_id} does not run, it is {record.state}")


def check_not_final(record: JobRecord) -> None:
    """Raises WrongState (JOB_FINISHED) for a job that has ended."""
    if record.state.is_final:
        raise WrongState(
            Reason.JOB_FINISHED, f"{record.job_id} has ended already, it is {record.state}"
        )


def get(connection: Connection, job_id: str, tenant: str) -> JobRecord:
    """A tenant's job; raises NotFound (JOB_NOT_FOUND), of another's too."""
    query = f"{SELECT} WHERE job_id = ? AND tenant = ?"
    return _found(connection.execute(query, (job_id, tenant)).fetchone(), job_id)


def get_any(connection: Connection, job_id: str) -> JobRecord:
    """A job, whosever it is, for the server's own work; raises NotFound (JOB_NOT_FOUND)."""
    query = f"{SELECT} WHERE job_id = ?"
    return _found(connection.execute(query, (job_id,)).fetchone(), job_id)


def record_of(row: Any) -> JobRecord:
    """Returns the job in a row that `SELECT` found."""
    progress, summary = row["progress_json"], row["summary_json"]
    return JobRecord(
        job_id=row["job_id"],
        request=msgspec.json.decode(row["request_json"], type=JobRequest),
        message=row["message"],
        dataset_id=row["dataset_id"] or "",
        state=JobState(row["state"]),
        create_time_s=row["create_time_s"],
        start_time_s=row["start_time_s"],
        end_time_s=row["end_time_s"],
        version=row["version"],
        error_reason=Reason(row["error_reason"]) if row["error_reason"] else None,
        error_message=row["error_message"],
        last_sequence=row["last_sequence"],
        progress=msgspec.json.decode(progress, type=Progressed) if progress else None,
        attempts=row["attempts"],
        crashes=row["crashes"],
        cancel_requested=bool(row["cancel_requested"]),
        summary=msgspec.json.decode(summary, type=ReadSummary) if summary else None,
        is_candidate=bool(row["is_candidate"]),
    )


def now(connection: Connection, job_id: str) -> float:
    """Seconds since 1970; never before what happened to the job last: clocks are put back."""
    (created,) = connection.execute(
        "SELECT create_time_s FROM jobs WHERE job_id = ?", (job_id,)
    ).fetchone()
    last = connection.execute(
        "SELECT time_s FROM job_events WHERE job_id = ? ORDER BY sequence DESC LIMIT 1", (job_id,)
    ).fetchone()
    return max(time.time(), float(created), float(last["time_s"]) if last else 0.0)


def _found(row: Any, job_id: str) -> JobRecord:
    if row is None:
        raise NotFound(Reason.JOB_NOT_FOUND, f"no job has the id {job_id[:80]!r}: see ListJobs")
    return record_of(row)
