"""Images for the training loop: augmented ones to learn from, served ones to judge by.

Each image is decoded once, scaled down to what a crop needs and kept: in
memory as far as a bound goes, beyond that in a file without a name, which ends
with the process. Which crop an image gets depends on the seed, the epoch and
its place alone, not on threads. The next batches are made while one is learned.
"""

import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from service.inference.preprocess import Pixels
from trainer import memory
from trainer.crops import random_view
from trainer.data import Files, Ints, open_again

CACHE_BYTES = 2 * 2**30
"""The most that one cache keeps in memory."""
_PART = 0.25
"""Of the memory that the process may use, for all caches together."""
KEPT_SIDE = 288
"""Of the shorter side of a kept image, pixels: most crops are scaled down still."""
_AHEAD = 2
_EVALUATION_BATCH = 32


class Cache:
    """Decoded images uint8 [height, width, 3] by their place. Safe from any thread."""

    def __init__(self, files: Files, memory_bytes: int, folder: Path | None = None) -> None:
        self._files = files
        self._free = memory_bytes
        self._kept: dict[int, Pixels] = {}
        self._written: dict[int, tuple[int, tuple[int, ...]]] = {}
        # Deleted already: not even a killed process leaves it behind.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` closes it
        self._end = 0
        self._lock = threading.Lock()

    def image(self, place: int) -> Pixels:
        """One image, its shorter side at most `KEPT_SIDE`; errors as `open_again`."""
        if (known := self._kept.get(place)) is not None:
            return known
        if (at := self._written.get(place)) is not None:
            offset, shape = at
            data = os.pread(self._file.fileno(), int(np.prod(shape)), offset)
            return np.frombuffer(data, dtype=np.uint8).reshape(shape)
        files = self._files
        pixels = _compact(open_again(files.paths[place], files.digests[place], files.decoding))
        with self._lock:
            has_room = self._free >= pixels.nbytes
            offset = self._end
            if has_room:
                self._free -= pixels.nbytes
            else:
                self._end += pixels.nbytes
        if has_room:
            self._kept[place] = pixels
        elif self._wrote(pixels, offset):
            self._written[place] = offset, pixels.shape
        return pixels

    def close(self) -> None:
        """Gives the space back."""
        self._kept.clear()
        self._file.close()

    def _wrote(self, pixels: Pixels, offset: int) -> bool:
        try:
            return os.pwrite(self._file.fileno(), pixels.data, offset) == pixels.nbytes
        except OSError:
            # A full disk: the image is decoded each time, which is slow and right.
            return False


class Images:
    """Images to learn from, as batches: RandomResizedCrop and a horizontal flip.

    `caches` is how many share the memory, this one among them.
    """

    def __init__(
        self, files: Files, seed: int, threads: int, folder: Path | None = None, caches: int = 1
    ) -> None:
        self._count = len(files)
        self._size = files.decoding.size
        self._seed = seed % 2**64
        self._cache = Cache(files, _share_bytes(caches), folder)
        self._pool = ThreadPoolExecutor(
            threads or len(os.sched_getaffinity(0)), thread_name_prefix="augment"
        )

    def batches(
        self, epoch: int, size: int, steps: int | None = None
    ) -> Iterator[tuple[torch.Tensor, Ints]]:
        """Images uint8 [n, size, size, 3] in a new order, and their places int64 [n].

        One pass, or so many whole batches as `steps` says, going round as often as
        that takes. A last batch of one image is left out: BatchNorm learns
        nothing from it.
        """
        order = self._order(epoch, self._count if steps is None else steps * size)
        waiting: deque[tuple[list[Future[Pixels]], Ints]] = deque()
        for start in _starts(len(order), size):
            places = order[start : start + size]
            futures = [
                self._pool.submit(self._augmented, int(place), epoch, (start + i) // self._count)
                for i, place in enumerate(places)
            ]
            waiting.append((futures, places))
            if len(waiting) > _AHEAD:
                yield _collected(*waiting.popleft())
        while waiting:
            yield _collected(*waiting.popleft())

    def steps(self, size: int) -> int:
        """How many batches one pass has."""
        return len(_starts(self._count, size))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._cache.close()

    def _order(self, epoch: int, count: int) -> Ints:
        rng = np.random.default_rng([self._seed, epoch])
        rounds = -(-count // self._count)
        return np.concatenate([rng.permutation(self._count) for _ in range(rounds)])[:count]

    def _augmented(self, place: int, epoch: int, turn: int) -> Pixels:
        image = Image.fromarray(self._cache.image(place))
        rng = np.random.default_rng([self._seed, epoch, place, turn])
        return random_view(image, self._size, rng)


class AsServed:
    """Images to judge by, with the very pixels that serving makes; `caches` as `Images`."""

    def __init__(self, files: Files, threads: int, caches: int = 1) -> None:
        self._files, self._threads = files, threads
        is_small = len(files) * files.decoding.size**2 * 3 <= _share_bytes(caches)
        self._pixels = files.decode(threads=threads) if is_small else None

    def batches(self, size: int) -> Iterator[Pixels]:
        """uint8 [n, size, size, 3], in order."""
        for start in range(0, len(self._files), size):
            end = min(start + size, len(self._files))
            if self._pixels is not None:
                yield self._pixels[start:end]
            else:
                yield self._files.decode(range(start, end), self._threads)

    def outputs(self, network: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """Computes what a network makes of them in 32 bits, as served; lies on the CPU."""
        network.to(device).eval()
        with torch.inference_mode():
            parts = [
                network(torch.from_numpy(shown).to(device)).cpu()
                for shown in self.batches(_EVALUATION_BATCH)
            ]
        return torch.cat(parts)


def _share_bytes(caches: int) -> int:
    return min(CACHE_BYTES, int(memory.usable_bytes() * _PART) // caches)


def _compact(image: Image.Image) -> Pixels:
    scale = KEPT_SIDE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def _starts(count: int, size: int) -> list[int]:
    return [start for start in range(0, count, size) if count - start > 1 or count == 1]


def _collected(futures: list[Future[Pixels]], places: Ints) -> tuple[torch.Tensor, Ints]:
    return torch.from_numpy(np.stack([future.result() for future in futures])), places
