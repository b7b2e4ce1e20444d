"""Makes a version of what a trainer left: its files are stored, loaded, and published.

A version is warm in the engine before it is announced, unless it is a candidate, and
announced in the same step as its job's success. What was stored and is not published
after all is deleted again.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from service.contract import Progressed
from service.domain import plain_name
from service.errors import Aborted, Exhausted, GraftError, Reason, Unavailable
from service.jobs.attempt import Done, Ended, unexpected
from service.jobs.settings import Settings
from service.jobs.store import JobRecord, JobStore
from service.ops import failpoints
from service.storage.artifacts import Artifacts, StoredVersion
from service.storage.disk_errors import PASSING
from service.storage.models import ModelStore

OnPublished = Callable[[str, StoredVersion], Awaitable[None]]
"""Warms a version that is about to be published, of the model with a key; its failure is logged and
passed over."""

log = logging.getLogger(__name__)


@dataclass
class _SoFar:
    """What a try that failed has done, so that the next one need not."""

    is_told: bool = False
    stored: StoredVersion | None = None


class Publishing:
    """Publishes; holds nothing of any one job."""

    def __init__(
        self,
        *,
        jobs: JobStore,
        models: ModelStore,
        artifacts: Artifacts,
        settings: Settings,
        on_published: OnPublished,
    ) -> None:
        self._jobs = jobs
        self._models = models
        self._artifacts = artifacts
        self._settings = settings
        self._on_published = on_published

    async def publish(
        self,
        job: JobRecord,
        done: Done,
        pause: Callable[[int], Awaitable[None]],
        is_stopped: Callable[[], bool],
    ) -> JobRecord | Ended | None:
        """Answers with the job that has succeeded, why there is no version, or None.

        A full disk and a held database are waited for up to `room_timeout_s`, with a
        pause after each try of which it is told the number; None means that it was
        stopped between two tries.
        """
        ended: Ended | None = None
        so_far = _SoFar()
        # What was trained is not thrown away for a disk that is full for a while.
        give_up_s = time.monotonic() + self._settings.room_timeout_s
        for tries in itertools.count():
            try:
                return await self._go_on(job, done, so_far)
            except (Exhausted, Unavailable) as error:
                if error.reason not in PASSING or time.monotonic() > give_up_s:
                    ended = Ended(error.reason, error.message)
                    break
                log.exception("a version cannot be published yet", extra={"job_id": job.job_id})
            except GraftError as error:
                ended = Ended(error.reason, error.message)
                break
            except Exception:
                log.exception("a job could not be published", extra={"job_id": job.job_id})
                ended = unexpected(job)
                break
            if not is_stopped():
                await pause(tries)
            if is_stopped():
                break
        await self._discard(job, done)
        return ended

    async def _go_on(self, job: JobRecord, done: Done, so_far: _SoFar) -> JobRecord:
        if not so_far.is_told:
            told = Progressed("publishing", 0.0)
            await asyncio.to_thread(self._jobs.append_event, job.job_id, told)
            so_far.is_told = True
            failpoints.reach("job.publishing")
        if (stored := so_far.stored) is None:
            stored = await asyncio.to_thread(self._artifacts.put, done.out_dir)
            _check_is_of(stored, job)
            # A candidate may never be asked for, and would push out what is.
            if not stored.manifest.gate_failures:
                await self._warm(job, stored)
                failpoints.reach("job.warmed")
            so_far.stored = stored
        publish = partial(
            self._models.publish,
            model=job.request.model,
            job_id=job.job_id,
            stored=stored,
            gate=job.request.gate,
            max_stored_bytes=self._settings.max_stored_bytes_of(job.tenant),
        )
        return await asyncio.to_thread(
            self._jobs.succeed,
            job.job_id,
            publish,
        )

    async def _warm(self, job: JobRecord, stored: StoredVersion) -> None:
        try:
            async with asyncio.timeout(self._settings.warm_timeout_s):
                await self._on_published(job.request.model, stored)
        except Exception:
            log.exception("a new version could not be warmed; its first call loads it",
                          extra={"model": job.request.model})  # fmt: skip

    async def _discard(self, job: JobRecord, done: Done) -> None:
        try:
            await asyncio.to_thread(self._models.discard, done.out_dir)
        except Exception:
            # The next start sweeps it.
            log.exception("what was not published could not be deleted",
                          extra={"job_id": job.job_id})  # fmt: skip


def _check_is_of(stored: StoredVersion, job: JobRecord) -> None:
    manifest = stored.manifest
    if (manifest.model, manifest.job_id) != (plain_name(job.request.model), job.job_id):
        raise Aborted(
            Reason.TRAINING_FAILED,
            f"the trainer's result is one of {manifest.job_id} for {manifest.model}, not of this "
            "job",
        )
