"""The threads that compute: each decodes a batch, runs its backbone, and parts at the heads.

As many as the machine has cores, and nothing else computes, so that decoding
and inference never fight for a core. A worker that is alone gives its run all
cores; the more are busy, the fewer cores a run gets, down to one: the answer to
a lone caller is as fast as it can be, and under load no run waits for another's
threads. Idle-first: an image that finds a free worker is run at once, with no
waiting window; what arrives while all are busy forms the next batches. Images
whose caller left or whose deadline passed leave before they cost anything.
Stops with `close`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine.fair_queue import Backbone, Call, Classified, FairQueue, Item, Outcome
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.errors import Exhausted, Expired, GraftError, Reason
from service.ops.metrics import Metrics

log = logging.getLogger(__name__)

_NEW = 0.1
"""Weight of the newest batch in the running mean of an image's cost."""
_HOPEFUL = 0.8
"""Part of a call's time that it may be expected to wait; what is expected is not exact."""
_RETRY_S = (0.1, 30.0)

Ended = Callable[[Call], None]
"""Told on the event loop when a call has all its outcomes; its future is done."""


@dataclass(frozen=True, eq=False)
class _Ran:
    """A batch that was computed, or failed as a whole."""

    items: list[Item]
    outcomes: list[Outcome]
    decode_s: list[float]
    queue_s: list[float]
    infer_s: float
    error: Exception | None = None


