"""Takes images for any published models, and returns class probabilities.

Keeps models in memory, queues images before the workers, and answers when these are done. Knows
models by the digests of their files; what they are called and which one is meant is the
caller's business. Lives on the event loop, but for the workers' threads. Stops with `close`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from service.domain import Decision, ModelFiles
from service.engine import head as heads
from service.engine.fair_queue import (
    AskedHead,
    Backbone,
    Classified,
    Decode,
    Finish,
    ImageBatch,
    Outcome,
    Run,
)
from service.engine.head import Head
from service.engine.ledger import Ledger
from service.engine.model_cache import Cache, MemoryBudget
from service.engine.recent_features import RecentFeatures
from service.engine.runtime import Runtime
from service.engine.workers import Workers
from service.errors import Exhausted, Expired, Reason, unloadable
from service.ops.metrics import Metrics

ReadFile = Callable[[str, str], bytes]
"""Reads a stored file, checked, by its sha256 and its kind ("backbone", "head")."""

__all__ = [
    "AskedModel",
    "Classified",
    "Decode",
    "Engine",
    "EngineLimits",
    "ModelFiles",
    "Outcome",
    "ReadFile",
]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of one replica's engine."""

    threads: int
    max_batch: int
    """Images in one run."""
    max_queue: int
    """Images that wait."""
    max_bytes: int
    """Bytes of models in memory."""
    load_timeout_s: float
    recent_bytes: int = 0
    """Bytes of recent images' features in memory; 0 keeps none."""
    max_pinned_bytes: int | None = None
    """Bytes that one tenant may pin; None for all of `max_bytes`."""


@dataclass(frozen=True)
class AskedModel:
    """A model that a call asks."""

    files: ModelFiles
    decision: Decision | None = None
    """Says how its probabilities become answers, in the place of the version's own."""
    decision_field: str = "decision"
    """The request's field that holds it, for errors."""


