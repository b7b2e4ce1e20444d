"""One attempt at a job, read top to bottom: prepare, start, follow, publish.

`run` prepares the images and the spec, starts a trainer and follows it to its end; `publish`
makes of what it left a version, or a ranking, and the job's success. Any other outcome is
answered, and saved by the supervisor. A cancelled attempt has stopped its trainer when it ends.
Nothing in here blocks the event loop. `LeaseLost` passes through: nothing more is written then.
"""

import asyncio
import itertools
import logging
import shutil
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from service.contract import (
    BackbonesRanked,
    EpochEnded,
    ExitCode,
    Exported,
    Failed,
    Finished,
    Heartbeat,
    JobSpec,
    Progressed,
    Spec,
)
from service.domain import ModelKey, VersionSource
from service.errors import Exhausted, GraftError, Reason, Unavailable
from service.jobs.claims import Claims, LeaseLost
from service.jobs.default_export import DefaultExport
from service.jobs.launchers import Gpus, Launcher, Trainer, start_held
from service.jobs.records import JobRecord, Payload
from service.jobs.request import DEFAULT_RANKING_S, JobRequest, RankRequest
from service.jobs.settings import Settings, Slot
from service.jobs.specs import CHECKPOINT, Specs, staged
from service.jobs.uninterrupted import in_thread, uninterrupted
from service.ops import failpoints
from service.ops.cgroups import OomWatch
from service.ops.metrics import Metrics
from service.storage import storage_errors
from service.storage.blobs import BlobGone, Blobs
from service.storage.database import Connection
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.storage_errors import PASSING
from service.storage.version_rows import NewVersion, Publication, StoredVersion

_SLACK, _SLACK_S = 1.5, 120.0
"""How far beyond the caller's budget a job may go before it is stopped."""

OnPublished = Callable[[ModelKey, StoredVersion], Awaitable[None]]
"""Warms a version of a model that is about to be published; its failure is logged and passed
over."""
_STEP = 0.01
"""Smaller steps within a stage are not kept, so that a stage has some 100 events."""
_DUE_S = 15.0
"""After so long a smaller step is kept too, so that a long stage shows that it gets on."""

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """The trainer has a result: a ranking, or artifacts in `out_dir`."""

    ranked: BackbonesRanked | None = None
    out_dir: Path = Path()
    sources: list[VersionSource] = field(default_factory=list)
    is_told: bool = False
    """The next two are what a try to publish that failed has done, so that the next need not."""
    stored: StoredVersion | None = None


@dataclass(frozen=True)
class Succeeded:
    """The result is published, and the job has ended with it."""

    job: JobRecord


@dataclass(frozen=True)
class Rejected:
    """There is no result, and trying again will not help."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Crashed:
    """There is no result; trying again may help."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Deferred:
    """The disk is full, or another process holds what the attempt needs; it counts for nothing."""

    reason: Reason
    message: str


Outcome = Succeeded | Rejected | Crashed | Deferred


