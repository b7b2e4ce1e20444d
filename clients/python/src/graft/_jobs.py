"""A handle on one job: wait for it, follow it, cancel it; sync and async alike."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from graft.errors import JobCancelled, JobFailed
from graft.types import Job, JobEvent, JobState, Version

if TYPE_CHECKING:
    from graft.aio import AsyncClient
    from graft.client import Client

OnEvent = Callable[[JobEvent], None]


def _published(job: Job) -> int:
    """The version of a job that ended well; raises for one that did not."""
    if job.state is JobState.CANCELLED:
        raise JobCancelled(job)
    if job.state is not JobState.SUCCEEDED or job.version is None:
        raise JobFailed(job)
    return job.version


class JobHandle:
    """A job as `fine_tune` started it; `job` is how it was when last asked."""

    def __init__(self, client: "Client", job: Job) -> None:
        self._client = client
        self.job = job

    def __repr__(self) -> str:
        return f"<JobHandle {self.job_id} of {self.job.model}: {self.job.state}>"

    @property
    def job_id(self) -> str:
        """Its id; `Client.job` makes a handle of it again."""
        return self.job.job_id

    def refresh(self) -> Job:
        """Asks how it stands."""
        self.job = self._client.get_job(self.job_id)
        return self.job

    def events(self, after: int = 0, timeout_s: float | None = None) -> Iterator[JobEvent]:
        """Its events after the one numbered `after`, to its last."""
        return self._client.watch_job(self.job_id, after=after, timeout_s=timeout_s)

    def wait(self, timeout_s: float | None = None, on_event: OnEvent | None = None) -> Version:
        """Waits for its end and returns the version it made, a candidate too.

        Raises JobFailed, JobCancelled, or DeadlineExceeded when it takes longer
        than `timeout_s` (it goes on). `on_event` is told of every event.
        """
        for event in self.events(timeout_s=timeout_s):
            if on_event:
                on_event(event)
        number = _published(self.refresh())
        return self._client.get_version(self.job.model, version=number)

    def cancel(self) -> Job:
        """Asks for its end; `wait` raises JobCancelled when it came."""
        self.job = self._client.cancel_job(self.job_id)
        return self.job


class AsyncJobHandle:
    """As `JobHandle`, for `AsyncClient`."""

    def __init__(self, client: "AsyncClient", job: Job) -> None:
        self._client = client
        self.job = job

    def __repr__(self) -> str:
        return f"<AsyncJobHandle {self.job_id} of {self.job.model}: {self.job.state}>"

    @property
    def job_id(self) -> str:
        """As `JobHandle.job_id`."""
        return self.job.job_id

    async def refresh(self) -> Job:
        """As `JobHandle.refresh`."""
        self.job = await self._client.get_job(self.job_id)
        return self.job

    def events(self, after: int = 0, timeout_s: float | None = None) -> AsyncIterator[JobEvent]:
        """As `JobHandle.events`."""
        return self._client.watch_job(self.job_id, after=after, timeout_s=timeout_s)

    async def wait(
        self, timeout_s: float | None = None, on_event: OnEvent | None = None
    ) -> Version:
        """As `JobHandle.wait`."""
        async for event in self.events(timeout_s=timeout_s):
            if on_event:
                on_event(event)
        number = _published(await self.refresh())
        return await self._client.get_version(self.job.model, version=number)

    async def cancel(self) -> Job:
        """As `JobHandle.cancel`."""
        self.job = await self._client.cancel_job(self.job_id)
        return self.job