class Workers:
    """A fair queue and the threads that empty it."""

    def __init__(self, count: int, max_batch: int, max_queue: int, metrics: Metrics) -> None:
        self._count = count
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._metrics = metrics
        self._queue = queue = FairQueue()
        metrics.queue_depth.set_function(lambda: queue.waiting)
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

    def put(self, call: Call) -> None:
        """Queues a call's images; its `answer` gets the outcomes.

        Raises Exhausted (QUEUE_FULL) when they find no room or would hardly be
        done by their deadline. Where another model holds more of a full queue
        than its share, its newest call gets that error in the place of this one.
        """
        count = len(call.images)
        displaced: list[Call] = []
        with self._changed:
            expected_s = self._expected_s(call)
            if expected_s > _HOPEFUL * (call.deadline - call.arrived):
                raise _refusal(
                    f"the images would be done after {expected_s:.1f} s, later than their "
                    "deadline allows: try again later or allow more time",
                    expected_s,
                )
            try:
                while self._queue.waiting + count > self._max_queue:
                    other = self._queue.newest_of_longest(call.model, count)
                    if other is None:
                        raise _refusal(self._full(count), expected_s)
                    self._queue.leave(other)
                    displaced.append(other)
                self._queue.put(call)
                if self._free:
                    self._changed.notify(min(self._free, count))
            finally:
                # Also when this one is refused after all: they left the queue, and would wait.
                for other in displaced:
                    if not other.answer.done():
                        other.answer.set_exception(_refusal(self._full(count), expected_s))

    def leave(self, call: Call) -> None:
        """Takes a call's waiting images out: nobody waits for them."""
        with self._changed:
            self._queue.leave(call)

    def close(self) -> None:
        """Ends the threads; waits for the batches that they compute."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _expected_s(self, call: Call) -> float:
        # A queue that is soon done is not worth a look at each model's share.
        own_s = len(call.images) * call.image_s
        expected_s = self._queue.backlog_s + own_s
        if expected_s > self._count * _HOPEFUL * (call.deadline - call.arrived):
            expected_s = self._queue.ahead_s(call.model, len(call.images)) + own_s
        return expected_s / self._count

    def _full(self, count: int) -> str:
        return (
            f"{self._queue.waiting} images wait to be classified, and {count} more would pass "
            f"the bound of {self._max_queue}: try again later"
        )

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            items, late, cores = taken
            call = (items[0] if items else (late[0], 0))[0]
            loop = call.answer.get_loop()
            ran = self._run(items, cores) if items else None
            finished = self._finish(ran) if ran else []
            try:
                loop.call_soon_threadsafe(self._hand_back, ran, late, finished)
            except RuntimeError:  # the loop is closed: nobody is left to answer
                return

    def _take(self) -> tuple[list[Item], list[Call], int] | None:
        with self._changed:
            self._free += 1
            while True:
                items, late = self._queue.take(self._most, time.monotonic())
                if items or late:
                    self._free -= 1
                    active = self._count - self._free + min(self._free, self._queue.waiting)
                    return items, late, max(1, self._count // active)
                if self._closed:
                    return None
                self._changed.wait()

    def _most(self, backbone: Backbone) -> int:
        # Spread over those who are free, so that one call with many uses all.
        share = -(-backbone.waiting // self._free)
        return min(share, self._max_batch, backbone.session.max_batch)

    def _run(self, items: list[Item], cores: int) -> _Ran:
        started = time.monotonic()
        backbone = items[0][0].backbone
        outcomes: list[Outcome | None] = []
        pixels: list[Pixels] = []
        decode_s: list[float] = []
        before = started
        infer_s = 0.0
        queue_s = [started - call.arrived for call, _ in items]
        try:
            for call, place in items:
                try:
                    pixels.append(call.images[place](call.decoding))
                    outcomes.append(None)
                except GraftError as error:
                    outcomes.append(error)
                after = time.monotonic()
                decode_s.append(after - before)
                before = after
            if pixels:
                batch = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
                features = backbone.session.run(batch, cores)
                infer_s = time.monotonic() - before
                good = [n for n, outcome in enumerate(outcomes) if outcome is None]
                classified = _part([items[n][0] for n in good], features)
                for n, outcome in zip(good, classified, strict=True):
                    outcomes[n] = outcome
        except Exception as error:
            return _Ran(items, [], decode_s, queue_s, infer_s, error)
        spent_s = (time.monotonic() - started) * min(cores, self._count) / len(items)
        backbone.image_s += _NEW * (spent_s - backbone.image_s)
        whole = [outcome for outcome in outcomes if outcome is not None]
        return _Ran(items, whole, decode_s, queue_s, infer_s)

    def _finish(self, ran: _Ran) -> list[tuple[Call, Any, Exception | None]]:
        """Notes a batch's outcomes; returns the calls that have all of theirs, each finished."""
        if ran.error is not None:
            return []
        whole = []
        with self._changed:
            for n, (call, place) in enumerate(ran.items):
                call.outcomes[place] = ran.outcomes[n]
                if isinstance(ran.outcomes[n], Classified):
                    call.decode_s.append(ran.decode_s[n])
                    call.queue_s.append(ran.queue_s[n])
                    call.infer_s.append(ran.infer_s)
                if len(call.outcomes) == len(call.images):
                    whole.append(call)
        finished: list[tuple[Call, Any, Exception | None]] = []
        for call in whole:
            try:
                finished.append((call, call.finish(call.in_order), None))
            except Exception as error:
                finished.append((call, None, error))
        return finished

    def _hand_back(
        self,
        ran: _Ran | None,
        late: list[Call],
        finished: list[tuple[Call, Any, Exception | None]],
    ) -> None:
        """On the event loop: gives each call what is its own."""
        for call in late:
            if not call.answer.done():
                call.answer.set_exception(
                    Expired(
                        Reason.DEADLINE_EXCEEDED,
                        "the deadline passed while the images waited: allow more time or send "
                        "fewer at once",
                    )
                )
        if ran is None:
            return
        if ran.error is not None:
            for call, _ in ran.items:
                if not call.answer.done():
                    call.answer.set_exception(ran.error)
                    self.leave(call)
            return
        self._metrics.batch_size.observe(len(ran.items))
        for call, value, error in finished:
            if call.answer.done():
                continue
            if error is not None:
                call.answer.set_exception(error)
            else:
                call.answer.set_result(value)


def _part(calls: Sequence[Call], features: Floats) -> list[Classified]:
    """From features float32 [n, d] and each row's call to what each row is, by the call's head."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, call in enumerate(calls):
        rows.setdefault((id(call.head), id(call.decision)), []).append(row)
    parted: list[Classified | None] = [None] * len(calls)
    for own in rows.values():
        head, decision = calls[own[0]].head, calls[own[0]].decision
        mine = features[own]
        said = head.log_probabilities(mine)
        scores: list[float] | list[None] = [None] * len(own)
        if head.outliers is not None:
            scores = head.outliers.scores(mine, said).tolist()
        shares = np.exp(said)
        answers = head.decide(shares, decision).tolist()
        # A copy of the features, so that an answer that is kept keeps no batch.
        for row, probabilities, score, answer in zip(own, shares, scores, answers, strict=True):
            parted[row] = Classified(
                probabilities,
                features[row, : head.feature_dim].copy(),
                head.classes,
                answer,
                score,
                head.is_calibrated,
            )
    return [classified for classified in parted if classified is not None]


def _refusal(message: str, expected_s: float) -> Exhausted:
    low, high = _RETRY_S
    retry_after_s = min(max(expected_s, low), high)
    return Exhausted(Reason.QUEUE_FULL, message, retry_after_s=retry_after_s)
