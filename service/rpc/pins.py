"""Keeps what a replica has in memory of models and pins as their tables say.

`Pins`: LoadModel writes a row and UnloadModel deletes it; `reconcile` loads what is pinned and lets
go of the rest, at the start and whenever a change is noticed. `ChangeFollower` notices: a change
only says "look again". It polls in a thread, since other replicas write changes, too, and stops
with `close`. Both live on the event loop.
"""

import asyncio
import logging
from contextlib import suppress

from service.domain import ModelFiles, ModelKey
from service.engine.engine import Engine
from service.errors import GraftError, NotFound
from service.rpc.predict import resolve
from service.storage.changes import Changes
from service.storage.models import ModelStore

_POLL_S = 1.0

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


class ChangeFollower:
    """Brings the engine up to date with the tables of models and pins."""

    def __init__(self, changes: Changes, models: ModelStore, engine: Engine, pins: Pins) -> None:
        self._changes = changes
        self._models = models
        self._engine = engine
        self._pins = pins
        self._models_changed: set[ModelKey] = set()
        self._has_news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        changes.listen("model", self._heard)
        changes.listen("pins", self._heard)
        if engine.recent is not None:
            changes.listen("image", engine.recent.forget)

    async def start(self) -> None:
        """Loads what is pinned, and follows from then on."""
        await self._pins.reconcile()
        self._tasks = [
            asyncio.create_task(self._poll(), name="poll changes"),
            asyncio.create_task(self._follow(), name="follow changes"),
        ]

    async def look_again(self, model: ModelKey) -> None:
        """Drops what is recorded of a model's deleted versions. Failures are logged.

        What is in memory leaves when room is needed.
        """
        recorded = self._engine.ledger.recorded(model)
        try:
            numbers = await asyncio.to_thread(self._models.numbers, model)
        except NotFound:
            numbers = []
        except GraftError:
            log.exception("what changed cannot be looked up; the next change tries again")
            return
        self._engine.ledger.keep_only(model, numbers, recorded)

    async def close(self) -> None:
        """Ends the tasks."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    def _heard(self, tenant: str, name: str) -> None:
        with suppress(RuntimeError):  # the loop is closed: the service has ended
            self._loop.call_soon_threadsafe(self._note, ModelKey(tenant, name))

    def _note(self, model: ModelKey) -> None:
        # Without a name changes were missed, and everything is looked at.
        self._models_changed.update([model] if model.name else self._engine.ledger.models)
        self._has_news.set()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await asyncio.to_thread(self._changes.poll)
            except Exception:
                log.exception("changes cannot be looked up; trying again")

    async def _follow(self) -> None:
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            changed, self._models_changed = self._models_changed, set()
            try:
                for model in changed:
                    await self.look_again(model)
                await self._pins.reconcile()
            except Exception:
                log.exception("what changed cannot be looked up; the next change tries again")
