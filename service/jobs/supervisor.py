"""Runs queued jobs, so many at once, and saves what becomes of each.

Lives on the event loop; the database is reached through threads. A job that finds
the disk full, or held what it needs, waits: none begins without room. With a damaged
database, which no waiting mends, all of them stop, stay what they are in it, and the
process lives on; the next start takes them up. `wait_failed`
raises when the supervisor itself can go no further: the process must end then, and
its next start takes the jobs up again. Stops with `close`, which puts unfinished jobs
back into the queue.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn

from service.domain import JobState
from service.errors import Damaged, Exhausted, Reason, Unavailable
from service.jobs.attempt import Attempts, Crashed, Done, Ended, Outcome, Postponed, unexpected
from service.jobs.clean_stop import CleanStop
from service.jobs.events import JobEvent, Published, StateChanged
from service.jobs.launcher import Launcher
from service.jobs.patience import Patience
from service.jobs.publishing import OnPublished, Publishing
from service.jobs.room import Room
from service.jobs.settings import Kind, Settings
from service.jobs.store import JobRecord, JobStore
from service.jobs.uninterrupted import uninterrupted
from service.ops import failpoints
from service.ops.metrics import Metrics
from service.storage import durable
from service.storage.artifacts import Artifacts
from service.storage.datasets import DatasetStore
from service.storage.disk_errors import PASSING
from service.storage.models import ModelStore

__all__ = ["Settings", "Supervisor"]

_LOOK_AGAIN_S = 30.0
"""Also without a wake, so that a lost one costs time alone."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Worker:
    job: JobRecord
    kind: Kind
    why_stopped: Literal["", "cancel", "closing"] = ""
    has_begun: bool = False
    task: asyncio.Task[None] | None = None

    def interrupt(self, why: Literal["cancel", "closing"]) -> None:
        if not self.why_stopped:
            self.why_stopped = why
            # One that has not begun would never save what became of its job.
            if self.task is not None and self.has_begun:
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
        metrics: Metrics,
        settings: Settings,
        on_published: OnPublished,
    ) -> None:
        self._jobs = jobs
        self._datasets = datasets
        self._metrics = metrics
        self._settings = settings
        self._patience = Patience(settings)
        self._room = Room(settings.work_dir, settings.min_free_bytes)
        self._clean_stop = CleanStop(settings.work_dir.parent)
        self._publishing = Publishing(
            jobs=jobs,
            models=models,
            artifacts=artifacts,
            settings=settings,
            on_published=on_published,
        )
        self._attempts = Attempts(
            jobs=jobs,
            models=models,
            datasets=datasets,
            launcher=launcher,
            metrics=metrics,
            settings=settings,
        )
        self._free = settings.slots
        devices = ("cpu", "cuda", "auto")
        self._kind_of = {device: settings.kind_of(device) for device in devices}
        self._refused = [d for d, kind in self._kind_of.items() if not self._free[kind]]
        self._workers: dict[str, _Worker] = {}
        self._ended: deque[str] = deque()
        self._left: list[str] = []
        """Names in the work folder that an earlier process left."""
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
        self._left = await asyncio.to_thread(self._list_work_dir)
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
        was_told = await asyncio.to_thread(self._clean_stop.is_after_one)
        requeue = partial(self._jobs.requeue_running, self._settings.max_crashes, was_told=was_told)
        for job in await asyncio.to_thread(requeue):
            log.warning("a job was under way when the service ended; it is %s now", job.state,
                        extra={"job_id": job.job_id})  # fmt: skip
        failpoints.reach("job.requeued")
        await asyncio.to_thread(self._sweep_work_dir)
        await asyncio.to_thread(self._clean_stop.begin)
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
        until_s = asyncio.get_running_loop().time() + grace_s
        self._closing.set()
        self._woken.set()
        if self._has_taken_up and self._failure is not None and not self._failure.done():
            # First, since whoever stops the process may kill it before all is saved.
            self._clean_stop.end()
        for worker in self._workers.values():
            worker.interrupt("closing")
        # What prepares data in a thread gives up then, too.
        self._datasets.leave_jobs()
        while late := self._at_work():
            left_s = until_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            await asyncio.wait(late, timeout=left_s)
        if late:
            log.error("%d steps did not end in time; the next start puts jobs back", len(late))
            for task in late:
                task.cancel()
        await self._clear_ended()

    def _at_work(self) -> list[asyncio.Task[None]]:
        tasks = [self._running, *(worker.task for worker in self._workers.values())]
        return [task for task in tasks if task is not None and not task.done()]

    async def _run(self) -> None:
        tries = 0
        while not self._closing.is_set():
            self._woken.clear()
            try:
                wait_s, tries = await self._look(), 0
            except (Exhausted, Unavailable) as error:
                # The disk is full, or the database held: models are still served, and jobs
                # can wait.
                if error.reason not in PASSING:
                    raise
                log.exception("no job can be started")
                wait_s, tries = self._settings.pause_s(tries), tries + 1
            except Damaged as error:
                if error.reason is not Reason.STORAGE_DAMAGED:
                    raise
                self._give_up()
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()

    def _give_up(self) -> None:
        log.error("jobs are stopped, and none is started, before the database is restored")
        # Nothing of what they go on to do could be kept.
        for worker in self._workers.values():
            worker.interrupt("closing")

    async def _look(self) -> float:
        """Does what there is to do; answers how long until there may be more without a wake."""
        if not self._has_taken_up:
            await self._take_up()
        await self._clear_ended()
        for job_id in await asyncio.to_thread(self._jobs.to_cancel):
            if (worker := self._workers.get(job_id)) is not None:
                failpoints.reach("job.cancelling")
                worker.interrupt("cancel")
        while self._refused and (job := await self._claim(self._refused)) is not None:
            await self._save(
                partial(
                    self._jobs.fail,
                    job.job_id,
                    Reason.DEVICE_UNAVAILABLE,
                    self._settings.device_problem(job.request.device),
                )
            )
        while devices := [d for d, kind in self._kind_of.items() if self._free[kind]]:
            if not await asyncio.to_thread(self._room.is_there):
                return self._settings.retry_s
            if (job := await self._claim(devices, self._patience.let_be())) is None:
                break
            self._begin(job)
        return min(_LOOK_AGAIN_S, self._patience.next_s())

    async def _clear_ended(self) -> None:
        # One that was cancelled in the queue may have kept the checkpoint of an attempt.
        for _ in range(len(self._ended)):
            job_id = self._ended.popleft()
            if job_id in self._workers:
                # Whose attempt perhaps put it back a moment before, and still clears up. Its end
                # wakes.
                self._ended.append(job_id)
                continue
            self._patience.forget(job_id)
            await asyncio.to_thread(self._attempts.clear, job_id, keep_checkpoint=False)

    async def _claim(self, devices: list[str], passed_over: Sequence[str] = ()) -> JobRecord | None:
        if self._closing.is_set():
            return None
        return await asyncio.to_thread(self._jobs.claim, devices, passed_over)

    def _begin(self, job: JobRecord) -> None:
        failpoints.reach("job.claimed")
        worker = _Worker(job, self._kind_of[job.request.device])
        if self._closing.is_set():
            worker.interrupt("closing")
        self._free[worker.kind] -= 1
        self._workers[job.job_id] = worker
        worker.task = asyncio.create_task(self._work(worker), name=job.job_id)
        worker.task.add_done_callback(partial(self._worker_ended, worker))
        log.info("job started", extra={"job_id": job.job_id, "model": job.request.model})

    async def _work(self, worker: _Worker) -> None:
        outcome: Outcome | None = None
        worker.has_begun = True
        try:
            if not worker.why_stopped:
                outcome = await self._attempts.run(worker.job, worker.kind)
        except asyncio.CancelledError:
            if not worker.why_stopped:
                raise
        except Exception:
            log.exception("a job failed unexpectedly", extra={"job_id": worker.job.job_id})
            outcome = unexpected(worker.job)
        finally:
            # Before its end is told, so that what hears of it finds no series of it.
            self._metrics.forget_job(worker.job.job_id, worker.job.request.model)
        # From here on a cancel comes too late: what happened is saved as it happened.
        await uninterrupted(self._settle(worker, outcome))

    async def _settle(self, worker: _Worker, outcome: Outcome | None) -> None:
        try:
            await self._save_what_became(worker, outcome)
        except Damaged as error:
            if error.reason is not Reason.STORAGE_DAMAGED:
                raise
            # Its files stay, too, for the attempt after the database was restored.
            log.exception("what became of a job cannot be saved in a damaged database; the next "
                          "start takes it up", extra={"job_id": worker.job.job_id})  # fmt: skip

    async def _save_what_became(self, worker: _Worker, outcome: Outcome | None) -> None:
        job = worker.job
        result: JobRecord | Outcome | None = outcome
        if isinstance(outcome, Done):
            result = await self._publishing.publish(
                job, outcome, self._pause, lambda: worker.why_stopped != ""
            )
        if isinstance(result, Postponed) and self._patience.is_over(job.job_id):
            result = Ended(result.reason, result.message)
        record = result if isinstance(result, JobRecord) else await self._save_end(worker, result)
        failpoints.reach("job.settled")
        log.info("job is %s", record.state,
                 extra={"job_id": job.job_id, "reason": record.error_reason or ""})  # fmt: skip
        if record.state.is_final and record.start_time_s and record.end_time_s:
            method = str(job.request.method.__struct_config__.tag)
            took_s = max(0.0, record.end_time_s - record.start_time_s)
            self._metrics.job_seconds.labels(method).observe(took_s)
        await asyncio.to_thread(
            self._attempts.clear, job.job_id, keep_checkpoint=not record.state.is_final
        )
        if isinstance(result, Postponed):
            self._patience.postpone(job.job_id)

    async def _save_end(self, worker: _Worker, outcome: Outcome | None) -> JobRecord:
        job_id, jobs = worker.job.job_id, self._jobs
        match outcome:
            case Ended(reason, message):
                return await self._save(partial(jobs.fail, job_id, reason, message))
            case Crashed(reason, message):
                most = self._settings.max_crashes
                return await self._save(partial(jobs.requeue, job_id, message, reason, most))
            case Postponed():
                message = f"{outcome.message}; the job starts again"
                return await self._save(partial(jobs.requeue, job_id, message))
            case _ if worker.why_stopped == "cancel":
                return await self._save(partial(jobs.cancelled, job_id))
            case _:
                message = "the service stops; the job starts again with it"
                return await self._save(partial(jobs.requeue, job_id, message))

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
        if self._closing.is_set() and getattr(error, "reason", None) in PASSING:
            log.error("what became of a job could not be saved; the next start takes it up",
                      exc_info=error)  # fmt: skip
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
            calibrated = "yes" if change.calibrated else "no"
            self._metrics.versions_published.labels(outcome, calibrated, change.gate).inc()
        state = change.state if isinstance(change, StateChanged) else None
        is_over = state is not None and state.is_final
        if state is not None and is_over:
            self._metrics.jobs_ended.labels(state.value).inc()
            self._ended.append(job_id)
        if (event is None or is_over or state is JobState.QUEUED) and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nothing runs any more
                self._loop.call_soon_threadsafe(self._woken.set)

    def _list_work_dir(self) -> list[str]:
        # Before calls are served: a sweep that a full disk delays must spare what they make.
        try:
            return [path.name for path in self._settings.work_dir.iterdir()]
        except FileNotFoundError:
            return []
        except OSError:
            log.exception("what jobs left behind cannot be listed")
            return []

    def _sweep_work_dir(self) -> None:
        with durable.full_disk_told():
            self._settings.work_dir.mkdir(parents=True, exist_ok=True)
        waiting = self._jobs.waiting()
        for name in self._left:
            self._attempts.clear(name, keep_checkpoint=name in waiting)
