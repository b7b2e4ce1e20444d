"""Threads that compute: each decodes a batch, runs the backbone once, applies every image's head.

As many as the machine has cores, so that decoding and inference never fight for a core. A
worker that is alone gives its run all cores; the more are busy, the fewer cores a run gets, down
to one: the answer to a lone caller is as fast as it can be, and under load no run waits for
another's threads. An image that finds a free worker is run at once, with no waiting window.

A batch is put together while it is decoded: before each image a worker asks the queue whose
turn it is now. So an image whose caller left, or whose deadline passed, costs nothing, and a
batch ends once it has taken `_BATCH_S`: who arrives meanwhile waits for no longer than that and
the one image that was begun. Stops with `close`.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine.fair_queue import (
    Classified,
    Estimate,
    FairQueue,
    ImageBatch,
    Item,
    Outcome,
)
from service.engine.head import Floats
from service.engine.preprocess import Encoded, Pixels
from service.errors import Exhausted, GraftError, Reason
from service.ops.metrics import Metrics

_BATCH_S = 0.025
"""Longest expected time of a batch of more than one image. Handing a batch over and taking the
callers' next requests costs some 0.3 ms more than doing it for one image of several; a longer
batch saves little of that, and whoever arrives meanwhile waits for all of it."""
_DECODE_S = 0.003
"""Expected time of an image's decoding before any of its tenant was measured: a small photo's."""
_PIXEL_S = 15e-9
"""Time of a pixel of a large image in its decoding, about."""
_HOPEFUL = 0.8
"""Part of a call's time that it may be expected to wait; what is expected is not exact."""
_RETRY_S = (0.1, 30.0)


@dataclass(eq=False)
class _Row:
    """An image of the batch that a worker puts together."""

    batch: ImageBatch
    place: int
    queue_s: float
    decode_s: float = 0.0
    infer_s: float = 0.0
    outcome: Outcome | None = None
    """None until it is classified; the error of a bad image."""
    failure: Exception | None = None
    """A fault of ours."""


@dataclass(frozen=True, eq=False)
class _Finished:
    """Holds what a call gets: a value, or an error that no other call gets."""

    batch: ImageBatch
    value: Any = None
    error: Exception | None = None


