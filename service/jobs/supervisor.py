"""Runs queued jobs, so many at once, and saves what becomes of each.

Lives on the event loop; the database is reached through threads. Beside the jobs one task renews
this replica's lease and takes up the jobs of replicas that died. A replica that was given up
stops its trainers, writes nothing of their jobs, and goes on under a new id. A job that finds
the disk full, or a database that somebody holds, is deferred: none begins without room. With a
damaged database, which no waiting repairs, all of them stop and stay what they are in it; the
process ends, and the first start on a restored one takes them up. `wait_failed` raises when the
supervisor itself can go no further: the process must end then. Stops with `close`, which puts
unfinished jobs back.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn

from service.domain import JobKind, JobState
from service.errors import Damaged, Exhausted, GraftError, Reason, Unavailable
from service.jobs.attempt import (
    Attempts,
    Crashed,
    Deferred,
    Outcome,
    Rejected,
    Succeeded,
    Trained,
    unexpected,
)
from service.jobs.claims import Claims, LeaseLost
from service.jobs.disk_space import DiskSpace
from service.jobs.records import JobRecord
from service.jobs.replicas import Replicas
from service.jobs.settings import Settings, Slot
from service.jobs.store import JobStore
from service.jobs.uninterrupted import uninterrupted
from service.ops import failpoints
from service.ops.metrics import Metrics
from service.storage.datasets import DatasetStore
from service.storage.storage_errors import PASSING

_DEVICES = ("cpu", "cuda", "auto")

log = logging.getLogger(__name__)

_Why = Literal["", "cancel", "closing", "lost"]


@dataclass(eq=False)
class _Worker:
    job: JobRecord
    slot: Slot
    why_stopped: _Why = ""
    has_begun: bool = False
    task: asyncio.Task[None] | None = None

    def interrupt(self, why: _Why) -> None:
        if not self.why_stopped or why == "lost":
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
        claims: Claims,
        replicas: Replicas,
        attempts: Attempts,
        datasets: DatasetStore,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._claims = claims
        self._replicas = replicas
        self._attempts = attempts
        self._datasets = datasets
        self._metrics = metrics
        self._settings = settings
        self._disk = DiskSpace(settings.work_dir, settings.min_free_bytes)
        self._free = settings.slots
        # Another replica may have what this one lacks.
        self._refused = [
            device
            for device in _DEVICES
            if replicas.is_alone and not self._free[settings.slot_of(device)]
        ]
        self._workers: dict[str, _Worker] = {}
        self._id = ""
        """This replica's; "" before it has registered, and while it is given up."""
        self._woken = asyncio.Event()
        self._claim_at_s = 0.0
        """When queued jobs are looked for next, by the loop's clock."""
        self._closing = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
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
        self._beating = asyncio.create_task(self._beat(), name="lease")
        for task in (self._running, self._beating):
            task.add_done_callback(self._note_failure)

    async def _take_up(self) -> None:
        replica_id = await asyncio.to_thread(self._replicas.register)
        await self._reap()
        self._id = replica_id
        # What a death left of jobs that had ended; `sweep` again and again does the rest.
        with suppress(GraftError):
            await asyncio.to_thread(self.sweep)

    async def _reap(self) -> None:
        for job in await asyncio.to_thread(self._replicas.reap, self._settings.max_crashes):
            log.warning("a job's replica has died; it is %s now", job.state,
                        extra={"job_id": job.job_id})  # fmt: skip
            if job.state.is_final:
                self._metrics.jobs_ended.labels(job.state.value).inc()
                clear = partial(self._attempts.clear, job.job_id, keep_checkpoint=False)
                await asyncio.to_thread(clear)

    def wake(self) -> None:
        """Says that there may be something to do; from the event loop."""
        self._claim_at_s = 0.0
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
        draining = None
        if self._id and self._failure is not None and not self._failure.done():
            # First, since whoever stops the process may kill it before all is saved.
            draining = asyncio.create_task(self._tell_replicas(self._replicas.drain))
        for worker in self._workers.values():
            worker.interrupt("closing")
        # What prepares data in a thread gives up then, too.
        self._datasets.leave_jobs()
        while late := self._at_work(draining):
            left_s = until_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            await asyncio.wait(late, timeout=left_s)
        if late:
            log.error("%d steps did not end in time; the jobs are put back later", len(late))
            for task in late:
                task.cancel()
        # Until now, since a drain may take longer than a lease.
        if self._beating is not None:
            self._beating.cancel()
        if self._id and not late:
            await self._tell_replicas(self._replicas.leave)
            self._id = ""
            with suppress(GraftError):
                await asyncio.to_thread(self.sweep)

    async def _tell_replicas(self, tell: Callable[[str], None]) -> None:
        try:
            await asyncio.to_thread(tell, self._id)
        except GraftError:
            log.exception("the other replicas cannot be told of the stop")

    def _at_work(self, draining: "asyncio.Task[None] | None") -> list[asyncio.Task[None]]:
        tasks = [draining, self._running, *(worker.task for worker in self._workers.values())]
        return [task for task in tasks if task is not None and not task.done()]

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.beat_s)
            if not self._id:
                continue
            try:
                if not await asyncio.to_thread(self._replicas.beat, self._id):
                    await self._given_up()
                await self._reap()
            except GraftError as error:
                # Whoever looks for jobs says what is damaged.
                if error.reason not in (*PASSING, Reason.STORAGE_DAMAGED):
                    raise
                log.exception("the lease cannot be renewed")

    async def _given_up(self) -> None:
        log.error("this replica was taken for dead, and its jobs were given to others")
        self._id = ""
        tasks = [worker.task for worker in self._workers.values() if worker.task is not None]
        for worker in self._workers.values():
            worker.interrupt("lost")
        # The same jobs may come back to this machine, and to the same folders.
        if tasks:
            await asyncio.wait(tasks)
        self.wake()

    async def _run(self) -> None:
        tries = 0
        while not self._closing.is_set():
            self._woken.clear()
            try:
                await self._look()
                wait_s, tries = self._claim_at_s - self._now_s(), 0
            except (Exhausted, Unavailable) as error:
                # The disk is full, or somebody holds the database: models are still served, and
                # jobs can wait.
                if error.reason not in PASSING:
                    raise
                log.exception("no job can be started")
                self._claim_at_s = 0.0
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

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def _look(self) -> None:
        """Does what there is to do, and notes when there may be more without a wake."""
        if not self._id:
            if self._workers:
                self._claim_at_s = self._now_s() + self._settings.beat_s
                return  # the last of them wakes
            await self._take_up()
        for job_id in await asyncio.to_thread(self._claims.to_cancel, self._id):
            if (worker := self._workers.get(job_id)) is not None:
                failpoints.reach("job.cancelling")
                worker.interrupt("cancel")
        if self._now_s() < self._claim_at_s:
            return
        # Before the claims, or what is due in between would be overlooked; a wake that comes
        # during the look brings it forward again, and that is kept.
        self._claim_at_s = self._now_s() + self._settings.beat_s
        if (due_s := await asyncio.to_thread(self._claims.due_s)) is not None:
            self._claim_at_s = min(self._claim_at_s, self._now_s() + due_s)
        while (job := await self._claim(JobKind.FINE_TUNE, self._refused)) is not None:
            assert job.request.device
            problem = self._settings.device_problem(job.request.device)
            await self._save(partial(self._claims.fail, job, Reason.DEVICE_UNAVAILABLE, problem))
            self._metrics.jobs_ended.labels(JobState.FAILED.value).inc()
        while any(self._free.values()) and not self._closing.is_set():
            if not await asyncio.to_thread(self._disk.has_room):
                self._claim_at_s = self._now_s() + self._settings.retry_s
                return
            job = await self._claim(JobKind.RANKING, ["auto"] if self._free["ranking"] else [])
            job = job or await self._claim(
                JobKind.FINE_TUNE, [d for d in _DEVICES if self._free[self._settings.slot_of(d)]]
            )
            if job is None:
                break
            self._begin(job)

    async def _claim(self, kind: JobKind, devices: list[str]) -> JobRecord | None:
        if self._closing.is_set() or not devices or not self._id:
            return None
        return await asyncio.to_thread(self._claims.claim, self._id, kind, devices)

    def _begin(self, job: JobRecord) -> None:
        failpoints.reach("job.claimed")
        is_ranking = job.kind is JobKind.RANKING
        slot = "ranking" if is_ranking else self._settings.slot_of(job.request.device)
        worker = _Worker(job, slot)
        if self._closing.is_set():
            worker.interrupt("closing")
        elif job.owner != self._id:
            worker.interrupt("lost")
        self._free[worker.slot] -= 1
        self._workers[job.job_id] = worker
        worker.task = asyncio.create_task(self._work(worker), name=job.job_id)
        worker.task.add_done_callback(partial(self._worker_ended, worker))
        log.info("job started", extra={"job_id": job.job_id, "model": job.label})

    async def _work(self, worker: _Worker) -> None:
        outcome: Trained | Outcome | None = None
        worker.has_begun = True
        try:
            if not worker.why_stopped:
                outcome = await self._attempts.run(worker.job, worker.slot)
        except asyncio.CancelledError:
            if not worker.why_stopped:
                raise
        except LeaseLost:
            worker.why_stopped = "lost"
        except Exception:
            log.exception("a job failed unexpectedly", extra={"job_id": worker.job.job_id})
            outcome = unexpected(worker.job)
        finally:
            # Before its end is told, so that what hears of it finds no series of it.
            self._metrics.forget_job(worker.job.job_id, worker.job.label)
        # From here on a cancel comes too late: what happened is saved as it happened.
        await uninterrupted(self._settle(worker, outcome))

    async def _settle(self, worker: _Worker, outcome: Trained | Outcome | None) -> None:
        try:
            if worker.why_stopped == "lost":
                raise LeaseLost(worker.job)
            await self._save_what_became(worker, outcome)
        except LeaseLost:
            # Its folder stays, too: another attempt may have it by now.
            log.warning("a job was given to another replica", extra={"job_id": worker.job.job_id})
        except Damaged as error:
            if error.reason is not Reason.STORAGE_DAMAGED:
                raise
            # Its files stay, too, for the attempt after the database was restored.
            log.exception("what became of a job cannot be saved in a damaged database; the next "
                          "start takes it up", extra={"job_id": worker.job.job_id})  # fmt: skip

    async def _save_what_became(self, worker: _Worker, trained: Trained | Outcome | None) -> None:
        job, outcome = worker.job, trained
        if isinstance(outcome, Trained):
            outcome = await self._attempts.publish(
                job, outcome, self._pause, lambda: worker.why_stopped != ""
            )
        if isinstance(outcome, Succeeded):
            record = outcome.job
        else:
            # Before it is put back: another attempt may begin at once.
            clear = partial(self._attempts.clear, job.job_id, keep_checkpoint=True)
            await asyncio.to_thread(clear)
            record = await self._save_end(worker, outcome)
        failpoints.reach("job.settled")
        log.info("job is %s", record.state,
                 extra={"job_id": job.job_id, "reason": record.error_reason or ""})  # fmt: skip
        if record.state.is_final:
            self._metrics.jobs_ended.labels(record.state.value).inc()
            if record.start_time_s and record.end_time_s:
                took_s = max(0.0, record.end_time_s - record.start_time_s)
                self._metrics.job_seconds.labels(record.method).observe(took_s)
            await asyncio.to_thread(self._attempts.clear, job.job_id, keep_checkpoint=False)

    async def _save_end(self, worker: _Worker, outcome: Trained | Outcome | None) -> JobRecord:
        job, claims, settings = worker.job, self._claims, self._settings
        match outcome:
            case Rejected(reason, message):
                return await self._save(partial(claims.fail, job, reason, message))
            case Crashed(reason, message):
                most = settings.max_crashes
                return await self._save(partial(claims.crash, job, reason, message, most))
            case Deferred(reason, message):
                delay_s, give_up_s = settings.deferred_s, settings.room_timeout_s
                return await self._save(
                    partial(claims.defer, job, reason, message, delay_s, give_up_s)
                )
            case _ if worker.why_stopped == "cancel":
                return await self._save(partial(claims.cancelled, job))
            case _:
                message = "the service stops; the job starts again with it"
                return await self._save(partial(claims.requeue, job, message))

    async def _save(self, save: Callable[[], JobRecord]) -> JobRecord:
        # On a full disk the outcome waits for room; on the way out the job is left to whoever
        # reaps it.
        tries = 0
        while True:
            try:
                return await asyncio.to_thread(save)
            except (Exhausted, Unavailable) as error:
                if error.reason not in PASSING or self._closing.is_set():
                    raise
                log.exception("a job's outcome cannot be saved yet")
            await self._pause(tries)
            tries += 1

    async def _pause(self, tries: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.pause_s(tries)):
                await self._closing.wait()

    def _worker_ended(self, worker: _Worker, task: asyncio.Task[None]) -> None:
        del self._workers[worker.job.job_id]
        self._free[worker.slot] += 1
        self.wake()
        self._note_failure(task)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self._closing.is_set() and getattr(error, "reason", None) in PASSING:
            log.error("what became of a job could not be saved; it is taken up later",
                      exc_info=error)  # fmt: skip
            return
        log.error("the supervisor failed", exc_info=error)
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
            # Nobody may be waiting any more, when the service stops.
            self._failure.exception()

    def _heard(self, job_id: str) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nothing runs any more
                self._loop.call_soon_threadsafe(self._notice, job_id)

    def _notice(self, job_id: str) -> None:
        # Of a job at work here it may be the wish for a cancel; its end wakes by itself.
        if job_id not in self._workers:
            self._claim_at_s = 0.0
        self._woken.set()

    def sweep(self) -> None:
        """Deletes the folders of jobs that have ended or are gone; from any thread but the loop's.

        A folder is listed before its job is looked at, and made after its job was claimed.
        """
        try:
            names = [path.name for path in self._settings.work_dir.iterdir()]
        except FileNotFoundError:
            return
        except OSError:
            log.exception("what jobs left behind cannot be listed")
            return
        for name in {*names} - self._jobs.open_ones(names):
            shutil.rmtree(self._settings.work_dir / name, ignore_errors=True)
