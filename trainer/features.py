"""Computes the features of image files: each that no cache knows is read, decoded and run.

One worker a core does all of it, a few files at a time, so that no more than a few
images lie in memory as pixels; a run has one core to itself, which is the fastest
way to many images. Where a GPU computes, the workers decode, and one thread runs large
batches. The backbone is loaded when the first image needs it.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from service.contract import Progressed
from service.domain import DEFAULT_DECODING, Framing, ImageDecoding, Precision
from service.engine import preprocess
from service.engine.feature_cache import FeatureCache
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.runtime import Session
from service.ops import failpoints
from service.ops.cpus import available_cores
from trainer.ahead import ahead
from trainer.crops import Views, random_view
from trainer.data import Files, open_again
from trainer.pace import Pace
from trainer.records import Send

T = TypeVar("T")

BATCH = 8
"""Images that a worker takes at a time."""
RUN = 2
"""Images of a run: what they are on the way through the network still fits a core's cache."""
GPU_BATCH = 128
"""The same on a GPU, which these fill, about."""
_AHEAD = 64
"""Decoded images that a worker may hold while the backbone is being loaded."""
_PROGRESS_S = 0.1
_BLOCKS = "blocks"
"""The key of a row that says how many features each block has; no image's."""


class Source(Protocol):
    """What makes features: a backbone that need not be in memory yet."""

    @property
    def space(self) -> str:
        """Names what computes, down to the last bit; empty while that is not known."""

    @property
    def precision(self) -> Precision:
        """What it computes in."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many features each of its blocks has, the last layer's first."""

    @property
    def is_gpu(self) -> bool:
        """True if a GPU computes."""

    def load(self) -> Session:
        """Loads it; blocks."""