class Workers:
    """Owns the fair queue and the threads that empty it."""

    def __init__(
        self,
        count: int,
        max_batch: int,
        max_queue: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._metrics = metrics
        self._clock = clock
        self._queue = queue = FairQueue()
        metrics.queue_depth.set_function(lambda: queue.waiting)
        self._decode_s: dict[str, Estimate] = {}
        """Seconds that an image takes to be decoded, by tenant."""
        self._free = 0
        self._closed = False
        # Guards all of the above; held for microseconds, never while computing.
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"infer-{n}", daemon=True)
            for n in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, batch: ImageBatch) -> None:
        """Queues a batch; its `answer` gets what its `finish` returns.

        With a free worker it is always taken. Raises Exhausted (QUEUE_FULL) when its images
        find no room or would hardly be done by their deadline. Where another model holds more of
        a full queue than its share, its newest batch gets that error in the place of this one.
        """
        count = len(batch.images)
        shed: list[ImageBatch] = []
        with self._changed:
            now = self._clock()
            batch.image_s = batch.backbone.infer_s.at(now) + self._decoding(batch.tenant).at(now)
            expected_s = self._expected_s(batch)
            is_one_free = self._free > self._queue.waiting
            if not is_one_free and expected_s > _HOPEFUL * (batch.deadline - batch.arrived):
                raise _refusal(
                    f"the images would be done after {expected_s:.1f} s, later than their "
                    "deadline allows: try again later or allow more time",
                    expected_s,
                )
            try:
                while self._queue.waiting + count > self._max_queue:
                    other = self._queue.batch_to_shed(batch.model, count)
                    if other is None:
                        raise _refusal(self._full(count), expected_s)
                    self._queue.withdraw(other)
                    shed.append(other)
                self._queue.put(batch)
                if self._free:
                    self._changed.notify(min(self._free, count))
            finally:
                # Also when this one is refused after all: they left the queue, and would wait.
                for other in shed:
                    if not other.answer.done():
                        other.answer.set_exception(_refusal(self._full(count), expected_s))

    def withdraw(self, batch: ImageBatch) -> None:
        """Takes a batch's images out of the queue: nobody waits for them."""
        with self._changed:
            self._queue.withdraw(batch)

    def close(self) -> None:
        """Ends the threads; waits for the batches that they compute."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _decoding(self, tenant: str) -> Estimate:
        found = self._decode_s.get(tenant)
        if found is None:
            found = self._decode_s[tenant] = Estimate(_DECODE_S)
        return found

    def _expected_s(self, batch: ImageBatch) -> float:
        own_s = batch.image_s * len(batch.images)
        return (self._queue.queued_ahead_s(batch) + own_s) / self._count

    def _full(self, count: int) -> str:
        return (
            f"{self._queue.waiting} images wait to be classified, and {count} more would pass "
            f"the bound of {self._max_queue}: try again later"
        )

    def _work(self) -> None:
        carried: Item | None = None
        while (first := carried or self._first()) is not None:
            rows, pixels, carried = self._decode(first)
            self._infer(rows, pixels)
            finished = self._finish(rows)
            if not finished:
                continue
            try:
                first[0].answer.get_loop().call_soon_threadsafe(deliver, finished)
            except RuntimeError:  # the loop is closed: nobody is left to answer
                return

    def _first(self) -> Item | None:
        """Waits for an image; None once the workers are closed and none waits."""
        with self._changed:
            self._free += 1
            try:
                while (item := self._queue.pop(self._clock())) is None:
                    if self._closed:
                        return None
                    self._changed.wait()
            finally:
                self._free -= 1
            return item

    def _decode(self, first: Item) -> tuple[list[_Row], list[Pixels], Item | None]:
        """Decodes a batch that begins with this image, taking others of its backbone.

        Returns its rows, the pixels of those that are no errors, and an image that was taken
        and would hold these up: the first of the next batch.
        """
        backbone = first[0].backbone
        # A fair part of what waits: the others will soon be free for theirs.
        share = 1 + backbone.waiting // self._count
        most = min(share, self._max_batch, backbone.session.max_batch)
        begun = self._clock()
        rows: list[_Row] = []
        pixels: list[Pixels] = []
        taken = 0
        item: Item | None = first
        while item is not None:
            taken += 1
            row = self._decode_one(item, pixels)
            item = None
            with self._changed:
                now = self._clock()
                if row is not None:
                    rows.append(row)
                    self._account(row, now)
                spent_s = now - begun + backbone.infer_s.at(now) * (len(pixels) + 1)
                # What waits for a worker that is free already is left to it.
                if taken < most and spent_s < _BATCH_S and self._queue.waiting > self._free:
                    item = self._queue.pop(now, backbone)
            # A header is read in microseconds.
            if item and rows and spent_s + _PIXEL_S * _size(item) > _BATCH_S:
                break
        return rows, pixels, item

    def _decode_one(self, item: Item, pixels: list[Pixels]) -> _Row | None:
        batch, place = item
        # It may have been withdrawn since this image left the queue.
        if batch.is_withdrawn:
            return None
        begun = self._clock()
        row = _Row(batch, place, begun - batch.arrived)
        try:
            pixels.append(batch.images[place](batch.decoding))
        except GraftError as error:
            row.outcome = error
        except Exception as error:
            row.failure = error
        row.decode_s = self._clock() - begun
        return row

    def _account(self, row: _Row, now: float) -> None:
        batch = row.batch
        self._decoding(batch.tenant).add(row.decode_s, now)
        spent_s = row.decode_s + batch.backbone.infer_s.at(now)
        self._queue.charge(batch.tenant, spent_s - batch.image_s)

    def _infer(self, rows: list[_Row], pixels: list[Pixels]) -> None:
        """Classifies the rows that are no errors, whose pixels are given in their order."""
        good = [row for row in rows if row.outcome is None and row.failure is None]
        if not good:
            return
        backbone = good[0].batch.backbone
        active = self._count - self._free + min(self._free, self._queue.waiting)
        cores = max(1, self._count // active)
        begun = self._clock()
        try:
            # Without a copy where there is one image alone.
            images = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
            features = backbone.session.run(images, cores)
            now = self._clock()
            for row, outcome in zip(
                good, apply_heads([row.batch for row in good], features), strict=True
            ):
                row.outcome = outcome
                row.infer_s = now - begun
        except Exception as error:
            for row in good:
                row.failure = error
            return
        self._metrics.batch_size.observe(len(good))
        with self._changed:
            backbone.infer_s.add((now - begun) * cores / len(good), now)

    def _finish(self, rows: list[_Row]) -> list[_Finished]:
        """Notes the rows' outcomes; returns the calls that have all of theirs, or failed."""
        finished: dict[ImageBatch, _Finished] = {}
        whole: list[ImageBatch] = []
        with self._changed:
            for row in rows:
                batch = row.batch
                if row.failure is not None:
                    # One that this call alone gets, lest the tracebacks of several grow together.
                    error = RuntimeError(f"a batch of images failed: {row.failure}")
                    error.__cause__ = row.failure
                    finished[batch] = _Finished(batch, error=error)
                    self._queue.withdraw(batch)
                    continue
                assert row.outcome is not None
                batch.outcomes[row.place] = row.outcome
                if isinstance(row.outcome, Classified):
                    batch.decode_s.append(row.decode_s)
                    batch.queue_s.append(row.queue_s)
                    batch.infer_s.append(row.infer_s)
                if len(batch.outcomes) == len(batch.images) and not batch.is_withdrawn:
                    whole.append(batch)
        for batch in whole:
            begun = self._clock()
            try:
                finished[batch] = _Finished(batch, value=batch.finish(batch.in_order))
            except Exception as error:
                finished[batch] = _Finished(batch, error=error)
            with self._changed:
                self._queue.charge(batch.tenant, self._clock() - begun)
        return list(finished.values())


