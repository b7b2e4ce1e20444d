"""How jobs end: with a version or a ranking, or as an error that has the job."""

import grpc

from graftml.errors import GraftError, invalid
from graftml.types import BackboneRanking, Job, JobState


class JobFailed(GraftError):  # noqa: N818 - named for what happened, as its siblings
    """A job ended without a result; `job` is how it ended."""

    def __init__(self, job: Job) -> None:
        cause = job.error
        why = cause.message if cause else "the service did not say why"
        super().__init__(
            f"{_named(job)} failed: {why}",
            reason=cause.reason if cause else "",
            code=cause.code if cause else grpc.StatusCode.UNKNOWN,
        )
        self.job = job


class JobCancelled(GraftError):  # noqa: N818
    """A job was cancelled before it ended; `job` is how it ended."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{_named(job)} was cancelled", code=grpc.StatusCode.CANCELLED)
        self.job = job


def published(job: Job) -> int:
    """Returns the version of a job that ended well; raises for one that did not."""
    if job.kind == "ranking":
        raise invalid(f"{job.job_id} ranks backbones and makes no version: see Job.ranking")
    _check_succeeded(job)
    if job.version is None:
        raise JobFailed(job)
    return job.version


def ranked(job: Job) -> BackboneRanking:
    """Returns the ranking of a job that ended well; raises for one that did not."""
    _check_succeeded(job)
    if job.ranking is None:
        raise JobFailed(job)
    return job.ranking


def _check_succeeded(job: Job) -> None:
    """Raises JobCancelled or JobFailed for a job that did not end well."""
    if job.state is JobState.CANCELLED:
        raise JobCancelled(job)
    if job.state is not JobState.SUCCEEDED:
        raise JobFailed(job)


def _named(job: Job) -> str:
    return f"job {job.job_id} of model {job.model}" if job.model else f"ranking {job.job_id}"
