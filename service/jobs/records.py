"""Jobs as records: what a row of the table jobs holds, decoded."""

from dataclasses import dataclass
from typing import Any

import msgspec

from service.contract import BackbonesRanked, Progressed
from service.domain import JobKind, JobState, ReadSummary
from service.errors import NotFound, Reason
from service.jobs.request import JobRequest, RankRequest


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
        raise NotFound(Reason.JOB_NOT_FOUND, f"no job has the id {job_id[:80]!r}: see ListJobs")
    return record_of(row)
