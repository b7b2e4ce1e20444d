"""One job as a row of the database, read and checked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain import JobState
from service.errors import InvalidInput, NotFound, Reason, WrongState
from service.jobs.contract import Progressed
from service.jobs.request import JobRequest
from service.storage.database import Connection

_MAX_ANCESTORS = 100


@dataclass(frozen=True)
class JobRecord:
    """One job as it is now."""

    job_id: str
    request: JobRequest
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


def check_dataset(
    connection: Connection, dataset_id: str, field: str = "dataset_id", *, is_target: bool = False
) -> None:
    """Raises NotFound (DATASET_NOT_FOUND), or InvalidInput for one that has no classes to learn."""
    row = connection.execute(
        "SELECT is_unlabelled FROM datasets WHERE dataset_id = ?", (dataset_id,)
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
            "domain adaptation alone: upload its pictures with their classes to learn from them",
            field=field,
        )


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
        row = connection.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        if row is None or len(found) == _MAX_ANCESTORS:
            why = "is not known here" if row is None else f"is one of more than {_MAX_ANCESTORS}"
            raise WrongState(
                Reason.BASE_DATA_GONE,
                f"{job_id}, a job whose pictures the base grew from, {why}: leave out the base "
                "and send all pictures",
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
    )
