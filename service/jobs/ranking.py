"""Which backbone to start from: trainers that rank backbones while a call waits.

One at a time, beside the jobs; a bounded number waits for its turn, in order, and of
one tenant fewer where it has a bound. A call that is cancelled, or whose deadline
passes, takes its trainer with it. No trace is kept but archives, unpacked as datasets.
Stops with `close`.
"""

import asyncio
import logging
import secrets
import shutil
import signal
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import msgspec

from service.contract import MOST_RANKED_IMAGES, BackbonesRanked, Failed, RankSpec
from service.errors import (
    KINDS,
    Exhausted,
    Expired,
    OverQuota,
    Reason,
    Unavailable,
)
from service.ingest.reader import IMAGES_FOLDER, INDEX_FILE
from service.jobs import registered
from service.jobs.killed import Deaths
from service.jobs.launcher import Launcher, Trainer, start_held
from service.jobs.request import RankRequest, allowed_path
from service.jobs.settings import Settings, cache_owner
from service.jobs.uninterrupted import in_thread, uninterrupted
from service.jobs.weights import available
from service.ops import failpoints
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore

MAX_WAITING = 8
"""Calls behind the one that is at work; more are refused."""
MAX_WAIT_S = 600.0
"""For its turn: the time budget of the longest ranking."""
_RETRY_AFTER_S = 15.0
_SLACK_S = 60.0
"""Beyond the time budget: a cold disk is slow to give what a trainer imports."""
_DEFAULT_BUDGET_S = 60.0

log = logging.getLogger(__name__)


