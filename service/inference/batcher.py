"""Forms batches for backbones: pictures for any models of one backbone run together.

Idle-first: an idle backbone runs what is there at once, with no waiting window;
what arrives while it runs forms the next batch. Pictures whose caller left or
whose deadline passed leave the queue before they cost anything. Lives on the
event loop; one computing thread takes the batches of all backbones in turn. The
engine bounds how many pictures may wait.
"""

import asyncio
import time
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from service.errors import Expired, Reason
from service.inference.head import Floats
from service.inference.preprocess import Pixels
from service.inference.runtime import Session
from service.telemetry import Telemetry


@dataclass(frozen=True, eq=False)
class Features:
    """What a backbone said about one picture, and how long that took."""

    row: Floats
    """float32 [d]"""
    queue_s: float
    infer_s: float


@dataclass(frozen=True, eq=False)
class _Waiting:
    pixels: Pixels
    deadline: float
    arrived: float
    future: asyncio.Future[Features]


class Batcher:
    """The queue before one backbone's session."""

    def __init__(
        self,
        session: Session,
        executor: Executor,
        telemetry: Telemetry,
        max_batch: int,
    ) -> None:
        self._session = session
        self._executor = executor
        self._telemetry = telemetry
        self._max_batch = max_batch
        self._queue: deque[_Waiting] = deque()
        self._running: asyncio.Task[None] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the session, about."""
        return self._session.nbytes

    @property
    def feature_dim(self) -> int:
        """How many features a picture gets."""
        return self._session.feature_dim

    async def features(self, pixels: Pixels, deadline: float) -> Features:
        """Features of one uint8 [224, 224, 3], by `deadline` (of time.monotonic).

        Raises Expired when the deadline passes before it is its turn.
        """
        future: asyncio.Future[Features] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(pixels, deadline, time.monotonic(), future))
        self._telemetry.queue_depth.inc()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._next_batch():
                started = time.monotonic()
                try:
                    rows = await loop.run_in_executor(
                        self._executor, _compute, self._session, [w.pixels for w in batch]
                    )
                except Exception as error:
                    for waiting in batch:
                        if not waiting.future.done():
                            waiting.future.set_exception(error)
                    continue
                infer_s = time.monotonic() - started
                self._telemetry.batch_size.observe(len(batch))
                for waiting, row in zip(batch, rows, strict=True):
                    if not waiting.future.done():
                        queue_s = started - waiting.arrived
                        waiting.future.set_result(Features(row, queue_s, infer_s))
        finally:
            # Set before anything awaits, so that no arrival is left without a runner.
            self._running = None

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        now = time.monotonic()
        while self._queue and len(batch) < self._max_batch:
            waiting = self._queue.popleft()
            self._telemetry.queue_depth.dec()
            if waiting.future.done():
                continue
            if waiting.deadline <= now:
                waiting.future.set_exception(
                    Expired(
                        Reason.DEADLINE_EXCEEDED,
                        "the deadline passed while the picture waited: allow more time or send "
                        "less at once",
                    )
                )
                continue
            batch.append(waiting)
        return batch


def _compute(session: Session, pictures: list[Pixels]) -> Floats:
    return session.run(np.stack(pictures))
