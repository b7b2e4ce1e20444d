"""The engine: pictures for any published models in, class probabilities out.

Decodes in threads, batches by backbone, parts at the heads. Knows models as
files named by their digests; what they are called and which one is meant is
the caller's business. Stops with `close`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from service.errors import Damaged, Exhausted, Expired, GraftError, Reason
from service.inference import head as heads
from service.inference.batcher import Batcher
from service.inference.head import Floats, Head
from service.inference.loaded import Loaded, Memory
from service.inference.preprocess import Pixels
from service.inference.runtime import Runtime
from service.telemetry import Telemetry

log = logging.getLogger(__name__)

Decode = Callable[[], Pixels]
"""Makes one picture's pixels; runs in a thread; raises InvalidInput for a bad picture."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies on disk; digests name what is in memory."""

    name: str
    """For metrics alone."""
    backbone_digest: str
    backbone_path: Path
    head_digest: str
    head_path: Path


@dataclass(frozen=True, eq=False)
class Classified:
    """One picture's answer."""

    probabilities: Floats
    """float32 [classes], adding up to 1."""
    features: Floats
    """float32 [d], as the backbone gave them."""
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The engine's limits."""

    threads: int
    max_batch: int
    max_queue: int
    max_bytes: int
    load_timeout_s: float


class Engine:
    """Serves all models of the process."""

    def __init__(self, runtime: Runtime, bounds: Bounds, telemetry: Telemetry) -> None:
        self._bounds = bounds
        self._telemetry = telemetry
        self._decoders = ThreadPoolExecutor(bounds.threads, thread_name_prefix="decode")
        # One at a time: a session spreads over all threads by itself.
        self._computer = ThreadPoolExecutor(1, thread_name_prefix="infer")
        self._memory = Memory(bounds.max_bytes, telemetry)
        telemetry.queue_limit.set(bounds.max_queue)
        self._inside = 0

        def load_backbone(path: Path) -> Batcher:
            session = runtime.load(path)
            return Batcher(session, self._computer, telemetry, bounds.max_batch)

        self._backbones: Loaded[Batcher] = Loaded("backbone", load_backbone, self._memory)
        self._heads: Loaded[Head] = Loaded("head", heads.load, self._memory)

    async def warm(self, files: ModelFiles) -> None:
        """Loads a model, so that its first call finds it in memory."""
        await self._load(files, self._bounds.load_timeout_s)

    async def classify(
        self, files: ModelFiles, pictures: Sequence[Decode], timeout_s: float
    ) -> list[Classified | GraftError]:
        """Classifies each picture; a bad one gets its error, the others their answers.

        Raises Exhausted (QUEUE_FULL) or Expired (DEADLINE_EXCEEDED) for all of
        them, Damaged (MODEL_UNLOADABLE) when the model's files cannot be used.
        """
        if self._inside + len(pictures) > self._bounds.max_queue:
            raise Exhausted(
                Reason.QUEUE_FULL,
                f"{self._inside} pictures are being classified or wait, and {len(pictures)} more "
                f"would pass the bound of {self._bounds.max_queue}: try again later",
                retry_after_s=1.0,
            )
        self._inside += len(pictures)
        try:
            return await self._classify(files, pictures, timeout_s)
        finally:
            self._inside -= len(pictures)

    async def _classify(
        self, files: ModelFiles, pictures: Sequence[Decode], timeout_s: float
    ) -> list[Classified | GraftError]:
        arrived = time.monotonic()
        deadline = arrived + timeout_s
        batcher, head = await self._load(files, timeout_s)
        label = self._telemetry.model_label(files.name)
        tasks = [
            asyncio.create_task(self._one(batcher, head, picture, deadline, label))
            for picture in pictures
        ]
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                outcomes = await asyncio.gather(*tasks)
        except TimeoutError:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the pictures were not classified within {timeout_s:.3g} s: allow more time or "
                "send fewer at once",
            ) from None
        finally:
            # Whoever waits no longer leaves the queue; done tasks do not mind.
            for task in tasks:
                task.cancel()
        self._stage("total", label, time.monotonic() - arrived)
        return outcomes

    def forget(self, *, backbones: Sequence[str] = (), heads: Sequence[str] = ()) -> None:
        """Drops what was deleted; calls under way end as they would have."""
        for digest in backbones:
            self._memory.drop("backbone", digest)
        for digest in heads:
            self._memory.drop("head", digest)

    def close(self) -> None:
        """Ends the threads; waits for what they do."""
        self._decoders.shutdown(cancel_futures=True)
        self._computer.shutdown(cancel_futures=True)

    async def _load(self, files: ModelFiles, timeout_s: float) -> tuple[Batcher, Head]:
        timeout_s = min(timeout_s, self._bounds.load_timeout_s)
        batcher = self._backbones.peek(files.backbone_digest)
        if batcher is None:
            batcher = await self._backbones.get(
                files.backbone_digest, files.backbone_path, timeout_s
            )
        head = self._heads.peek(files.head_digest)
        if head is None:
            head = await self._heads.get(files.head_digest, files.head_path, timeout_s)
        if head.feature_dim != batcher.feature_dim:
            log.error("head takes %d features, its backbone gives %d", head.feature_dim,
                      batcher.feature_dim, extra={"model": files.name})  # fmt: skip
            raise Damaged(
                Reason.MODEL_UNLOADABLE,
                "the version's head does not fit its backbone: publish the version again",
            )
        return batcher, head

    async def _one(
        self, batcher: Batcher, head: Head, decode: Decode, deadline: float, label: str
    ) -> Classified | GraftError:
        loop = asyncio.get_running_loop()
        try:
            pixels, decode_s = await loop.run_in_executor(self._decoders, _timed, decode)
        except GraftError as error:
            self._telemetry.pictures.labels(label, error.reason).inc()
            return error
        features = await batcher.features(pixels, deadline)
        self._stage("decode", label, decode_s)
        self._stage("queue", label, features.queue_s)
        self._stage("infer", label, features.infer_s)
        (probabilities,) = head.probabilities(features.row[None])
        self._telemetry.pictures.labels(label, "ok").inc()
        return Classified(probabilities, features.row, head.classes)

    def _stage(self, stage: str, model: str, seconds: float) -> None:
        self._telemetry.stage_seconds.labels(stage, model).observe(seconds)


def _timed(decode: Decode) -> tuple[Pixels, float]:
    started = time.monotonic()
    return decode(), time.monotonic() - started
