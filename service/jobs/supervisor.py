"""Runs queued jobs, so many at once, and saves what becomes of each.

Lives on the event loop; the database is reached through threads. A job's version
is warm in the engine before it is announced, unless it is a candidate, and
announced in the same step as the job's success. `wait_failed` raises when the
supervisor itself can go no further: the process must end then, and its next start
takes the jobs up again. Stops with `close`, which puts unfinished jobs back into
the queue.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn

from service import faults
from service.domain import JobState, plain_name
from service.errors import Damaged, Exhausted, GraftError, Reason, Unavailable
from service.jobs.attempt import Attempts, Crashed, Done, Ended, Outcome, Postponed
from service.jobs.contract import Progressed
from service.jobs.events import JobEvent, Published, StateChanged
from service.jobs.launcher import Launcher
from service.jobs.settings import Kind, Settings
from service.jobs.store import JobRecord, JobStore
from service.jobs.uninterrupted import uninterrupted
from service.storage.artifacts import Artifacts, StoredVersion
from service.storage.datasets import DatasetStore
from service.storage.disk_errors import PASSING
from service.storage.models import ModelStore
from service.telemetry import Telemetry

__all__ = ["Settings", "Supervisor"]

_LOOK_AGAIN_S = 30.0
"""Also without a wake, so that a lost one costs time alone."""

OnPublished = Callable[[str, StoredVersion], Awaitable[None]]
"""Warms a version that is about to be published, of the model with a key; its failure is logged and
passed over."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Worker:
    job: JobRecord
    kind: Kind
    why_stopped: Literal["", "cancel", "closing"] = ""
    task: asyncio.Task[None] | None = None

    def interrupt(self, why: Literal["cancel", "closing"]) -> None:
        if not self.why_stopped:
            self.why_stopped = why
            if self.task is not None:
                self.task.cancel()


