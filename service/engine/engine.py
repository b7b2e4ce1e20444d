"""Takes images for any published models, and returns class probabilities.

Keeps models in memory, queues images before the workers, and answers when these are done. Knows
models as files named by their digests; what they are called and which one is meant is the
caller's business. Lives on the event loop, but for the workers' threads. Stops with `close`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from service.domain import Decision, ModelFiles, plain_name, tenant_of
from service.engine import damage
from service.engine import head as heads
from service.engine.damage import Damages, Watch
from service.engine.fair_queue import Backbone, Classified, Decode, Finish, ImageBatch, Outcome
from service.engine.head import Head
from service.engine.ledger import Ledger
from service.engine.model_cache import Cache, MemoryBudget
from service.engine.runtime import Runtime
from service.engine.workers import Workers
from service.errors import Exhausted, Expired, NotFound, Reason
from service.ops.metrics import Metrics

__all__ = ["Classified", "Decode", "Engine", "EngineLimits", "ModelFiles", "Outcome"]

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
    max_pinned_bytes: int | None = None
    """Bytes that one tenant may pin; None for all of `max_bytes`."""


class Engine:
    """Serves all models of the process."""

    def __init__(
        self,
        runtime: Runtime,
        limits: EngineLimits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._clock = clock
        metrics.queue_limit.set(limits.max_queue)
        self.ledger = Ledger(metrics)
        self._memory = MemoryBudget(limits.max_bytes, metrics)
        self._workers = Workers(limits.threads, limits.max_batch, limits.max_queue, metrics, clock)
        self._pinned: set[ModelFiles] = set()
        self._deletions: list[set[tuple[str, int]]] = []
        """Models and versions that are deleted while one is being pinned, for each that is."""
        self._damages = Damages(metrics)

        def load_backbone(path: Path, digest: str) -> Backbone:
            session = runtime.load(path, digest)
            log.info(
                "backbone loaded",
                extra={
                    "backbone": path.stem,
                    "precision": session.precision,
                    "largest_batch": session.max_batch,
                    "image_ms": round(session.infer_s * 1000, 1),
                },
            )
            return Backbone(session)

        self._backbones: Cache[Backbone] = Cache(
            "backbone", load_backbone, self._memory, self._damages
        )
        self._heads: Cache[Head] = Cache("head", heads.load, self._memory, self._damages)

    async def warm(self, files: ModelFiles) -> None:
        """Loads a model, so that its first call finds it in memory."""
        await self._load(files, self._limits.load_timeout_s)

    async def pin(self, files: ModelFiles) -> None:
        """Loads a model and keeps it in memory until `unpin`; idempotent.

        Raises Exhausted (OUT_OF_MEMORY) when the pinned models would fill the memory, or its
        tenant's the tenant's share, NotFound (VERSION_NOT_FOUND) when it is deleted meanwhile,
        and what loading raises.
        """
        deleted: set[tuple[str, int]] = set()
        self._deletions.append(deleted)
        try:
            await self.warm(files)
        finally:
            self._deletions.remove(deleted)
        if (files.name, files.version) in deleted:
            raise NotFound(
                Reason.VERSION_NOT_FOUND,
                f"version {files.version} of {plain_name(files.name)} was deleted while it was "
                "loaded",
            )
        self._check_share(files)
        self._memory.pin(_keys(files))
        self._pinned.add(files)

    def _check_share(self, files: ModelFiles) -> None:
        bound = self._limits.max_pinned_bytes
        if bound is None:
            return
        tenant = tenant_of(files.name)
        keys = {
            key
            for pinned in self._pinned
            if tenant_of(pinned.name) == tenant
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

    def is_loaded(self, files: ModelFiles) -> bool:
        """Tells whether a model is in memory; does not count as a use."""
        return all(self._memory.has(*key) for key in _keys(files))

    def damage_of(self, files: ModelFiles) -> str:
        """Reports what was wrong with a version's files when last read; "" for nothing."""
        return self._damages.of((files.backbone_path, files.head_path))

    @overload
    async def classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
    ) -> list[Outcome]: ...

    @overload
    async def classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
        *,
        finish: Callable[[list[Outcome]], T],
    ) -> T: ...

    async def classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
        *,
        finish: Finish = list,
    ) -> Any:
        """Classifies each image; a bad one gets its error, the others their answers.

        Returns the outcomes, one for each image, or what `finish` makes of them, which is called
        in a worker's thread; what it raises is raised here. Answers go by `decision` where one
        is given, else by the version's own. Raises Exhausted (QUEUE_FULL) or Expired
        (DEADLINE_EXCEEDED) for all of them, InvalidInput for thresholds of classes that the
        model does not have, Damaged (MODEL_UNLOADABLE) when its files cannot be used.
        """
        arrived = self._clock()
        # Taken before anything is awaited: the model may be deleted meanwhile, and what is
        # recorded of it then must not bring its series back.
        account = self.ledger.account(files.name, files.version)
        try:
            batch = await self._classify(files, images, arrived, timeout_s, decision, finish)
        except BaseException:
            account.failed(self._clock() - arrived)
            raise
        account.answered(batch, files.head_digest, self._clock() - arrived)
        return batch.answer.result()

    async def _classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        arrived: float,
        timeout_s: float,
        decision: Decision | None,
        finish: Finish,
    ) -> ImageBatch:
        backbone, head = await self._load(files, timeout_s)
        if decision is not None:
            decision.check_classes(head.classes, "decision")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        batch = ImageBatch(
            files.name, backbone, head, images, arrived, arrived + timeout_s, answer,
            files.decoding, decision, finish,
        )  # fmt: skip
        self._workers.put(batch)
        try:
            async with asyncio.timeout(batch.deadline - self._clock()) as deadline:
                await answer
        except TimeoutError:
            # A run that raised one is a fault of ours.
            if not deadline.expired():
                raise
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the images were not classified within {timeout_s:.3g} s: allow more time or "
                "send fewer at once",
            ) from None
        finally:
            if not answer.done() or answer.cancelled():
                self._workers.withdraw(batch)
            self._note_what_was_found(files, backbone)
        return batch

    def forget(
        self,
        *,
        models: Sequence[str] = (),
        versions: Sequence[tuple[str, int]] = (),
        backbones: Sequence[str] = (),
        heads: Sequence[str] = (),
        paths: Collection[Path] = (),
    ) -> None:
        """Drops what was deleted; calls under way end as they would have.

        `versions` are those of `models`, too; what they share with others stays in memory. What
        is known of the files at `paths` is dropped; equal files may lie elsewhere.
        """
        for deleted in self._deletions:
            deleted.update(versions)
        for files in [
            files
            for files in self._pinned
            if (files.name, files.version) in versions
            or files.backbone_digest in backbones
            or files.head_digest in heads
        ]:
            self.unpin(files)
        for digest in backbones:
            self._memory.drop("backbone", digest)
        for digest in heads:
            self._memory.drop("head", digest)
        self._damages.forget(paths)
        self.ledger.forget(models, versions)

    def close(self) -> None:
        """Ends the threads; waits for what they do."""
        self._workers.close()

    async def _load(self, files: ModelFiles, timeout_s: float) -> tuple[Backbone, Head]:
        timeout_s = min(timeout_s, self._limits.load_timeout_s)
        watch = self._damages.watch()
        try:
            backbone = self._backbones.peek(files.backbone_digest)
            if backbone is None:
                backbone = await self._backbones.get(
                    files.backbone_digest, files.backbone_path, timeout_s
                )
            head = self._heads.peek(files.head_digest)
            if head is None:
                if files.head_path in watch.forgotten:
                    raise damage.unloadable("head", "was deleted")
                head = await self._heads.get(files.head_digest, files.head_path, timeout_s)
            if head.feature_dim > backbone.session.feature_dim:
                await self._refuse(files, head, backbone, watch)
        finally:
            self._damages.unwatch(watch)
        return backbone, head

    async def _refuse(
        self, files: ModelFiles, head: Head, backbone: Backbone, watch: Watch
    ) -> None:
        error = damage.unloadable(
            "head",
            f"takes {head.feature_dim} features, and its backbone gives "
            f"{backbone.session.feature_dim}",
        )
        stamp = await asyncio.to_thread(damage.stamp_of, files.head_path)
        if files.head_path not in watch.forgotten:
            self._damages.note("head", files.head_path, stamp, error)
        raise error

    def _note_what_was_found(self, files: ModelFiles, backbone: Backbone) -> None:
        # By a worker, as it read the file again; what was deleted is in memory no more.
        if not self._memory.has("backbone", files.backbone_digest):
            return
        path, found = files.backbone_path, backbone.session.damage
        if found is None:
            self._damages.clear(path)
        elif not self._damages.of([path]):
            # Without a stamp: a load reads it again.
            self._damages.note("backbone", path, None, found)


def _keys(files: ModelFiles) -> list[tuple[str, str]]:
    return [("backbone", files.backbone_digest), ("head", files.head_digest)]
