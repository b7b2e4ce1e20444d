"""Threads that compute: each decodes a batch, runs its backbones once, applies all heads.

As many as the machine has cores, so that decoding and inference never fight for a core. A
worker that is alone gives its run all cores; the more are busy, the fewer cores a run gets, down
to one: the answer to a lone caller is as fast as it can be, and under load no run waits for
another's threads. An image that finds a free worker is run at once, with no waiting window.

A batch is put together while it is decoded: before each image a worker asks the queue whose
turn it is now. So an image whose caller left, or whose deadline passed, costs nothing, and a
batch ends once it has taken `BATCH_S`: who arrives meanwhile waits for no longer than that and
the one image that was begun. Stops with `close`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.domain import Decision, ImageDecoding
from service.engine.fair_queue import (
    Backbone,
    Classified,
    Decode,
    Estimate,
    FairQueue,
    ImageBatch,
    Item,
    Outcome,
)
from service.engine.head import Floats, Head
from service.engine.preprocess import Encoded, Pixels, SentImage
from service.engine.recent_features import Known, RecentFeatures
from service.errors import Exhausted, GraftError, Reason
from service.ops.metrics import Metrics

BATCH_S = 0.025
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
    """An image that left the queue, for the batch that a worker puts together."""

    batch: ImageBatch
    place: int
    digest: bytes | None = None
    """None where its features are not kept."""
    queue_s: float = 0.0
    pixels: dict[ImageDecoding, Pixels] = field(default_factory=dict)
    decode_s: float = 0.0
    features: dict[int, Floats] = field(default_factory=dict)
    """float32 [d] by run."""
    infer_s: dict[int, float] = field(default_factory=dict)
    """By run."""
    outcomes: Sequence[Outcome] = ()
    """One for each model, once it is classified; the error of a bad image."""
    failure: Exception | None = None
    """A fault of ours."""

    @property
    def image(self) -> Decode:
        """Returns the image as it came."""
        return self.batch.images[self.place]

    @property
    def is_open(self) -> bool:
        """Whether it is still to be classified."""
        return not self.outcomes and self.failure is None

    @property
    def to_run(self) -> list[int]:
        """Returns the runs that nothing has made yet."""
        if not self.is_open:
            return []
        return [number for number in range(len(self.batch.runs)) if number not in self.features]

    def to_run_s(self, now: float) -> float:
        """Estimates the seconds of one core that these take."""
        runs = self.batch.runs
        return sum(runs[number].backbone.infer_s.at(now) for number in self.to_run)

    @property
    def to_decode_s(self) -> float:
        """Estimates the seconds that its decoding takes, if it is large."""
        image = self.image
        # A header is read in microseconds.
        return _PIXEL_S * image.pixels if self.to_run and isinstance(image, Encoded) else 0.0

    def known(self, digest: bytes, number: int) -> Known:
        """Names the features of one of its runs."""
        backbone, decoding = self.batch.runs[number]
        return Known(digest, decoding, backbone.digest)


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
        recent: RecentFeatures | None = None,
    ) -> None:
        self._recent = recent
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
            decodings = len({run.decoding for run in batch.runs})
            decode_s = self._decoding(batch.tenant).at(now) * decodings
            batch.image_s = batch.runs_s(now) + decode_s
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
        carried: _Row | None = None
        while (first := carried or self._first()) is not None:
            rows, carried = self._decode(first)
            self._infer(rows)
            finished = self._finish(rows)
            if not finished:
                continue
            try:
                first.batch.answer.get_loop().call_soon_threadsafe(deliver, finished)
            except RuntimeError:  # the loop is closed: nobody is left to answer
                return

    def _first(self) -> _Row | None:
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
        return self._row(item)

    def _row(self, item: Item) -> _Row:
        """Makes the row of an image that left the queue, with the features that are known of it."""
        row = _Row(*item)
        image = row.image
        if self._recent is None or not isinstance(image, SentImage):
            return row
        begun = self._clock()
        with _failing(row):
            row.digest = digest = image.digest
            for number in range(len(row.batch.runs)):
                found = self._recent.get(row.batch.tenant, row.known(digest, number))
                if found is not None:
                    row.features[number] = found
        row.decode_s = self._clock() - begun
        return row

    def _decode(self, first: _Row) -> tuple[list[_Row], _Row | None]:
        """Decodes a batch that begins with this image, taking others of its backbone.

        Returns its rows, and one that was taken and would hold these up: the first of the next
        batch.
        """
        backbone = first.batch.backbone
        # A fair part of what waits: the others will soon be free for theirs.
        share = 1 + backbone.waiting // self._count
        most = min(share, self._max_batch, backbone.session.max_batch)
        begun = self._clock()
        rows: list[_Row] = []
        taken = 0
        row: _Row | None = first
        while row is not None:
            taken += 1
            item: Item | None = None
            # It may have been withdrawn since this image left the queue.
            is_wanted = not row.batch.is_withdrawn
            if is_wanted:
                self._decode_one(row)
            with self._changed:
                now = self._clock()
                if is_wanted:
                    rows.append(row)
                    self._account(row, now)
                runs_s = sum(each.to_run_s(now) for each in rows)
                spent_s = now - begun + runs_s + backbone.infer_s.at(now)
                # What waits for a worker that is free already is left to it.
                if taken < most and spent_s < BATCH_S and self._queue.waiting > self._free:
                    item = self._queue.pop(now, backbone)
            row = None if item is None else self._row(item)
            if row is not None and rows and spent_s + row.to_decode_s > BATCH_S:
                break
        return rows, row

    def _decode_one(self, row: _Row) -> None:
        batch, image, begun = row.batch, row.image, self._clock()
        row.queue_s = begun - row.decode_s - batch.arrived
        with _failing(row):
            for number in row.to_run:
                decoding = batch.runs[number].decoding
                if decoding not in row.pixels:
                    row.pixels[decoding] = image(decoding)
        if isinstance(image, SentImage):
            image.drop()
        row.decode_s += self._clock() - begun

    def _account(self, row: _Row, now: float) -> None:
        batch = row.batch
        # One whose features were known says nothing of the next.
        if row.pixels or row.outcomes:
            self._decoding(batch.tenant).add(row.decode_s / max(1, len(row.pixels)), now)
        self._queue.charge(batch.tenant, row.decode_s + row.to_run_s(now) - batch.image_s)

    def _infer(self, rows: list[_Row]) -> None:
        """Classifies the rows that are not errors."""
        wanted: dict[Backbone, list[tuple[_Row, int]]] = {}
        for row in rows:
            for number in row.to_run:
                wanted.setdefault(row.batch.runs[number].backbone, []).append((row, number))
        for backbone, all_of_it in wanted.items():
            most = min(self._max_batch, backbone.session.max_batch)
            for start in range(0, len(all_of_it), most):
                # Others may have failed or been left while the runs before went on.
                some = [
                    (row, number)
                    for row, number in all_of_it[start : start + most]
                    if row.is_open and not row.batch.is_withdrawn
                ]
                if some:
                    self._run(backbone, some)
        self._apply([row for row in rows if row.is_open and not row.batch.is_withdrawn])

    def _run(self, backbone: Backbone, wanted: list[tuple[_Row, int]]) -> None:
        """Runs a backbone once, for these images and runs of their calls."""
        active = self._count - self._free + min(self._free, self._queue.waiting)
        cores = max(1, self._count // active)
        begun = self._clock()
        try:
            pixels = [row.pixels[row.batch.runs[number].decoding] for row, number in wanted]
            # Without a copy where there is one image alone.
            images = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
            features = backbone.session.run(images, cores)
        except Exception as error:
            for row, _ in wanted:
                row.failure = error
            return
        now = self._clock()
        for (row, number), own in zip(wanted, features, strict=True):
            # A copy, so that an answer that is kept keeps no batch; NumPy's own would hand the
            # interpreter to another thread.
            row.features[number] = copied = np.frombuffer(own.tobytes(), own.dtype)
            row.infer_s[number] = now - begun
            if self._recent is not None and row.digest is not None:
                self._recent.put(row.batch.tenant, row.known(row.digest, number), copied)
        self._metrics.batch_size.observe(len(wanted))
        with self._changed:
            backbone.infer_s.add((now - begun) * cores / len(wanted), now)

    def _apply(self, rows: list[_Row]) -> None:
        """Applies the heads of each row's call to its features."""
        begun = self._clock()
        try:
            _apply_heads(rows)
        except Exception as error:
            for row in rows:
                row.failure = error
        heads = sum(len(row.batch.asked) for row in rows)
        with self._changed:
            spent_s = self._clock() - begun
            for row in rows:
                tenant, own = row.batch.tenant, len(row.batch.asked)
                self._queue.charge(tenant, spent_s * own / heads)

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
                if batch.is_withdrawn:
                    continue
                batch.outcomes[row.place] = row.outcomes
                if isinstance(row.outcomes[0], Classified):
                    if row.pixels:
                        batch.decode_s.append(row.decode_s)
                    batch.queue_s.append(row.queue_s)
                    for number, infer_s in row.infer_s.items():
                        batch.infer_s[number].append(infer_s)
                if len(batch.outcomes) == len(batch.images):
                    whole.append(batch)
        for batch in whole:
            begun = self._clock()
            try:
                finished[batch] = _Finished(batch, value=batch.finish(batch.by_model))
            except Exception as error:
                finished[batch] = _Finished(batch, error=error)
            with self._changed:
                self._queue.charge(batch.tenant, self._clock() - begun)
        return list(finished.values())


