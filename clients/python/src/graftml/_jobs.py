"""Handles on jobs: wait for one, follow it, cancel it; sync and async alike."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from graftml.errors import GraftError, JobCancelled, JobFailed, invalid
from graftml.types import BackboneRanking, Job, JobEvent, JobState, Version

if TYPE_CHECKING:
    from graftml.aio import AsyncClient
    from graftml.client import Client

OnEvent = Callable[[JobEvent], None]


def _check_succeeded(job: Job) -> None:
    """Raises JobCancelled or JobFailed for a job that did not end well."""
    if job.state is JobState.CANCELLED:
        raise JobCancelled(job)
    if job.state is not JobState.SUCCEEDED:
        raise JobFailed(job)


def _published(job: Job) -> int:
    """Returns the version of a job that ended well; raises for one that did not."""
    if job.kind == "ranking":
        raise invalid(f"{job.job_id} ranks backbones and makes no version: see Job.ranking")
    _check_succeeded(job)
    if job.version is None:
        raise JobFailed(job)
    return job.version


def _ranked(job: Job) -> BackboneRanking:
    """Returns the ranking of a job that ended well; raises for one that did not."""
    _check_succeeded(job)
    if job.ranking is None:
        raise JobFailed(job)
    return job.ranking


class _Handle:
    """A job that was started; `job` is how it was when last asked."""

    def __init__(self, client: "Client", job: Job) -> None:
        self._client = client
        self.job = job

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job_id} of {self.job.model}: {self.job.state}>"

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

    def _wait(self, timeout_s: float | None, on_event: OnEvent | None) -> Job:
        for event in self.events(timeout_s=timeout_s):
            if on_event:
                on_event(event)
        return self.refresh()

    def cancel(self) -> Job:
        """Asks for its end; `wait` raises JobCancelled when it came."""
        self.job = self._client.cancel_job(self.job_id)
        return self.job


class JobHandle(_Handle):
    """A fine-tuning as `fine_tune` started it; `job` is how it was when last asked."""

    def wait(self, timeout_s: float | None = None, on_event: OnEvent | None = None) -> Version:
        """Waits for its end and returns the version it made, a candidate too.

        Raises JobFailed, JobCancelled, or DeadlineExceeded when it takes longer
        than `timeout_s` (it goes on). `on_event` is told of every event.
        """
        number = _published(self._wait(timeout_s, on_event))
        return self._client.get_version(self.job.model, version=number)


class RankingHandle(_Handle):
    """A ranking as `start_ranking` started it; `job` is how it was when last asked."""

    def wait(
        self, timeout_s: float | None = None, on_event: OnEvent | None = None
    ) -> BackboneRanking:
        """Waits for its end and returns the ranking; raises as `JobHandle.wait`."""
        return _ranked(self._wait(timeout_s, on_event))

    def result(self, timeout_s: float) -> BackboneRanking:
        """Waits as `wait`; cancels the job when it takes longer, or is interrupted."""
        try:
            return self.wait(timeout_s)
        except (JobFailed, JobCancelled):
            raise
        except BaseException:
            with suppress(GraftError):
                self.cancel()
            raise


class _AsyncHandle:
    """As `_Handle`, for `AsyncClient`."""

    def __init__(self, client: "AsyncClient", job: Job) -> None:
        self._client = client
        self.job = job

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.job_id} of {self.job.model}: {self.job.state}>"

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

    async def _wait(self, timeout_s: float | None, on_event: OnEvent | None) -> Job:
        async for event in self.events(timeout_s=timeout_s):
            if on_event:
                on_event(event)
        return await self.refresh()

    async def cancel(self) -> Job:
        """As `JobHandle.cancel`."""
        self.job = await self._client.cancel_job(self.job_id)
        return self.job


class AsyncJobHandle(_AsyncHandle):
    """As `JobHandle`, for `AsyncClient`."""

    async def wait(
        self, timeout_s: float | None = None, on_event: OnEvent | None = None
    ) -> Version:
        """As `JobHandle.wait`."""
        number = _published(await self._wait(timeout_s, on_event))
        return await self._client.get_version(self.job.model, version=number)


class AsyncRankingHandle(_AsyncHandle):
    """As `RankingHandle`, for `AsyncClient`."""

    async def wait(
        self, timeout_s: float | None = None, on_event: OnEvent | None = None
    ) -> BackboneRanking:
        """As `RankingHandle.wait`."""
        return _ranked(await self._wait(timeout_s, on_event))

    async def result(self, timeout_s: float) -> BackboneRanking:
        """As `RankingHandle.result`."""
        try:
            return await self.wait(timeout_s)
        except (JobFailed, JobCancelled):
            raise
        except BaseException:
            with suppress(GraftError):
                await self.cancel()
            raise
