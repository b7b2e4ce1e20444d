"""What answers a call for a model: the version that is meant, or what stands in for it.

A call by an alias that falls back, whose version's files are damaged, is answered by
the version that the alias pointed to before. Models are named by their keys.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from service.domain import Decision
from service.engine.engine import Decode, ModelFiles, Outcome
from service.errors import Damaged, NotFound
from service.ops.metrics import Metrics

Resolve = Callable[[str, int | None, str | None], tuple[int, ModelFiles]]
"""From a model's key and a version, an alias or neither (`latest`) to its number and files."""
Fallbacks = Callable[[str, str | None], list[int]]
"""From a model's key and an alias to the versions that may stand in for its own, best first."""


class Classifies(Protocol):
    """What of the engine is needed here."""

    async def classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
    ) -> list[Outcome]:
        """Classifies each image."""


class Serving:
    """Answers for all servicers."""

    def __init__(
        self, engine: Classifies, resolve: Resolve, fallbacks: Fallbacks, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._resolve = resolve
        self._fallbacks = fallbacks
        self._fallen_back = metrics.fallen_back

    async def classify(
        self,
        model: str,
        version: int | None,
        alias: str | None,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
    ) -> tuple[int, list[Outcome]]:
        """Classifies each image; answers with the version that did, too.

        By `decision`, or by the version's own where none is given. Raises NotFound, and what
        the engine raises; Damaged (MODEL_UNLOADABLE) is of the version that was meant, where
        nothing stands in for it.
        """
        deadline = time.monotonic() + timeout_s
        number, files = self._resolve(model, version, alias)
        try:
            return number, await self._engine.classify(files, images, timeout_s, decision)
        except Damaged:
            # It may have been deleted meanwhile: NotFound then, or another one is meant.
            now, files = self._resolve(model, version, alias)
            if now != number:
                left_s = deadline - time.monotonic()
                return now, await self._engine.classify(files, images, left_s, decision)
            if version is not None:
                raise
            for earlier in self._fallbacks(model, alias):
                try:
                    _, files = self._resolve(model, earlier, None)
                    left_s = deadline - time.monotonic()
                    outcomes = await self._engine.classify(files, images, left_s, decision)
                except (Damaged, NotFound):
                    continue  # or deleted since
                self._fallen_back.inc()
                return earlier, outcomes
            raise