class Features:
    """What a backbone makes of images; remembers it, and keeps it in `cache` between jobs.

    May be used by one thread at a time.
    """

    def __init__(
        self,
        source: Source,
        cache: FeatureCache | None = None,
        threads: int = 0,
        send: Send = lambda _: None,
    ) -> None:
        self._source = source
        self._cache = cache
        self._workers = threads or available_cores()
        self._send = send
        self._rows: dict[str, Floats] = {}
        self._blocks: tuple[int, ...] = ()
        self._session: Future[Session] | None = None
        self._lock = threading.Lock()
        self._progress = _Progress(0, "", send)
        self._seconds = 0.0
        self.computed = 0
        """How many images and views went through the backbone; the others were kept."""

    @property
    def session(self) -> Session:
        """The backbone's session, loaded now if it was not needed yet."""
        return self._loading().result()

    @property
    def precision(self) -> Precision:
        """What the backbone computes in."""
        return self._source.precision

    @property
    def images_per_second(self) -> float:
        """So far, whether computed or kept."""
        return len(self._rows) / self._seconds if self._seconds else 0.0

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many features each block has, the last layer's first."""
        if not self._blocks:
            # Kept beside the features: to read them out of the file takes a third of a second.
            if not self._missing([_BLOCKS]):
                self._blocks = tuple(self._rows[_BLOCKS].astype(int).tolist())
            else:
                self._blocks = self._source.blocks
                if self._cache is not None:
                    row = {_BLOCKS: np.array(self._blocks, np.float32)}
                    self._cache.put(self._source.space, row)
        return self._blocks

    def of(self, files: Files, detail: str = "images", framings: Sequence[Framing] = ()) -> Floats:
        """The last layer's features float32 [n, d], which images are compared by; as `all_of`."""
        return self.all_of(files, detail, framings)[:, : self.blocks[0]]

    def all_of(
        self, files: Files, detail: str = "images", framings: Sequence[Framing] = ()
    ) -> Floats:
        """All features float32 [n, d] of images that were examined, here or elsewhere.

        Those of further `framings` are computed by the way and remembered, since an image is
        decoded once for all of them. Raises InvalidInput (DATASET_UNUSABLE) when a file is gone or
        was changed.
        """
        places = dict(zip(files.digests, files.locations, strict=True))
        own = files.decoding
        decodings = [own, *(msgspec.structs.replace(own, framing=each) for each in framings)]
        keys = {digest: [_key(digest, each) for each in decodings] for digest in places}
        missing = self._missing([key for each in keys.values() for key in each])

        def prepare(chunk: Sequence[str]) -> list[tuple[str, Pixels]]:
            made = []
            for digest in chunk:
                image = open_again(places[digest], digest, own)
                for key, decoding in zip(keys[digest], decodings, strict=True):
                    if key in missing:
                        made.append((key, preprocess.fit(image, decoding)))
            return made

        lacking = [digest for digest, each in keys.items() if not missing.isdisjoint(each)]
        self._compute(lacking, prepare, detail, max(1, BATCH // len(decodings)))
        return self._stacked([keys[digest][0] for digest in files.digests])

    def of_views(self, files: Files, count: int, seed: int, drawn: Views) -> Floats:
        """All features float32 [count, n, d] of random views.

        Which view an image gets follows from its content, the seed and the view's
        number alone. Errors as `of`.
        """
        places = dict(zip(files.digests, files.locations, strict=True))
        decoding = files.decoding
        keys = {
            digest: [f"{_key(digest, decoding)} {seed} {i} {drawn.key}" for i in range(count)]
            for digest in places
        }
        missing = self._missing([key for views in keys.values() for key in views])

        def prepare(chunk: Sequence[str]) -> list[tuple[str, Pixels]]:
            made = []
            for digest in chunk:
                image = open_again(places[digest], digest, decoding)
                for i, key in enumerate(keys[digest]):
                    if key in missing:
                        rng = np.random.default_rng([seed % 2**64, i, int(digest[:16], 16)])
                        made.append((key, random_view(image, decoding, drawn, rng)))
            return made

        lacking = [digest for digest, views in keys.items() if not missing.isdisjoint(views)]
        self._compute(lacking, prepare, "augmented views", max(1, BATCH // count))
        return np.stack(
            [self._stacked([keys[digest][i] for digest in files.digests]) for i in range(count)]
        )

    def of_probes(self, images: Pixels, name: str) -> Floats:
        """All features float32 [n, d] of pixels, which `name` tells from other images."""
        keys = [f"{name} {number}" for number in range(len(images))]
        missing = self._missing(keys)

        def prepare(chunk: Sequence[int]) -> list[tuple[str, Pixels]]:
            return [(keys[number], images[number]) for number in chunk]

        numbers = range(len(images))
        self._compute([n for n in numbers if keys[n] in missing], prepare, "probe images")
        return self._stacked(keys)

    def _missing(self, keys: Sequence[str]) -> set[str]:
        """Those that neither this object nor the cache knows; takes over what the cache has."""
        unknown = [key for key in keys if key not in self._rows]
        if unknown and self._cache is not None and self._source.space:
            self._rows.update(self._cache.get(self._source.space, unknown))
        return {key for key in unknown if key not in self._rows}

    def _stacked(self, keys: Sequence[str]) -> Floats:
        return np.stack([self._rows[key] for key in keys])

    def _compute(
        self,
        items: Sequence[T],
        prepare: Callable[[Sequence[T]], list[tuple[str, Pixels]]],
        detail: str,
        at_most: int = BATCH,
    ) -> None:
        """Runs what `prepare` makes of the items, some at a time, decoded by one worker a core."""
        if not items:
            return
        started = time.monotonic()
        self._progress = _Progress(len(items), detail, self._send)
        size = min(at_most, -(-len(items) // self._workers))
        chunks = (items[start : start + size] for start in range(0, len(items), size))
        with ThreadPoolExecutor(self._workers, thread_name_prefix="features") as pool:
            if self._source.is_gpu:
                self._feed_gpu(pool, chunks, prepare)
            else:
                every = [pool.submit(self._work, chunks, prepare) for _ in range(self._workers)]
                for worker in every:
                    worker.result()
        self._progress.end()
        failpoints.reach("trainer.features")
        self._seconds += time.monotonic() - started

    def _feed_gpu(
        self,
        pool: ThreadPoolExecutor,
        chunks: Iterable[Sequence[T]],
        prepare: Callable[[Sequence[T]], list[tuple[str, Pixels]]],
    ) -> None:
        """Runs batches of GPU_BATCH in this thread, while the pool decodes for the next ones."""
        self._loading()

        def prepared(chunk: Sequence[T]) -> tuple[int, list[tuple[str, Pixels]]]:
            return len(chunk), prepare(chunk)

        waiting: list[tuple[str, Pixels]] = []
        most = self._workers + 2 * GPU_BATCH // BATCH
        with closing(ahead(pool, prepared, chunks, most)) as decoded:
            for count, images in decoded:
                waiting += images
                while len(waiting) >= GPU_BATCH:
                    self._run(waiting[:GPU_BATCH], GPU_BATCH)
                    del waiting[:GPU_BATCH]
                self._progress.add(count)
        self._run(waiting, GPU_BATCH)

    def _work(
        self,
        chunks: "Generator[Sequence[T], None, None]",
        prepare: Callable[[Sequence[T]], list[tuple[str, Pixels]]],
    ) -> None:
        waiting: list[tuple[str, Pixels]] = []
        try:
            while (chunk := self._next(chunks)) is not None:
                waiting += prepare(chunk)
                if waiting and (self._loading().done() or len(waiting) >= _AHEAD):
                    self._run(waiting)
                    waiting = []
                self._progress.add(len(chunk))
            self._run(waiting)
        except BaseException:
            # One failure is the job's: the other workers need not go on.
            with self._lock:
                chunks.close()
            raise

    def _next(self, chunks: "Generator[Sequence[T], None, None]") -> Sequence[T] | None:
        with self._lock:
            return next(chunks, None)

    def _run(self, images: Sequence[tuple[str, Pixels]], size: int = RUN) -> None:
        """Runs `size` images at a time, and keeps what several runs made at once."""
        most = max(size, BATCH)
        for start in range(0, len(images), most):
            rows: dict[str, Floats] = {}
            for at in range(start, min(start + most, len(images)), size):
                batch = images[at : min(at + size, start + most)]
                features = self.session.run(np.stack([pixels for _, pixels in batch]), cores=1)
                rows |= {key: row for (key, _), row in zip(batch, features, strict=True)}
            with self._lock:
                self._rows |= rows
                self.computed += len(rows)
            if self._cache is not None:
                self._cache.put(self._source.space, rows)

    def _loading(self) -> "Future[Session]":
        with self._lock:
            if self._session is None:
                self._session = Future()
                threading.Thread(target=self._load_now, args=(self._session,)).start()
            return self._session

    def _load_now(self, session: "Future[Session]") -> None:
        try:
            session.set_result(self._source.load())
        except BaseException as error:
            session.set_exception(error)
            return
        # A look into a large file, while the first images are run; whoever asks for them hears
        # what goes wrong.
        with suppress(Exception):
            _ = self._source.blocks


def _key(digest: str, decoding: ImageDecoding) -> str:
    """Names an image's pixels: the same file decoded in another way is another image."""
    # The size is the backbone's, and so is the key's space.
    named = [digest]
    default = DEFAULT_DECODING
    if (decoding.background, decoding.bit_depth) != (default.background, default.bit_depth):
        named += [decoding.background, str(decoding.bit_depth)]
    if decoding.framing != default.framing:
        named.append(decoding.framing)
    return " ".join(named)


class _Progress:
    """Told at most every tenth of a second, and at the end. Safe from any thread."""

    def __init__(self, total: int, detail: str, send: Send) -> None:
        self._total = total
        self._detail = detail
        self._send = send
        self._done = 0
        self._told = time.monotonic()
        self._pace = Pace()
        self._lock = threading.Lock()

    def add(self, done: int) -> None:
        with self._lock:
            self._done += done
            self._pace.reached(self._done)
            now = time.monotonic()
            if now - self._told < _PROGRESS_S or self._done >= self._total:
                return
            self._told = now
            self._send(
                Progressed(
                    "features",
                    self._done / self._total,
                    self._detail,
                    step=self._done,
                    steps=self._total,
                    remaining_s=self._pace.remaining_s(self._total - self._done),
                )
            )

    def end(self) -> None:
        self._send(
            Progressed("features", 1.0, self._detail, self._total, self._total, remaining_s=0.0)
        )