class Attempts:
    """Makes attempts; keeps what they need and nothing of any one."""

    def __init__(
        self,
        *,
        claims: Claims,
        models: ModelStore,
        datasets: DatasetStore,
        blobs: Blobs,
        launcher: Launcher,
        metrics: Metrics,
        settings: Settings,
        on_published: OnPublished,
        export: DefaultExport | None = None,
    ) -> None:
        self._export = export
        self._claims = claims
        self._models = models
        self._blobs = blobs
        self._launcher = launcher
        self._metrics = metrics
        self._settings = settings
        self._on_published = on_published
        self._specs = Specs(claims, models, datasets, settings)
        self._gpus = Gpus(settings.gpus)

    async def run(self, job: JobRecord, slot: Slot) -> Trained | Outcome:
        """Makes one attempt at a job that was claimed, up to its trainer's end."""
        limit_s = self._limit_s(job.request)
        trainer: Trainer | None = None
        used = ExitStack()
        try:
            async with asyncio.timeout(limit_s) as timeout:
                await self._keep(job, Progressed("preparing", 0.0))
                if self._export is not None and isinstance(job.request, JobRequest):
                    await self._export.wait(job.request)
                spec, sources = await self._prepare(job, slot, used)
                # The trainer plans with all of it, however long reading took.
                timeout.reschedule(asyncio.get_running_loop().time() + limit_s)
                oom = OomWatch()
                folder = self.folder(job.job_id)
                trainer = await start_held(
                    self._launcher, spec, folder, self._settings.stop_grace_s
                )
                failpoints.reach("job.trainer_started")
                return await self._follow(job, spec, sources, trainer, oom)
        except GraftError as error:
            return _of_failure(error.reason, error.message)
        except OSError as error:
            # Not a file system's ETIMEDOUT, which is a TimeoutError, too.
            if isinstance(error, TimeoutError) and timeout.expired():
                return Rejected(Reason.TIME_BUDGET_EXCEEDED, _too_long(job.request, limit_s))
            if (told := storage_errors.of_system(error)) is not None:
                return _of_failure(told.reason, told.message)
            log.exception("no trainer could be started", extra={"job_id": job.job_id})
            return Crashed(
                Reason.TRAINER_CRASHED, f"the trainer could not be started ({error.strerror})"
            )
        finally:
            # Beyond the time limit, so that a result that came in time stays one.
            if trainer is not None:
                await uninterrupted(trainer.stop(self._settings.stop_grace_s))
            await uninterrupted(asyncio.to_thread(used.close))

    async def _prepare(
        self, job: JobRecord, slot: Slot, used: ExitStack
    ) -> tuple[Spec, list[VersionSource]]:
        """Returns what the trainer is to do; its files stay until `used` is closed."""
        shown = ShownProgress(time.monotonic)

        def prepare(stop: threading.Event) -> tuple[Spec, list[VersionSource]]:
            def progress(done: int, total: int) -> None:
                fraction = done / max(total, 1)
                now = shown.next(Progressed("reading", fraction, "images", done, total))
                if stop.is_set() or now is None:
                    return
                # One that cannot be kept is only not shown.
                with suppress(GraftError):
                    self._claims.append(job, now)

            folder = self.folder(job.job_id)
            self.clear(job.job_id, keep_checkpoint=True)
            folder.mkdir(parents=True, exist_ok=True)
            failpoints.reach("job.preparing")
            gpu = "" if slot == "cpu" else used.enter_context(self._gpus.lend())
            spec, sources = self._specs.spec(job, folder, slot, gpu, progress, stop)
            return used.enter_context(staged(spec, self._blobs)), sources

        return await in_thread(prepare)

    async def _follow(
        self,
        job: JobRecord,
        spec: Spec,
        sources: list[VersionSource],
        trainer: Trainer,
        oom: OomWatch,
    ) -> Trained | Outcome:
        timeout_s = self._settings.start_timeout_s
        shown = ShownProgress(asyncio.get_running_loop().time)
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
                case Finished() if isinstance(spec, JobSpec):
                    return Trained(out_dir=Path(spec.out_dir), sources=sources)
                case BackbonesRanked() if not isinstance(spec, JobSpec):
                    return Trained(record)
                case Heartbeat() | Finished() | BackbonesRanked() | Exported():
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
            is_ranking = isinstance(job.request, RankRequest)
            smaller = (
                "name smaller backbones" if is_ranking else "use a smaller backbone or batch_size"
            )
            return Crashed(Reason.OUT_OF_MEMORY, oom.why_killed(smaller))
        how = f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        if code == ExitCode.STOPPED:
            how = "because it was told to by somebody else"
        return Crashed(
            Reason.TRAINER_CRASHED,
            f"the trainer ended {how} and left no result; the service's log holds its last words "
            f"under {job.job_id}",
        )

    async def publish(
        self,
        job: JobRecord,
        trained: Trained,
        pause: Callable[[int], Awaitable[None]],
        is_stopped: Callable[[], bool],
    ) -> Succeeded | Rejected | None:
        """Ends the job with the trainer's result.

        A full disk and a held database are waited for up to `room_timeout_s`, with a
        pause after each try of which it is told the number; None means that it was
        stopped between two tries.
        """
        # What was trained is not thrown away for a disk that is full for a while.
        give_up_s = time.monotonic() + self._settings.room_timeout_s
        tries = 0
        while True:
            try:
                return Succeeded(await self._publish(job, trained))
            except (Exhausted, Unavailable) as error:
                if isinstance(error, BlobGone):
                    trained.stored = None
                if error.reason not in PASSING or time.monotonic() > give_up_s:
                    return Rejected(error.reason, error.message)
                log.exception("a result cannot be published yet", extra={"job_id": job.job_id})
            except GraftError as error:
                return Rejected(error.reason, error.message)
            except LeaseLost:
                raise
            except Exception:
                log.exception("a result could not be published", extra={"job_id": job.job_id})
                return unexpected(job)
            if not is_stopped():
                await pause(tries)
            if is_stopped():
                return None
            tries += 1

    async def _publish(self, job: JobRecord, trained: Trained) -> JobRecord:
        if trained.ranked is not None:
            return await asyncio.to_thread(self._claims.succeed_ranking, job, trained.ranked)
        request = job.request
        assert isinstance(request, JobRequest)
        if not trained.is_told:
            told = Progressed("publishing", 0.0)
            await asyncio.to_thread(self._claims.append, job, told)
            trained.is_told = True
            failpoints.reach("job.publishing")
        if (stored := trained.stored) is None:
            stored = await asyncio.to_thread(self._models.put_result, trained.out_dir)
            # A candidate may never be asked for, and would push out what is.
            if not stored.manifest.gate_failures:
                await self._warm(request.key, stored)
                failpoints.reach("job.warmed")
            trained.stored = stored
        new = NewVersion(
            model=request.key,
            job_id=job.job_id,
            stored=stored,
            sources=trained.sources,
            read_s=job.start_time_s or job.create_time_s,
            gate=request.gate,
            max_stored_bytes=self._settings.max_stored_bytes_of(job.tenant),
        )
        made: list[Publication] = []

        def publish(connection: Connection) -> Publication:
            made.append(self._models.publish(connection, new))
            return made[-1]

        record = await asyncio.to_thread(self._claims.succeed, job, publish)
        manifest = made[-1].manifest
        outcome = "candidate" if manifest.gate_failures else "published"
        calibrated = "yes" if manifest.calibrated else "no"
        self._metrics.versions_published.labels(outcome, calibrated, manifest.gate_verdict).inc()
        return record

    async def _warm(self, model: ModelKey, stored: StoredVersion) -> None:
        try:
            async with asyncio.timeout(self._settings.warm_timeout_s):
                await self._on_published(model, stored)
        except Exception:
            log.exception("a new version could not be warmed; its first call loads it",
                          extra={"model": str(model)})  # fmt: skip

    def folder(self, job_id: str) -> Path:
        """Returns the job's own folder on this machine."""
        return self._settings.work_dir / job_id

    def clear(self, job_id: str, *, keep_checkpoint: bool) -> None:
        """Deletes what an attempt left behind, as far as the disk lets it; blocks.

        A job that waits for another attempt keeps its checkpoint.
        """
        folder = self.folder(job_id)
        if not keep_checkpoint:
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            left = [path for path in folder.iterdir() if path.name != CHECKPOINT]
        except FileNotFoundError:
            return
        except OSError:
            log.exception("what an attempt left cannot be seen", extra={"job_id": job_id})
            return
        for path in left:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            except OSError:
                log.exception("what an attempt left cannot be deleted", extra={"job_id": job_id})

    def _limit_s(self, request: JobRequest | RankRequest) -> float:
        longest_s, budget_s = self._settings.max_job_s, request.time_budget_s
        if isinstance(request, RankRequest):
            budget_s = budget_s or DEFAULT_RANKING_S
        if budget_s is None:
            return longest_s
        return min(longest_s, budget_s * _SLACK + _SLACK_S)

    async def _keep(self, job: JobRecord, payload: Payload) -> None:
        for tries in itertools.count():
            try:
                # To its end, so that no write is under way when the attempt is over.
                await uninterrupted(asyncio.to_thread(self._claims.append, job, payload))
            except (Exhausted, Unavailable) as error:
                # The trainer goes on meanwhile; the job's time limit bounds the wait.
                if error.reason not in PASSING:
                    raise
                log.exception("what a job did cannot be kept yet", extra={"job_id": job.job_id})
            else:
                break
            await asyncio.sleep(self._settings.pause_s(tries))
        failpoints.reach("job.record_kept")

    def _show_epoch(self, job: JobRecord, epoch: EpochEnded) -> None:
        model = self._metrics.model_label(job.label)
        for name, gauge in self._metrics.epoch.items():
            # Without held-out images there are no figures of them.
            if (value := getattr(epoch, name)) is not None:
                gauge.labels(job.job_id, model).set(value)

    def _log_crash(self, job: JobRecord, trainer: Trainer, code: str) -> None:
        words = "\n".join(trainer.last_words())
        log.error("the trainer crashed (%s); its last words:\n%s", code, words,
                  extra={"job_id": job.job_id, "model": job.label})  # fmt: skip


def unexpected(job: JobRecord) -> Rejected:
    """Returns what callers learn of a fault of ours."""
    return Rejected(
        Reason.INTERNAL,
        f"an unexpected error happened; the service's log holds it under {job.job_id}",
    )


def _of_failure(reason: Reason, message: str) -> Rejected | Deferred:
    return (Deferred if reason in PASSING else Rejected)(reason, message)


def _too_long(request: JobRequest | RankRequest, limit_s: float) -> str:
    if isinstance(request, RankRequest):
        return f"the ranking did not end within {limit_s:.4g} s: name fewer backbones"
    return (
        f"the job did not end within {limit_s:.4g} s: allow more time, or train for fewer epochs "
        "or on fewer images"
    )


class ShownProgress:
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
        is_due = moved > 0 and now - self._kept_s >= _DUE_S
        return moved >= _STEP or is_end or is_due
