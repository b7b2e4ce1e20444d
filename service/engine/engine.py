"""The engine: images for any published models in, class probabilities out.

Knows what is in memory, queues by backbone, and answers when the workers are
done. Knows models as files named by their digests; what they are called and
which one is meant is the caller's business. Lives on the event loop, but for
the workers' threads. Stops with `close`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

from service.domain import DEFAULT_DECODING, Decision, ImageDecoding, tenant_of
from service.engine import damage
from service.engine import head as heads
from service.engine.damage import Damages, Watch
from service.engine.fair_queue import Backbone, Call, Classified, Decode, Finish, Outcome
from service.engine.head import Head
from service.engine.loaded import Loaded, Memory
from service.engine.runtime import Runtime
from service.engine.statistics import Statistics, Tally
from service.engine.workers import Workers
from service.errors import Exhausted, Expired, GraftError, Reason
from service.ops.metrics import Metrics

__all__ = ["Bounds", "Classified", "Decode", "Engine", "ModelFiles", "Outcome"]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ModelFiles:
    """Where a version of a model lies on disk; digests name what is in memory."""

    name: str
    """For metrics and for fairness."""
    version: int
    """For statistics."""
    backbone_digest: str
    backbone_path: Path
    head_digest: str
    head_path: Path
    decoding: ImageDecoding = DEFAULT_DECODING
    """Says how its images become pixels."""


class Placed(Protocol):
    """What says where a version's files lie."""

    @property
    def backbone_path(self) -> Path:
        """Its backbone's."""

    @property
    def head_path(self) -> Path:
        """Its head's."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The engine's limits."""

    threads: int
    max_batch: int
    max_queue: int
    max_bytes: int
    load_timeout_s: float
    max_pinned_bytes: int | None = None
    """What one tenant may pin; None means all of `max_bytes`."""


