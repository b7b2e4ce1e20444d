"""Follows the change log: what this replica keeps of models and pins goes by what the tables say.

A change only says "look again". Lives on the event loop; polls in a thread, since other replicas
write changes, too. Stops with `close`.
"""

import asyncio
import logging
from contextlib import suppress

from service.domain import ModelKey
from service.engine.engine import Engine
from service.errors import NotFound
from service.rpc.pins import Pins
from service.storage.changes import Changes
from service.storage.models import ModelStore

_POLL_S = 1.0

log = logging.getLogger(__name__)


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

    async def start(self) -> None:
        """Loads what is pinned, and follows from then on."""
        await self._pins.reconcile()
        self._tasks = [
            asyncio.create_task(self._poll(), name="poll changes"),
            asyncio.create_task(self._follow(), name="follow changes"),
        ]

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
                    await self._look_again(model)
                await self._pins.reconcile()
            except Exception:
                log.exception("what changed cannot be looked up; the next change tries again")

    async def _look_again(self, model: ModelKey) -> None:
        try:
            numbers = await asyncio.to_thread(self._models.numbers, model)
        except NotFound:
            numbers = []
        self._engine.keep_only(model, numbers)