class Rankings:
    """The rankings of one process."""

    def __init__(
        self, models: ModelStore, datasets: DatasetStore, launcher: Launcher, settings: Settings
    ) -> None:
        self._models = models
        self._datasets = datasets
        self._launcher = launcher
        self._settings = settings
        self._turn = asyncio.Lock()
        self._calls: set[asyncio.Task[BackbonesRanked]] = set()
        self._open: Counter[str] = Counter()
        self._is_closing = False

    def check_room(self, tenant: str, max_open: int | None = None) -> None:
        """Raises an error where no ranking of a tenant can be taken; from any thread.

        OverQuota (rankings) where it has `max_open` that have not ended, Exhausted
        (QUEUE_FULL), or Unavailable (SHUTTING_DOWN).
        """
        if self._is_closing:
            raise _shutting_down()
        if max_open is not None and self._open[tenant] >= max_open:
            raise _over_quota(self._open[tenant], max_open)
        if len(self._calls) > MAX_WAITING:
            raise Exhausted(
                Reason.QUEUE_FULL,
                f"{MAX_WAITING} rankings of backbones wait already: try again later",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def rank(self, request: RankRequest, max_open: int | None = None) -> BackbonesRanked:
        """Ranks the backbones of a request that was checked.

        Raises as `check_room`, GraftError when the data cannot be had or used,
        Exhausted when its turn does not come in time, and Expired when the trainer
        goes on for long after its time budget.
        """
        self.check_room(request.tenant, max_open)
        call = asyncio.create_task(self._in_turn(request), name="ranking")
        self._calls.add(call)
        self._open[request.tenant] += 1
        call.add_done_callback(partial(self._ended, request.tenant))
        try:
            return await call
        except asyncio.CancelledError:
            # Ours is that of `close`, unless the caller's own task was cancelled.
            current = asyncio.current_task()
            if self._is_closing and not (current and current.cancelling()):
                raise _shutting_down() from None
            raise

    async def close(self) -> None:
        """Ends the trainer and refuses those that wait."""
        self._is_closing = True
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls)

    def _ended(self, tenant: str, call: "asyncio.Task[BackbonesRanked]") -> None:
        self._calls.discard(call)
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]

    async def _in_turn(self, request: RankRequest) -> BackbonesRanked:
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await self._turn.acquire()
        except TimeoutError as error:
            raise Exhausted(
                Reason.QUEUE_FULL,
                f"the rankings before this one did not end within {MAX_WAIT_S:.4g} s: try again "
                "later",
                retry_after_s=_RETRY_AFTER_S,
            ) from error
        try:
            folder = self._settings.work_dir / f"ranking-{secrets.token_hex(8)}"
            try:
                return await self._ranked(request, folder)
            finally:
                await uninterrupted(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
        finally:
            self._turn.release()

    async def _ranked(self, request: RankRequest, folder: Path) -> BackbonesRanked:
        # The turn lasts as long as the thread, which reads images.
        spec = await in_thread(partial(self._spec, request, folder))
        limit_s = spec.time_budget_s + _SLACK_S
        trainer: Trainer | None = None
        try:
            async with asyncio.timeout(limit_s):
                deaths = Deaths()
                trainer = await start_held(
                    self._launcher, spec, folder, self._settings.stop_grace_s
                )
                failpoints.reach("ranking.trainer_started")
                return await self._follow(trainer, folder, deaths)
        except TimeoutError as error:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the ranking did not end within {limit_s:.4g} s: name fewer backbones",
            ) from error
        finally:
            if trainer is not None:
                await uninterrupted(trainer.stop(self._settings.stop_grace_s))

    def _spec(self, request: RankRequest, folder: Path, stop: threading.Event) -> RankSpec:
        settings = self._settings
        folder.mkdir(parents=True)
        data, index = self._data(request, folder, stop)
        exported = partial(self._models.exported_backbones, tenant=request.tenant)
        return RankSpec(
            data_dir=data,
            data_index=index,
            backbones=[
                # What the store knows of it spares its export.
                registered.named(settings, asked.backbone, request.tenant)
                or msgspec.structs.replace(asked, exported=exported(asked.backbone))
                for asked in request.backbones
            ]
            or [
                *available(settings.weights_dir, exported),
                *settings.registered_of(request.tenant),
            ],
            work_dir=str(folder),
            only_available=not request.backbones,
            weights_dir=str(settings.weights_dir),
            time_budget_s=request.time_budget_s or _DEFAULT_BUDGET_S,
            seed=request.seed or 0,
            threads=settings.trainer_threads,
            provider=settings.provider,
            precision=settings.precision,
            feature_cache=str(settings.feature_cache or ""),
            feature_cache_bytes=settings.feature_cache_bytes,
            feature_cache_owner=cache_owner(request.tenant),
        )

    def _data(self, request: RankRequest, folder: Path, stop: threading.Event) -> tuple[str, str]:
        """Returns the folder of the images and the file of their index."""
        dataset_id = request.dataset_id
        if not dataset_id:
            settings, tenant = self._settings, request.tenant
            path = allowed_path(request.server_path, settings.allowed_dirs_of(tenant))
            if path.is_dir():
                index = self._datasets.read_folder(
                    path,
                    folder / "data",
                    tenant=tenant,
                    case_sensitive=request.case_sensitive_labels,
                    most=MOST_RANKED_IMAGES,
                    is_abandoned=stop,
                )
                return str(path), str(index)
            dataset_id = self._datasets.import_archive(
                path,
                case_sensitive=request.case_sensitive_labels,
                tenant=tenant,
                max_stored_bytes=settings.max_stored_bytes_of(tenant),
                is_abandoned=stop,
            ).dataset_id
        stored = self._datasets.path(self._datasets.get(dataset_id, request.tenant).dataset_id)
        return str(stored / IMAGES_FOLDER), str(stored / INDEX_FILE)

    async def _follow(self, trainer: Trainer, folder: Path, deaths: Deaths) -> BackbonesRanked:
        while (record := await trainer.next_record()) is not None:
            match record:
                case BackbonesRanked():
                    return record
                case Failed():
                    raise KINDS[record.reason](record.reason, record.message)
        code = await trainer.wait()
        if code == -signal.SIGKILL:
            raise Exhausted(Reason.OUT_OF_MEMORY, deaths.why_killed("name smaller backbones"))
        words = "\n".join(trainer.last_words())
        raise RuntimeError(f"{folder.name} ended with code {code}; its last words:\n{words}")


def _over_quota(count: int, max_open: int) -> OverQuota:
    if max_open == 0:
        return OverQuota(
            "rankings", "you may have no jobs, and rank no backbones either: ask the operator"
        )
    return OverQuota(
        "rankings",
        f"{count} of your rankings wait or run, and {max_open} may at once: wait for one to end",
        retry_after_s=_RETRY_AFTER_S,
    )


def _shutting_down() -> Unavailable:
    return Unavailable(Reason.SHUTTING_DOWN, "the service stops: try again in a moment")
