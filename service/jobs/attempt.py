"""One attempt at a job: the data is prepared, a trainer started and followed to its end.

Answers with what came of it and saves no outcome; that is the supervisor's. A
cancelled attempt has stopped its trainer when it ends. Nothing in here blocks
the event loop.
"""

import asyncio
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from service.contract import (
    BackbonesRanked,
    EpochEnded,
    ExitCode,
    Failed,
    Finished,
    Heartbeat,
    JobSpec,
    Progressed,
)
from service.errors import Exhausted, GraftError, Reason, Unavailable
from service.jobs.events import Payload
from service.jobs.launcher import Launcher, Trainer, start_held
from service.jobs.preparation import Preparation
from service.jobs.settings import Kind, Settings
from service.jobs.store import JobRecord, JobStore
from service.jobs.uninterrupted import in_thread, uninterrupted
from service.ops import failpoints
from service.ops.cgroups import OomWatch
from service.ops.metrics import Metrics
from service.storage import disk_errors
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore

_SLACK, _SLACK_S = 1.5, 120.0
"""How far beyond the caller's budget a job may go before it is stopped."""
_PROGRESS_STEP = 0.01
"""Smaller steps within a stage are not kept, so that a stage has some 100 events."""
_PROGRESS_S = 15.0
"""After so long a smaller step is kept too, so that a long stage shows that it gets on."""


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """The trainer left a result in `out_dir`."""

    finished: Finished
    out_dir: Path


@dataclass(frozen=True)
class Ended:
    """There is no result, and trying again will not help."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Crashed:
    """There is no result; trying again may help."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Postponed:
    """The disk is full, or another process holds what the attempt needs; it counts for nothing."""

    reason: Reason
    message: str


Outcome = Done | Ended | Crashed | Postponed


