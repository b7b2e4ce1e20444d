"""One job as a row of the database, read and checked."""

from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain import JobState
from service.errors import NotFound, Reason, WrongState
from service.jobs.contract import Progressed
from service.jobs.request import JobRequest
from service.storage.database import Connection


@dataclass(frozen=True)
class JobRecord:
    """One job as it is now."""

    job_id: str
    request: JobRequest
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


def check_dataset(connection: Connection, dataset_id: str) -> None:
    """Raises NotFound (DATASET_NOT_FOUND)."""
    row = connection.execute(
        "SELECT 1 FROM datasets WHERE dataset_id = ?", (dataset_id,)
    ).fetchone()
    if row is None:
        raise NotFound(
            Reason.DATASET_NOT_FOUND,
            f"no dataset has the id {dataset_id[:80]!r}: upload it, or see ListDatasets",
            field="dataset_id",
        )


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


def get(connection: Connection, job_id: str) -> JobRecord:
    """The job; raises NotFound (JOB_NOT_FOUND)."""
    row = connection.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(Reason.JOB_NOT_FOUND, f"no job has the id {job_id[:80]!r}: see ListJobs")
    return record_of(row)


def record_of(row: Any) -> JobRecord:
    """The job in a row of the table jobs."""
    progress = row["progress_json"]
    return JobRecord(
        job_id=row["job_id"],
        request=msgspec.json.decode(row["request_json"], type=JobRequest),
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
    )
