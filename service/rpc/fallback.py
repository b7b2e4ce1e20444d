"""Classification by the version that a call names, or by an earlier one if its files are damaged.

Only a call by an alias that falls back is answered by the version that the alias pointed
to before. Models are named by their keys.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from service.domain import Decision
from service.engine.engine import Decode, Engine, Outcome
from service.errors import Damaged, NotFound
from service.ops.metrics import Metrics
from service.storage.models import ModelStore
from service.storage.records import VersionRecord

T = TypeVar("T")

Finish = Callable[[int, list[Outcome]], T]
"""Builds the answer from a version's number and the outcomes, in the order of the images."""


class Fallback:
    """Resolves models and classifies; one for all servicers."""

    def __init__(self, engine: Engine, models: ModelStore, metrics: Metrics) -> None:
        self._engine = engine
        self._models = models
        self._fallen_back = metrics.fallen_back

    async def resolve(self, model: str, version: int | None, alias: str | None) -> VersionRecord:
        """Returns the version by number, by alias, or by neither (`latest`); raises NotFound."""
        known = self._models.remembered(model, version, alias)
        if known is not None:
            return known
        return await asyncio.to_thread(self._models.resolve, model, version, alias)

    async def classify(
        self,
        model: str,
        version: int | None,
        alias: str | None,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None,
        finish: Finish[T],
    ) -> T:
        """Classifies each image; returns what `finish` makes of it, in a worker's thread.

        By `decision`, or by the version's own where none is given. Raises NotFound, what
        `finish` raises and what the engine raises; Damaged (MODEL_UNLOADABLE) is about the
        version that was meant, where nothing stands in for it.
        """
        deadline = time.monotonic() + timeout_s

        async def by(record: VersionRecord) -> T:
            return await self._engine.classify(
                record.files,
                images,
                deadline - time.monotonic(),
                decision,
                finish=partial(finish, record.version),
            )

        meant = await self.resolve(model, version, alias)
        try:
            return await by(meant)
        except Damaged:
            # It may have been deleted meanwhile: NotFound then, or another one is meant.
            now = await self.resolve(model, version, alias)
            if now.version != meant.version:
                return await by(now)
            if version is not None:
                raise
            for earlier in await asyncio.to_thread(self._models.fallbacks, model, alias):
                try:
                    answer = await by(await self.resolve(model, earlier, None))
                except (Damaged, NotFound):
                    continue  # or deleted since
                self._fallen_back.inc()
                return answer
            raise
