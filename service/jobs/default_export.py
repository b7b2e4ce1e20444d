"""Exports the default backbone before the first job asks for it.

Once, after the start, and only where its weights are here: nothing is downloaded that nobody asked
for. What this environment keeps (`service.prepared`) is taken; else a trainer of its own, which
stands back as all do, exports, and the environment keeps that. A job that would need the export
waits for one that is under way, since two at once take as long as one after the other. What goes
wrong is logged, and left to the first job, which says it to its caller. Lives on the event loop;
stops with `close`.
"""

import asyncio
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from service import prepared
from service.backbones import PIN, find, is_registered
from service.contract import Exported, ExportSpec, Failed
from service.errors import GraftError
from service.jobs.launchers import Launcher, Trainer, start_held
from service.jobs.request import JobRequest
from service.jobs.settings import Settings
from service.jobs.uninterrupted import uninterrupted
from service.jobs.weights import is_here
from service.storage.backbone_rows import EVERYBODY
from service.storage.models import ModelStore

_LIMIT_S = 600.0
"""For the export with the start of its trainer, on the slowest machine."""
_WAIT_S = 60.0
"""Longest that a job waits for it: then it exports for itself."""

log = logging.getLogger(__name__)


class DefaultExport:
    """One export in the background; `start` begins it."""

    def __init__(self, models: ModelStore, launcher: Launcher, settings: Settings) -> None:
        self._models = models
        self._launcher = launcher
        self._settings = settings
        self._backbone = settings.default_backbone
        self._folder = settings.work_dir.parent / "export"
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins; returns at once."""
        self._task = asyncio.create_task(self._run(), name="export of the default backbone")

    async def close(self) -> None:
        """Stops an export that is under way; its trainer has ended afterwards."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def wait(self, request: JobRequest) -> None:
        """Waits until it is over, for a job that would need it; never fails."""
        is_its = request.backbone_or(self._backbone) == self._backbone and not request.weights
        if self._task is not None and is_its:
            await asyncio.wait({self._task}, timeout=_WAIT_S)

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(_LIMIT_S):
                if not await asyncio.to_thread(self._is_missing):
                    return
                exported = await asyncio.to_thread(self._take_prepared) or await self._export()
            if exported:
                names = [form.weights for form in exported.forms]
                log.info(
                    "the default backbone is exported",
                    extra={"backbone": self._backbone, "forms": names},
                )
        except Exception:
            log.exception("the default backbone is not exported yet; its first job does it")
        finally:
            await uninterrupted(asyncio.to_thread(self._clear))

    def _is_missing(self) -> bool:
        row = find(self._backbone)
        if row is None or is_registered(self._backbone):
            return False
        name = row.weights_name("")
        # timm's are named by a tag and their file's digest, which the trainer finds out.
        if any(
            known.reference and name in ("", known.weights, known.weights.partition(PIN)[0])
            for known in self._models.exported_backbones(self._backbone, EVERYBODY)
        ):
            return False
        return is_here(self._settings.weights_dir, row.weights_file(name))

    def _take_prepared(self) -> Exported | None:
        """Stores what the environment keeps; None where that is nothing, or not whole."""
        folder = self._settings.prepared
        found = None if folder is None else prepared.find(folder, self._backbone)
        if found is None:
            return None
        try:
            self._store(*found)
        except (GraftError, OSError) as error:
            log.warning("what the environment keeps of the default backbone is not used: %s", error)
            return None
        return found[0]

    def _store(self, exported: Exported, folder: Path) -> None:
        for form in exported.forms:
            self._models.keep_exported(self._backbone, form, folder)

    def _keep_prepared(self, exported: Exported) -> None:
        # In a precision that was set there may be fewer forms than others want.
        folder = self._settings.prepared
        if folder is None or not prepared.is_own_environment():
            return
        if self._settings.gpus or self._settings.precision != "auto":
            return
        # It may well be read-only.
        with suppress(OSError):
            prepared.keep(folder, self._backbone, exported, self._folder)

    async def _export(self) -> Exported | None:
        settings = self._settings
        spec = ExportSpec(
            backbone=self._backbone,
            out_dir=str(self._folder),
            weights_dir=str(settings.weights_dir),
            precision="fp32" if settings.gpus else settings.precision,
            threads=settings.trainer_threads,
        )
        await asyncio.to_thread(self._clear)
        await asyncio.to_thread(self._folder.mkdir, parents=True)
        trainer = await start_held(self._launcher, spec, self._folder, settings.stop_grace_s)
        try:
            exported = await self._followed(trainer)
            if exported is not None:
                # To their ends: a thread goes on when nobody waits for it.
                await uninterrupted(asyncio.to_thread(self._store, exported, self._folder))
                await uninterrupted(asyncio.to_thread(self._keep_prepared, exported))
            return exported
        finally:
            await uninterrupted(trainer.stop(settings.stop_grace_s))

    async def _followed(self, trainer: Trainer) -> Exported | None:
        while True:
            match await trainer.next_record():
                case Exported() as record:
                    return record
                case Failed() as record:
                    problem = record.message
                    break
                case None:
                    problem = "\n".join(trainer.last_words())
                    break
        log.error("the default backbone is not exported; its first job does it: %s", problem)
        return None

    def _clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