class Engine:
    """Serves all models of the process."""

    def __init__(self, runtime: Runtime, bounds: Bounds, metrics: Metrics) -> None:
        self._bounds = bounds
        self._metrics = metrics
        metrics.queue_limit.set(bounds.max_queue)
        self.statistics = Statistics()
        self._memory = Memory(bounds.max_bytes, metrics)
        self._workers = Workers(bounds.threads, bounds.max_batch, bounds.max_queue, metrics)
        self._pinned: set[ModelFiles] = set()
        self._damages = Damages(metrics)

        def load_backbone(path: Path, digest: str) -> Backbone:
            session = runtime.load(path, digest)
            log.info(
                "backbone loaded",
                extra={
                    "backbone": path.stem,
                    "precision": session.precision,
                    "largest_batch": session.max_batch,
                    "image_ms": round(session.image_s * 1000, 1),
                },
            )
            return Backbone(session, session.image_s)

        self._backbones: Loaded[Backbone] = Loaded(
            "backbone", load_backbone, self._memory, self._damages
        )
        self._heads: Loaded[Head] = Loaded("head", heads.load, self._memory, self._damages)

    async def warm(self, files: ModelFiles) -> None:
        """Loads a model, so that its first call finds it in memory."""
        await self._load(files, self._bounds.load_timeout_s)

    async def pin(self, files: ModelFiles) -> None:
        """Loads a model and keeps it in memory until `unpin`; twice is as once.

        Raises Exhausted (OUT_OF_MEMORY) when the pinned models would fill the
        memory's bound, or its tenant's its share, and what loading raises.
        """
        await self.warm(files)
        self._check_share(files)
        self._memory.pin(_keys(files))
        self._pinned.add(files)

    def _check_share(self, files: ModelFiles) -> None:
        bound = self._bounds.max_pinned_bytes
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
        """Lets a model leave memory when room is needed; one that is not pinned stays as it is."""
        self._pinned.discard(files)
        still = {key for pinned in self._pinned for key in _keys(pinned)}
        self._memory.unpin([key for key in _keys(files) if key not in still])

    def is_loaded(self, files: ModelFiles) -> bool:
        """Whether a model is in memory; no use of it."""
        return all(self._memory.has(*key) for key in _keys(files))

    def damage_of(self, files: "Placed") -> str:
        """What was wrong with a version's files when they were last read; "" for nothing."""
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
        arrived = time.monotonic()
        # Taken before anything is awaited: the model may be deleted meanwhile, and what is
        # told of it then must not bring its series back.
        stages = self._metrics.stages(files.name)
        tally = self.statistics.tally(files.name, files.version)
        try:
            call = await self._classify(files, images, arrived, timeout_s, decision, finish)
        except BaseException:
            _record(tally, 0, time.monotonic() - arrived, [], [], [], ok=False)
            raise
        outcomes = call.in_order
        if call.head.outliers is not None:
            # Not when it is loaded: candidates and old versions are, beside the one that serves.
            stages.compare_with(files.head_digest, call.head.outliers.validation)
        total_s = time.monotonic() - arrived
        stages.total.observe(total_s)
        for values, histogram in (
            (call.decode_s, stages.decode),
            (call.queue_s, stages.queue),
            (call.infer_s, stages.infer),
        ):
            for seconds in values:
                histogram.observe(seconds)
        for outcome in outcomes:
            if isinstance(outcome, GraftError):
                stages.count(outcome.reason)
                continue
            stages.count("ok")
            if outcome.outlier_score is not None:
                stages.outlier_score.observe(outcome.outlier_score)
        spent = (call.queue_s, call.decode_s, call.infer_s)
        _record(tally, len(images), total_s, *spent, ok=True)
        return call.answer.result()

    async def _classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        arrived: float,
        timeout_s: float,
        decision: Decision | None,
        finish: Finish,
    ) -> Call:
        backbone, head = await self._load(files, timeout_s)
        if decision is not None:
            decision.check_classes(head.classes, "decision")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = Call(
            files.name, backbone, head, images, arrived, arrived + timeout_s, answer,
            files.decoding, decision, finish,
        )  # fmt: skip
        self._workers.put(call)
        try:
            async with asyncio.timeout(call.deadline - time.monotonic()) as deadline:
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
            # Whoever waits no longer leaves the queue.
            if call.waiting:
                self._workers.leave(call)
            self._note_what_was_found(files, backbone)
        return call

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

        Versions are those of the models, too; what they share with others stays in memory.
        What was found in the files at `paths` is forgotten: equal ones may lie elsewhere.
        """
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
        for model, version in versions:
            self.statistics.forget(model, version)
        for model in models:
            self._metrics.forget_model(model)

    def close(self) -> None:
        """Ends the threads; waits for what they do."""
        self._workers.close()

    async def _load(self, files: ModelFiles, timeout_s: float) -> tuple[Backbone, Head]:
        timeout_s = min(timeout_s, self._bounds.load_timeout_s)
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
        look = await asyncio.to_thread(damage.look_at, files.head_path)
        if files.head_path not in watch.forgotten:
            self._damages.note("head", files.head_path, look, error)
        raise error

    def _note_what_was_found(self, files: ModelFiles, backbone: Backbone) -> None:
        # By a worker, as it read the file again; what was deleted is in memory no more.
        if not self._memory.has("backbone", files.backbone_digest):
            return
        path, found = files.backbone_path, backbone.session.damage
        if found is None:
            self._damages.clear(path)
        elif not self._damages.of([path]):
            # Without a look: a load reads it again.
            self._damages.note("backbone", path, None, found)


def _record(
    tally: Tally,
    images: int,
    total_s: float,
    queue_s: Sequence[float],
    decode_s: Sequence[float],
    infer_s: Sequence[float],
    *,
    ok: bool,
) -> None:
    # A call's stage is its slowest image's.
    tally.record(
        images=images,
        ok=ok,
        queue_s=max(queue_s, default=0.0),
        decode_s=max(decode_s, default=0.0),
        infer_s=max(infer_s, default=0.0),
        total_s=total_s,
    )


def _keys(files: ModelFiles) -> list[tuple[str, str]]:
    return [("backbone", files.backbone_digest), ("head", files.head_digest)]
