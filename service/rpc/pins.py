"""Keeps the pinned versions in memory: their rows say which, and every replica does as they say.

LoadModel writes a row and UnloadModel deletes it; `reconcile` loads what is pinned and lets go of
the rest, at the start and whenever a change is noticed. Lives on the event loop.
"""

import asyncio
import logging

from service.domain import ModelFiles, ModelKey
from service.engine.engine import Engine
from service.errors import GraftError
from service.rpc.predict import resolve
from service.storage.models import ModelStore

log = logging.getLogger(__name__)


class Pins:
    """The pins of all tenants, on one replica's engine."""

    def __init__(self, engine: Engine, models: ModelStore) -> None:
        self._engine = engine
        self._models = models
        self._reconciling = asyncio.Lock()
        self._failed: set[ModelFiles] = set()
        """Those whose failure was logged."""

    async def load(self, model: ModelKey) -> None:
        """Pins a model's latest version, in the place of the one that was.

        Raises NotFound, Exhausted (OUT_OF_MEMORY) where it does not fit here, and what loading
        raises; then nothing has changed.
        """
        files = await resolve(self._models, model, None, None)
        await self._engine.pin(files)
        try:
            await asyncio.to_thread(self._models.pin, model, files.version)
        finally:
            await self.reconcile()

    async def unload(self, model: ModelKey) -> None:
        """Unpins a model; raises NotFound for one that does not exist."""
        await asyncio.to_thread(self._models.unpin, model)
        await self.reconcile()

    async def reconcile(self) -> None:
        """Loads what is pinned and not in memory; unpins the rest. Failures are logged."""
        # One at a time: what an earlier one read must not undo what a later one did.
        async with self._reconciling:
            try:
                wanted = await asyncio.to_thread(self._models.pinned)
            except GraftError:
                log.exception("what is pinned cannot be looked up; the next change tries again")
                return
            for files in self._engine.pinned.difference(wanted):
                self._engine.unpin(files)
            for files in wanted:
                if files in self._engine.pinned:
                    continue
                try:
                    await self._engine.pin(files)
                    self._failed.discard(files)
                except GraftError:
                    if files not in self._failed:
                        log.exception(
                            "a pinned version cannot be kept in memory",
                            extra={"model": str(files.model), "version": files.version},
                        )
                    self._failed.add(files)
            self._failed.intersection_update(wanted)