class Engine:
    """Serves all models of the process."""

    def __init__(
        self,
        runtime: Runtime,
        read: ReadFile,
        limits: EngineLimits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        metrics.queue_limit.set(limits.max_queue)
        self.ledger = Ledger(metrics)
        self._memory = MemoryBudget(limits.max_bytes, metrics)
        self.recent: RecentFeatures | None = None
        if limits.recent_bytes:
            self.recent = RecentFeatures(limits.recent_bytes, metrics)
        self._workers = Workers(
            limits.threads, limits.max_batch, limits.max_queue, metrics, clock, self.recent
        )
        self._pinned: set[ModelFiles] = set()

        def load_backbone(digest: str) -> Backbone:
            session = runtime.load(partial(read, digest, "backbone"), digest)
            log.info(
                "backbone loaded",
                extra={
                    "backbone": digest,
                    "precision": session.precision,
                    "largest_batch": session.max_batch,
                    "image_ms": round(session.infer_s * 1000, 1),
                },
            )
            if session.precision != session.made_for:
                log.warning(
                    "this machine does not compute in the precision that a backbone was made for: "
                    "answers may differ a little from those that were measured",
                    extra={"backbone": digest, "made_for": session.made_for},
                )
            return Backbone(session, digest)

        def load_head(digest: str) -> Head:
            return heads.load(read(digest, "head"))

        self._backbones: Cache[Backbone] = Cache("backbone", load_backbone, self._memory)
        self._heads: Cache[Head] = Cache("head", load_head, self._memory)

    async def warm(self, files: ModelFiles) -> None:
        """Loads a model, so that its first call finds it in memory."""
        await self._load(files, self._limits.load_timeout_s)

    async def pin(self, files: ModelFiles) -> None:
        """Loads a model and keeps it in memory until `unpin`; idempotent.

        Raises Exhausted (OUT_OF_MEMORY) when the pinned models would fill the memory, or its
        tenant's the tenant's share, and what loading raises.
        """
        await self.warm(files)
        self._check_share(files)
        self._memory.pin(_keys(files))
        self._pinned.add(files)

    def _check_share(self, files: ModelFiles) -> None:
        bound = self._limits.max_pinned_bytes
        if bound is None:
            return
        keys = {
            key
            for pinned in self._pinned
            if pinned.model.tenant == files.model.tenant
            for key in _keys(pinned)
        }
        if self._memory.nbytes_of(keys | set(_keys(files))) > bound:
            raise Exhausted(
                Reason.OUT_OF_MEMORY,
                f"with this model your pinned ones would take more than {bound / 2**20:.0f} MiB, "
                "half of the memory for models, which is what one tenant may pin: unpin others",
            )

    def unpin(self, files: ModelFiles) -> None:
        """Lets a model be evicted again; one that is not pinned stays as it is."""
        self._pinned.discard(files)
        still = {key for pinned in self._pinned for key in _keys(pinned)}
        self._memory.unpin([key for key in _keys(files) if key not in still])

    @property
    def pinned(self) -> frozenset[ModelFiles]:
        """Returns the models that are pinned."""
        return frozenset(self._pinned)

    def is_loaded(self, files: ModelFiles) -> bool:
        """Tells whether a model is in memory; does not count as a use."""
        return all(self._memory.has(*key) for key in _keys(files))

    async def classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
    ) -> list[Outcome]:
        """Classifies each image with one model; as `classify_with`, which says more."""
        asked = [AskedModel(files, decision)]
        (outcomes,) = await self.classify_with(asked, images, timeout_s, finish=list)
        return outcomes

    async def classify_with(
        self,
        models: Sequence[AskedModel],
        images: Sequence[Decode],
        timeout_s: float,
        *,
        finish: Callable[[list[list[Outcome]]], T],
        spent_s: float = 0.0,
    ) -> T:
        """Classifies each image with each model; a bad image gets its error from all of them.

        An image is decoded once for each decoding among the models' versions, and runs once
        through each of their backbones. `spent_s` of the time are gone already.

        Returns what `finish` makes of the outcomes, a list for each model of one for each image;
        it is called in a worker's thread, and what it raises is raised here. Raises Exhausted
        (QUEUE_FULL) or Expired (DEADLINE_EXCEEDED) for all of them, InvalidInput for thresholds
        of classes that a model does not have, Damaged (MODEL_UNLOADABLE) when a model's files
        cannot be used.
        """
        arrived = self._clock()
        # Taken before anything is awaited: a model may be deleted meanwhile, and what is
        # recorded of it then must not bring its series back.
        accounts = [self.ledger.account(each.files.model, each.files.version) for each in models]
        try:
            batch = await self._classify(models, images, arrived, timeout_s, spent_s, finish)
        except BaseException:
            for account in accounts:
                account.failed(self._clock() - arrived)
            raise
        total_s = self._clock() - arrived
        for place, (account, each) in enumerate(zip(accounts, models, strict=True)):
            account.answered(batch, place, each.files.head_digest, total_s)
        result: T = batch.answer.result()
        return result

    async def _classify(
        self,
        models: Sequence[AskedModel],
        images: Sequence[Decode],
        arrived: float,
        timeout_s: float,
        spent_s: float,
        finish: Finish,
    ) -> ImageBatch:
        until = arrived + timeout_s - spent_s
        runs: dict[Run, int] = {}
        heads_of = []
        for each in models:
            backbone, head = await self._load(each.files, until - self._clock())
            if each.decision is not None:
                each.decision.check_classes(head.classes, each.decision_field)
            run = runs.setdefault(Run(backbone, each.files.decoding), len(runs))
            heads_of.append(AskedHead(run, head, each.decision))
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        batch = ImageBatch(
            models[0].files.model, list(runs), heads_of, images, arrived, until, answer, finish,
        )  # fmt: skip
        self._workers.put(batch)
        # Some 6 µs less a call than `asyncio.timeout`.
        deadline = loop.call_later(batch.deadline - self._clock(), _expire, answer, timeout_s)
        try:
            await answer
        except BaseException:
            self._workers.withdraw(batch)
            raise
        finally:
            deadline.cancel()
        return batch

    def close(self) -> None:
        """Ends the threads; waits for what they do."""
        self._workers.close()

    async def _load(self, files: ModelFiles, timeout_s: float) -> tuple[Backbone, Head]:
        timeout_s = min(timeout_s, self._limits.load_timeout_s)
        backbone = self._backbones.peek(files.backbone_digest)
        if backbone is None:
            backbone = await self._backbones.get(files.backbone_digest, timeout_s)
        head = self._heads.peek(files.head_digest)
        if head is None:
            head = await self._heads.get(files.head_digest, timeout_s)
        if head.feature_dim > backbone.session.feature_dim:
            raise unloadable(
                "head",
                f"takes {head.feature_dim} features, and its backbone gives "
                f"{backbone.session.feature_dim}",
            )
        return backbone, head


def _expire(answer: "asyncio.Future[Any]", timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(
            Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the images were not classified within {timeout_s:.3g} s: allow more time or "
                "send fewer at once",
            )
        )


def _keys(files: ModelFiles) -> list[tuple[str, str]]:
    return [("backbone", files.backbone_digest), ("head", files.head_digest)]