def apply_heads(batches: Sequence[ImageBatch], features: Floats) -> list[Classified]:
    """Classifies features float32 [n, d], each row by the head and decision of its batch."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, batch in enumerate(batches):
        rows.setdefault((id(batch.head), id(batch.decision)), []).append(row)
    found: dict[int, Classified] = {}
    for own in rows.values():
        head, decision = batches[own[0]].head, batches[own[0]].decision
        mine = features[own]
        logs = head.log_probabilities(mine)
        scores: list[float] | list[None] = [None] * len(own)
        if head.outliers is not None:
            scores = head.outliers.scores(mine, logs).tolist()
        probabilities = np.exp(logs)
        answers = head.decide(probabilities, decision).tolist()
        # A copy of the features, so that an answer that is kept keeps no batch.
        for row, each, score, answer in zip(own, probabilities, scores, answers, strict=True):
            found[row] = Classified(
                each,
                features[row, : head.feature_dim].copy(),
                head.classes,
                answer,
                score,
                head.is_calibrated,
            )
    return [found[row] for row in range(len(batches))]


def deliver(finished: Sequence[_Finished]) -> None:
    """Gives each call its answer; on the event loop."""
    for each in finished:
        answer = each.batch.answer
        if answer.done():
            continue
        if each.error is not None:
            answer.set_exception(each.error)
        else:
            answer.set_result(each.value)


def _size(item: Item) -> int:
    batch, place = item
    image = batch.images[place]
    return image.pixels if isinstance(image, Encoded) else 0


def _refusal(message: str, expected_s: float) -> Exhausted:
    low, high = _RETRY_S
    retry_after_s = min(max(expected_s, low), high)
    return Exhausted(Reason.QUEUE_FULL, message, retry_after_s=retry_after_s)
