"""Ranks backbones to start from: trainers that work while a call waits.

One ranks at a time, beside the jobs; a bounded number of calls waits, and tenants take
turns. Where there are several, each has half of the places, or fewer by its quota. A call
that is cancelled, or whose deadline passes, takes its trainer with it. Nothing is kept but
the datasets that archives were unpacked to. Stops with `close`.
"""

import asyncio
import logging
import secrets
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
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
from service.jobs.launcher import Launcher, Trainer, start_held
from service.jobs.request import RankRequest, allowed_path
from service.jobs.settings import Settings, cache_owner
from service.jobs.turns import Turns
from service.jobs.uninterrupted import in_thread, uninterrupted
from service.jobs.weights import available
from service.ops import failpoints
from service.ops.cgroups import OomWatch
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore

MAX_WAITING = 8
"""Limit on calls behind the one that is at work; more are refused."""
_SHARE = (1 + MAX_WAITING + 1) // 2
"""One tenant's limit on calls at work and behind, where there are several tenants."""
MAX_WAIT_S = 600.0
"""Longest wait for a turn: the time budget of the longest ranking."""
_RETRY_AFTER_S = 15.0
_SLACK_S = 60.0
"""Beyond the time budget: a cold disk is slow to give what a trainer imports."""
_DEFAULT_BUDGET_S = 60.0

log = logging.getLogger(__name__)


class Rankings:
    """The rankings of one process."""

    def __init__(
        self,
        models: ModelStore,
        datasets: DatasetStore,
        launcher: Launcher,
        settings: Settings,
        is_shared: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_shared` says whether there are several tenants."""
        self._models = models
        self._datasets = datasets
        self._launcher = launcher
        self._settings = settings
        self._is_shared = is_shared
        self._turns = Turns()
        self._calls: set[asyncio.Task[BackbonesRanked]] = set()
        self._open: Counter[str] = Counter()
        self._is_closing = False

    def check_room(self, tenant: str, max_open: int | None = None) -> None:
        """Raises an error where no ranking of a tenant can be taken; from any thread.

        OverQuota (rankings) where it has `max_open` that have not ended, Exhausted
        (QUEUE_FULL) where all places are taken or its share of them, or Unavailable
        (SHUTTING_DOWN).
        """
        if self._is_closing:
            raise _shutting_down()
        if max_open is not None and self._open[tenant] >= max_open:
            raise _over_quota(self._open[tenant], max_open)
        if len(self._calls) > MAX_WAITING:
            full = f"{MAX_WAITING} rankings of backbones wait already"
        elif self._is_shared() and self._open[tenant] >= _SHARE:
            full = f"{_SHARE} of your rankings wait or run, the most of one tenant"
        else:
            return
        raise Exhausted(Reason.QUEUE_FULL, f"{full}: try again later", retry_after_s=_RETRY_AFTER_S)

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
                await self._turns.take(request.tenant)
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
                with ExitStack() as used:
                    return await self._ranked(request, folder, used)
            finally:
                await uninterrupted(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))
        finally:
            self._turns.give_back()

    async def _ranked(self, request: RankRequest, folder: Path, used: ExitStack) -> BackbonesRanked:
        # The turn lasts as long as the thread, which reads images.
        spec = await in_thread(partial(self._spec, request, folder, used))
        limit_s = spec.time_budget_s + _SLACK_S
        trainer: Trainer | None = None
        try:
            async with asyncio.timeout(limit_s) as limit:
                oom = OomWatch()
                trainer = await start_held(
                    self._launcher, spec, folder, self._settings.stop_grace_s
                )
                failpoints.reach("ranking.trainer_started")
                return await self._follow(trainer, folder, oom)
        except TimeoutError as error:
            # A file system's ETIMEDOUT is one, too.
            if not limit.expired():
                raise
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the ranking did not end within {limit_s:.4g} s: name fewer backbones",
            ) from error
        finally:
            if trainer is not None:
                await uninterrupted(trainer.stop(self._settings.stop_grace_s))

    def _spec(
        self, request: RankRequest, folder: Path, used: ExitStack, stop: threading.Event
    ) -> RankSpec:
        settings = self._settings
        folder.mkdir(parents=True)
        data, index = self._data(request, folder, used, stop)
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

    def _data(
        self, request: RankRequest, folder: Path, used: ExitStack, stop: threading.Event
    ) -> tuple[str, str]:
        """Returns the folder of the images and the file of their index.

        A dataset cannot be deleted before `used` is closed.
        """
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
        stored = used.enter_context(self._datasets.in_use(dataset_id, request.tenant))
        return str(stored / IMAGES_FOLDER), str(stored / INDEX_FILE)

    async def _follow(self, trainer: Trainer, folder: Path, oom: OomWatch) -> BackbonesRanked:
        while (record := await trainer.next_record()) is not None:
            match record:
                case BackbonesRanked():
                    return record
                case Failed():
                    raise KINDS[record.reason](record.reason, record.message)
        code = await trainer.wait()
        if code == -signal.SIGKILL:
            raise Exhausted(Reason.OUT_OF_MEMORY, oom.why_killed("name smaller backbones"))
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