class Supervisor:
    """The jobs of one process."""

    def __init__(
        self,
        *,
        jobs: JobStore,
        models: ModelStore,
        datasets: DatasetStore,
        artifacts: Artifacts,
        launcher: Launcher,
        telemetry: Telemetry,
        settings: Settings,
        on_published: OnPublished,
    ) -> None:
        self._jobs = jobs
        self._models = models
        self._datasets = datasets
        self._artifacts = artifacts
        self._telemetry = telemetry
        self._settings = settings
        self._on_published = on_published
        self._attempts = Attempts(
            jobs=jobs,
            models=models,
            datasets=datasets,
            launcher=launcher,
            telemetry=telemetry,
            settings=settings,
        )
        self._free: dict[Kind, int] = {
            "cpu": settings.cpu_jobs,
            "gpu": settings.gpu_jobs if settings.has_gpu else 0,
        }
        has_gpu_slots = self._free["gpu"] > 0
        self._kind_of: dict[str, Kind] = {
            "cpu": "cpu",
            "cuda": "gpu",
            "auto": "gpu" if has_gpu_slots else "cpu",
        }
        self._refused = [d for d, kind in self._kind_of.items() if not self._free[kind]]
        self._workers: dict[str, _Worker] = {}
        self._ended: deque[str] = deque()
        self._has_taken_up = False
        self._woken = asyncio.Event()
        self._closing = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Takes up what an earlier process left, and begins to run jobs."""
        self._loop = asyncio.get_running_loop()
        self._failure = self._loop.create_future()
        self._jobs.listen(self._heard)
        try:
            await self._take_up()
        except (Exhausted, Unavailable) as error:
            # Models are served on a full disk, too; `_look` goes on with this.
            if error.reason not in PASSING:
                raise
            log.exception("what an earlier process left cannot be taken up yet")
        self._running = asyncio.create_task(self._run(), name="supervisor")
        self._running.add_done_callback(self._note_failure)

    async def _take_up(self) -> None:
        for job in await asyncio.to_thread(self._jobs.requeue_running, self._settings.max_crashes):
            log.warning("a job was under way when the service ended; it is %s now", job.state,
                        extra={"job_id": job.job_id})  # fmt: skip
        faults.reach("job.requeued")
        await asyncio.to_thread(self._sweep_work_dir)
        self._has_taken_up = True

    def wake(self) -> None:
        """Says that there may be something to do; from the event loop."""
        self._woken.set()

    async def wait_failed(self) -> NoReturn:
        """Waits for as long as all is well; raises what made the supervisor fail."""
        assert self._failure is not None, "start comes first"
        await asyncio.shield(self._failure)
        raise AssertionError("it holds nothing but an error")

    async def close(self, grace_s: float) -> None:
        """Stops the trainers within `grace_s`, about, and puts their jobs back into the queue."""
        self._closing.set()
        self._woken.set()
        if self._running is not None:
            await asyncio.wait({self._running})
        for worker in self._workers.values():
            worker.interrupt("closing")
        # What prepares data in a thread gives up then, too.
        self._datasets.leave_jobs()
        tasks = [worker.task for worker in self._workers.values() if worker.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            if late:
                log.error("%d jobs were not put back in time; the next start does it", len(late))
        await self._clear_ended()

    async def _run(self) -> None:
        tries = 0
        while not self._closing.is_set():
            self._woken.clear()
            try:
                await self._look()
                wait_s, tries = _LOOK_AGAIN_S, 0
            except (Exhausted, Unavailable) as error:
                # The disk is full, or the database held: models are still served, and jobs
                # can wait.
                if error.reason not in PASSING:
                    raise
                log.exception("no job can be started")
                wait_s, tries = self._settings.pause_s(tries), tries + 1
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    async def _look(self) -> None:
        if not self._has_taken_up:
            await self._take_up()
        await self._clear_ended()
        for job_id in await asyncio.to_thread(self._jobs.to_cancel):
            if (worker := self._workers.get(job_id)) is not None:
                faults.reach("job.cancelling")
                worker.interrupt("cancel")
        while self._refused and (job := await self._claim(self._refused)) is not None:
            await self._save(
                partial(
                    self._jobs.fail,
                    job.job_id,
                    Reason.DEVICE_UNAVAILABLE,
                    f"this server trains nothing on the device {job.request.device!r}: leave the "
                    "device open, or ask its operator for one",
                )
            )
        while (devices := [d for d, kind in self._kind_of.items() if self._free[kind]]) and (
            job := await self._claim(devices)
        ) is not None:
            self._begin(job)

    async def _clear_ended(self) -> None:
        # One that was cancelled in the queue may have kept the checkpoint of an attempt.
        while self._ended:
            if (job_id := self._ended.popleft()) not in self._workers:
                await asyncio.to_thread(self._attempts.clear, job_id, keep_checkpoint=False)

    async def _claim(self, devices: list[str]) -> JobRecord | None:
        if self._closing.is_set():
            return None
        return await asyncio.to_thread(self._jobs.claim, devices)

    def _begin(self, job: JobRecord) -> None:
        faults.reach("job.claimed")
        worker = _Worker(job, self._kind_of[job.request.device])
        self._free[worker.kind] -= 1
        self._workers[job.job_id] = worker
        worker.task = asyncio.create_task(self._work(worker), name=job.job_id)
        worker.task.add_done_callback(partial(self._worker_ended, worker))
        log.info("job started", extra={"job_id": job.job_id, "model": job.request.model})

    async def _work(self, worker: _Worker) -> None:
        outcome: Outcome | None = None
        try:
            outcome = await self._attempts.run(worker.job, worker.kind)
        except asyncio.CancelledError:
            if not worker.why_stopped:
                raise
        except Exception:
            log.exception("a job failed unexpectedly", extra={"job_id": worker.job.job_id})
            outcome = _unexpected(worker.job)
        finally:
            # Before its end is told, so that what hears of it finds no series of it.
            self._telemetry.forget_job(worker.job.job_id, worker.job.request.model)
        # From here on a cancel comes too late: what happened is saved as it happened.
        await uninterrupted(self._settle(worker, outcome))

    async def _settle(self, worker: _Worker, outcome: Outcome | None) -> None:
        job = worker.job
        match outcome:
            case Done():
                record = await self._publish(job, outcome)
            case Ended():
                record = await self._fail(job, outcome)
            case Crashed():
                record = await self._save(
                    partial(
                        self._jobs.requeue,
                        job.job_id,
                        outcome.message,
                        outcome.reason,
                        self._settings.max_crashes,
                    )
                )
            case Postponed():
                record = await self._save(partial(self._jobs.requeue, job.job_id, outcome.message))
            case None if worker.why_stopped == "cancel":
                record = await self._save(partial(self._jobs.cancelled, job.job_id))
            case None:
                message = "the service stops; the job starts again with it"
                record = await self._save(partial(self._jobs.requeue, job.job_id, message))
        faults.reach("job.settled")
        log.info("job is %s", record.state,
                 extra={"job_id": job.job_id, "reason": record.error_reason or ""})  # fmt: skip
        if record.state.is_final and record.start_time_s and record.end_time_s:
            method = str(job.request.method.__struct_config__.tag)
            took_s = max(0.0, record.end_time_s - record.start_time_s)
            self._telemetry.job_seconds.labels(method).observe(took_s)
        await asyncio.to_thread(
            self._attempts.clear, job.job_id, keep_checkpoint=not record.state.is_final
        )

    async def _publish(self, job: JobRecord, done: Done) -> JobRecord:
        # What was trained is not thrown away for a disk that is full for a while.
        give_up = time.monotonic() + self._settings.room_timeout_s
        for tries in itertools.count():
            try:
                return await self._publish_once(job, done)
            except (Exhausted, Unavailable) as error:
                if self._closing.is_set():
                    raise
                is_late = error.reason is Reason.STORAGE_FULL and time.monotonic() > give_up
                if error.reason not in PASSING or is_late:
                    return await self._fail(job, Ended(error.reason, error.message))
                log.exception("a version cannot be published yet", extra={"job_id": job.job_id})
            except GraftError as error:
                return await self._fail(job, Ended(error.reason, error.message))
            except Exception:
                log.exception("a job could not be published", extra={"job_id": job.job_id})
                return await self._fail(job, _unexpected(job))
            await self._pause(tries)
        raise AssertionError("it counts for ever")

    async def _publish_once(self, job: JobRecord, done: Done) -> JobRecord:
        await asyncio.to_thread(self._jobs.append_event, job.job_id, Progressed("publishing", 0.0))
        faults.reach("job.publishing")
        stored = await asyncio.to_thread(self._artifacts.put, done.out_dir)
        _check_is_of(stored, job)
        # A candidate may never be asked for, and would push out what is.
        if not stored.manifest.gate_failures:
            await self._warm(job, stored)
            faults.reach("job.warmed")
        publish = partial(
            self._models.publish,
            model=job.request.model,
            job_id=job.job_id,
            stored=stored,
            gate=job.request.gate,
        )
        return await asyncio.to_thread(
            self._jobs.succeed,
            job.job_id,
            publish,
            done.finished.validation_accuracy,
            done.finished.validation_count,
        )

    async def _warm(self, job: JobRecord, stored: StoredVersion) -> None:
        try:
            async with asyncio.timeout(self._settings.warm_timeout_s):
                await self._on_published(job.request.model, stored)
        except Exception:
            log.exception("a new version could not be warmed; its first call loads it",
                          extra={"model": job.request.model})  # fmt: skip

    async def _fail(self, job: JobRecord, ended: Ended) -> JobRecord:
        return await self._save(partial(self._jobs.fail, job.job_id, ended.reason, ended.message))

    async def _save(self, save: Callable[[], JobRecord]) -> JobRecord:
        # On a full disk the outcome waits for room; on the way out the next start
        # takes the job up again.
        for tries in itertools.count():
            try:
                return await asyncio.to_thread(save)
            except (Exhausted, Unavailable) as error:
                if error.reason not in PASSING or self._closing.is_set():
                    raise
                log.exception("a job's outcome cannot be saved yet")
            await self._pause(tries)
        raise AssertionError("it counts for ever")

    async def _pause(self, tries: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.pause_s(tries)):
                await self._closing.wait()

    def _worker_ended(self, worker: _Worker, task: asyncio.Task[None]) -> None:
        del self._workers[worker.job.job_id]
        self._free[worker.kind] += 1
        self._woken.set()
        self._note_failure(task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("the supervisor failed", exc_info=error)
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            # Nobody may be waiting any more, when the service stops.
            self._failure.exception()

    def _heard(self, job_id: str, event: JobEvent | None) -> None:
        # From any thread. A queued job, the wish for a cancel, and what an ended job left are
        # something to do.
        change = event.payload if event is not None else None
        if isinstance(change, Published):
            outcome = "candidate" if change.is_candidate else "published"
            self._telemetry.versions_published.labels(outcome).inc()
        state = change.state if isinstance(change, StateChanged) else None
        is_over = state is not None and state.is_final
        if state is not None and is_over:
            self._telemetry.jobs_ended.labels(state.value).inc()
            self._ended.append(job_id)
        if (event is None or is_over or state is JobState.QUEUED) and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nothing runs any more
                self._loop.call_soon_threadsafe(self._woken.set)

    def _sweep_work_dir(self) -> None:
        self._settings.work_dir.mkdir(parents=True, exist_ok=True)
        waiting = self._jobs.waiting()
        for path in self._settings.work_dir.iterdir():
            self._attempts.clear(path.name, keep_checkpoint=path.name in waiting)


def _check_is_of(stored: StoredVersion, job: JobRecord) -> None:
    manifest = stored.manifest
    if (manifest.model, manifest.job_id) != (plain_name(job.request.model), job.job_id):
        raise Damaged(
            Reason.TRAINING_FAILED,
            f"the trainer's result is one of {manifest.job_id} for {manifest.model}, not of this "
            "job",
        )


def _unexpected(job: JobRecord) -> Ended:
    return Ended(
        Reason.INTERNAL,
        f"an unexpected error happened; the service's log holds it under {job.job_id}",
    )