def _apply_heads(rows: Sequence[_Row]) -> None:
    """Sets the outcomes of rows; those that share a head, a decision and a backbone go together."""
    groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for at, row in enumerate(rows):
        for place, (run, head, decision) in enumerate(row.batch.asked):
            key = id(head), id(decision), id(row.batch.runs[run].backbone)
            groups.setdefault(key, []).append((at, place))
    outcomes: list[dict[int, Outcome]] = [{} for _ in rows]
    for own in groups.values():
        at, place = own[0]
        _, head, decision = rows[at].batch.asked[place]
        features = [rows[at].features[rows[at].batch.asked[place].run] for at, place in own]
        answers = _classify(head, decision, features)
        for (at, place), answer in zip(own, answers, strict=True):
            outcomes[at][place] = answer
    for row, found in zip(rows, outcomes, strict=True):
        row.outcomes = [found[place] for place in range(len(found))]


def _classify(
    head: Head, decision: Decision | None, features: Sequence[Floats]
) -> Iterator[Classified]:
    """Classifies images by their features, float32 [d] each."""
    together = features[0][None] if len(features) == 1 else np.stack(features)
    logs = head.log_probabilities(together)
    scores: list[float] | list[None] = [None] * len(features)
    if head.outliers is not None:
        scores = head.outliers.scores(together, logs).tolist()
    probabilities = np.exp(logs)
    answers = head.decide(probabilities, decision).tolist()
    for own, each, score, answer in zip(features, probabilities, scores, answers, strict=True):
        yield Classified(
            each, own[: head.feature_dim], head.classes, answer, score, head.is_calibrated
        )


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


@contextmanager
def _failing(row: _Row) -> Iterator[None]:
    """Makes what is raised inside the error of an image, or a fault of ours."""
    try:
        yield
    except GraftError as error:
        row.outcomes = [error] * len(row.batch.asked)
    except Exception as error:
        row.failure = error


def _refusal(message: str, expected_s: float) -> Exhausted:
    low, high = _RETRY_S
    retry_after_s = min(max(expected_s, low), high)
    return Exhausted(Reason.QUEUE_FULL, message, retry_after_s=retry_after_s)