class Attempts:
    """Makes attempts; holds what they need and nothing of any one."""

    def __init__(
        self,
        *,
        jobs: JobStore,
        models: ModelStore,
        datasets: DatasetStore,
        launcher: Launcher,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self._jobs = jobs
        self._preparation = Preparation(jobs, models, datasets, settings)
        self._launcher = launcher
        self._metrics = metrics
        self._settings = settings

    async def run(self, job: JobRecord, kind: Kind) -> Outcome:
        """Makes one attempt at a job that was claimed."""
        limit_s = self._limit_s(job)
        trainer: Trainer | None = None
        try:
            async with asyncio.timeout(limit_s) as timeout:
                await self._keep(job, Progressed("preparing", 0.0))
                spec = await self._prepared(job, kind)
                # The trainer plans with all of it, however long reading took.
                timeout.reschedule(asyncio.get_running_loop().time() + limit_s)
                oom = OomWatch()
                trainer = await start_held(
                    self._launcher,
                    spec,
                    self._preparation.folder(spec.job_id),
                    self._settings.stop_grace_s,
                )
                failpoints.reach("job.trainer_started")
                return await self._follow(job, spec, trainer, oom)
        except GraftError as error:
            return _of_failure(error.reason, error.message)
        except OSError as error:
            # Not a file system's ETIMEDOUT, which is a TimeoutError, too.
            if isinstance(error, TimeoutError) and timeout.expired():
                return Ended(
                    Reason.TIME_BUDGET_EXCEEDED,
                    f"the job did not end within {limit_s:.4g} s: allow more time, or train for "
                    "fewer epochs or on fewer images",
                )
            if (told := disk_errors.of_system(error)) is not None:
                return _of_failure(told.reason, told.message)
            log.exception("no trainer could be started", extra={"job_id": job.job_id})
            return Crashed(
                Reason.TRAINER_CRASHED, f"the trainer could not be started ({error.strerror})"
            )
        finally:
            # Beyond the time limit, so that a result that came in time stays one.
            if trainer is not None:
                await uninterrupted(trainer.stop(self._settings.stop_grace_s))

    async def _prepared(self, job: JobRecord, kind: Kind) -> JobSpec:
        shown = _Shown(time.monotonic)

        def prepare(stop: threading.Event) -> JobSpec:
            def progress(done: int, total: int) -> None:
                fraction = done / max(total, 1)
                now = shown.next(Progressed("reading", fraction, "images", done, total))
                if stop.is_set() or now is None:
                    return
                # One that cannot be kept is only not shown.
                with suppress(GraftError):
                    self._jobs.append_event(job.job_id, now)

            return self._preparation.spec(job, kind, progress, stop)

        return await in_thread(prepare)

    def clear(self, job_id: str, *, keep_checkpoint: bool) -> None:
        """See `Preparation`."""
        self._preparation.clear(job_id, keep_checkpoint=keep_checkpoint)

    def _limit_s(self, job: JobRecord) -> float:
        budget_s = job.request.time_budget_s
        if budget_s is None:
            return self._settings.max_job_s
        return min(self._settings.max_job_s, budget_s * _SLACK + _SLACK_S)

    async def _follow(
        self, job: JobRecord, spec: JobSpec, trainer: Trainer, oom: OomWatch
    ) -> Outcome:
        timeout_s = self._settings.start_timeout_s
        shown = _Shown(asyncio.get_running_loop().time)
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    record = await trainer.next_record()
            except TimeoutError:
                self._log_crash(job, trainer, "silent")
                return Crashed(
                    Reason.TRAINER_CRASHED,
                    f"the trainer said nothing for {timeout_s:.4g} s, as one that hangs",
                )
            timeout_s = self._settings.heartbeat_timeout_s
            match record:
                case None:
                    return await self._of_exit(job, trainer, oom)
                case Failed():
                    return _of_failure(record.reason, record.message)
                case Finished():
                    return Done(record, Path(spec.out_dir))
                case Heartbeat() | BackbonesRanked():  # the latter is no job's
                    continue
                case Progressed():
                    if (step := shown.next(record)) is not None:
                        await self._keep(job, step)
                case EpochEnded():
                    self._show_epoch(job, record)
                    await self._keep(job, record)
                case _:
                    await self._keep(job, record)

    async def _of_exit(self, job: JobRecord, trainer: Trainer, oom: OomWatch) -> Outcome:
        timeout_s = self._settings.heartbeat_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                code = await trainer.wait()
        except TimeoutError:
            return Crashed(
                Reason.TRAINER_CRASHED,
                f"the trainer said its last and did not end for {timeout_s:.4g} s",
            )
        self._log_crash(job, trainer, str(code))
        if code == -signal.SIGKILL:
            message = oom.why_killed("use a smaller backbone or batch_size")
            return Crashed(Reason.OUT_OF_MEMORY, message)
        how = f"with code {code}" if code >= 0 else f"by {_signal_name(-code)}"
        if code == ExitCode.STOPPED:
            how = "because it was told to by somebody else"
        return Crashed(
            Reason.TRAINER_CRASHED,
            f"the trainer ended {how} and left no result; the service's log holds its last words "
            f"under {job.job_id}",
        )

    async def _keep(self, job: JobRecord, payload: Payload) -> None:
        append = partial(self._jobs.append_event, job.job_id, payload)
        for tries in itertools.count():
            try:
                # To its end, or a late event would fall into the job's next attempt.
                await uninterrupted(asyncio.to_thread(append))
            except (Exhausted, Unavailable) as error:
                # The trainer goes on meanwhile; the job's time limit bounds the wait.
                if error.reason not in disk_errors.PASSING:
                    raise
                log.exception("what a job did cannot be kept yet", extra={"job_id": job.job_id})
            else:
                break
            await asyncio.sleep(self._settings.pause_s(tries))
        failpoints.reach("job.record_kept")

    def _show_epoch(self, job: JobRecord, epoch: EpochEnded) -> None:
        model = self._metrics.model_label(job.request.model)
        for name, gauge in self._metrics.epoch.items():
            # Without held-out images there are no figures of them.
            if (value := getattr(epoch, name)) is not None:
                gauge.labels(job.job_id, model).set(value)

    def _log_crash(self, job: JobRecord, trainer: Trainer, code: str) -> None:
        words = "\n".join(trainer.last_words())
        log.error("the trainer crashed (%s); its last words:\n%s", code, words,
                  extra={"job_id": job.job_id, "model": job.request.model})  # fmt: skip


def unexpected(job: JobRecord) -> Ended:
    """What callers are told of a fault of ours."""
    return Ended(
        Reason.INTERNAL,
        f"an unexpected error happened; the service's log holds it under {job.job_id}",
    )


def _of_failure(reason: Reason, message: str) -> Ended | Postponed:
    return (Postponed if reason in disk_errors.PASSING else Ended)(reason, message)


class _Shown:
    """Decides which progress is kept, and says how long its stage has taken."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = self._kept_s = clock()
        self._kept: Progressed | None = None

    def next(self, record: Progressed) -> Progressed | None:
        """Returns the record with its stage's time; None for a step that is too small to keep."""
        now, kept = self._clock(), self._kept
        # A stage may have parts (the training images, the validation images), each from 0 anew.
        if kept is None or kept.stage != record.stage or record.fraction < kept.fraction:
            self._began_s = now
        elif not self._is_step(kept, record, now):
            return None
        self._kept, self._kept_s = record, now
        return msgspec.structs.replace(record, elapsed_s=now - self._began_s)

    def _is_step(self, kept: Progressed, record: Progressed, now: float) -> bool:
        moved = abs(record.fraction - kept.fraction)
        is_end = record.fraction >= 1 > kept.fraction
        is_due = moved > 0 and now - self._kept_s >= _PROGRESS_S
        return moved >= _PROGRESS_STEP or is_end or is_due


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
