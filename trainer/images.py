"""Images for the training loop: augmented ones to learn from, served ones to judge by.

Each image is decoded once, scaled down to what a crop needs and kept. Which crop an
image gets depends on the seed, the epoch and its place alone, not on threads. The next
batches are made while one is learned.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from service.engine.preprocess import Pixels
from service.ops.cpus import available_cores
from trainer import device_views
from trainer.arrays import Ints
from trainer.crops import Views, cropped_and_mirrored, random_view
from trainer.data import Files, open_again
from trainer.device_views import Asked
from trainer.kept import Kept, memory_share

KEPT_PART = 9 / 7
"""Of the shorter side of a kept image over the side of a view: most crops are scaled down still."""
LONGEST = 4
"""Limit on the longer side of a kept image over the shorter one, or over the side that this is
scaled to: a few kilobytes may be an image that is 100,000 times as long as high."""
_AHEAD = 2
_EVALUATION_BATCH = 32

_View = Pixels | Asked


class Inputs(Protocol):
    """What a network learns from, as batches: `Images`, or `maps.Maps`."""

    def prepare(self, on_done: Callable[[float], None]) -> None:
        """Does what comes before the first batch, if it was not done yet."""

    def batches(
        self, epoch: int, size: int, steps: int | None = None
    ) -> Iterator[tuple[torch.Tensor, Ints]]:
        """Makes the batches of an epoch, with the places of their images."""

    def steps(self, size: int) -> int:
        """Counts the batches of one pass."""

    def blank(self, size: int) -> torch.Tensor:
        """Returns a batch of nothing, to measure a step by."""


class Judged(Protocol):
    """What a network is measured on, as served: `AsServed`, or `maps.Maps`."""

    def prepare(self, on_done: Callable[[float], None]) -> None:
        """As `Inputs.prepare`."""

    def outputs(self, network: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """Computes what a network makes of all of them; lies on the CPU."""


class Cache:
    """Decoded images uint8 [height, width, 3] by their place. Safe from any thread."""

    def __init__(self, files: Files, memory_bytes: int, folder: Path | None = None) -> None:
        self._files = files
        self._kept = Kept(memory_bytes, folder)

    def image(self, place: int) -> Pixels:
        """Returns an image no larger than crops need; errors as `open_again`."""
        if (known := self._kept.get(place)) is not None:
            return known
        files = self._files
        image = open_again(files.locations[place], files.digests[place], files.decoding)
        side = round(KEPT_PART * files.decoding.size)
        kept = compact(image, side, is_squeezed=files.decoding.framing == "whole")
        pixels = np.asarray(kept, dtype=np.uint8)
        self._kept.put(place, pixels)
        return pixels

    def close(self) -> None:
        """Gives the space back."""
        self._kept.close()


class Images:
    """Images to learn from, as batches of random views.

    `caches` is how many share the memory, this one among them. On a GPU plain views are made
    there; others, and all on the CPU, by Pillow in threads.
    """

    def __init__(
        self,
        files: Files,
        drawn: Views,
        seed: int,
        threads: int,
        folder: Path | None = None,
        caches: int = 1,
        device: str = "cpu",
    ) -> None:
        self._count = len(files)
        self._on_device = device_views.make(device, drawn, files.decoding.size)
        self._decoding = files.decoding
        self._drawn = drawn
        self._seed = seed % 2**64
        self._cache = Cache(files, memory_share(caches), folder)
        self._pool = ThreadPoolExecutor(threads or available_cores(), thread_name_prefix="augment")

    def prepare(self, on_done: Callable[[float], None]) -> None:
        """Does nothing: images are decoded when their turn comes."""

    def batches(
        self, epoch: int, size: int, steps: int | None = None
    ) -> Iterator[tuple[torch.Tensor, Ints]]:
        """Images uint8 [n, size, size, 3] in a new order, and their places int64 [n].

        One pass, or so many whole batches as `steps` says, going round as often as
        that takes. A last batch of one image is left out: BatchNorm learns
        nothing from it.
        """
        order = self._order(epoch, self._count if steps is None else steps * size)
        waiting: deque[tuple[list[Future[_View]], Ints]] = deque()
        for start in starts(len(order), size):
            places = order[start : start + size]
            futures = [
                self._pool.submit(self._view, int(place), epoch, (start + i) // self._count)
                for i, place in enumerate(places)
            ]
            waiting.append((futures, places))
            if len(waiting) > _AHEAD:
                yield self._collected(*waiting.popleft())
        while waiting:
            yield self._collected(*waiting.popleft())

    def steps(self, size: int) -> int:
        """How many batches one pass has."""
        return len(starts(self._count, size))

    def blank(self, size: int) -> torch.Tensor:
        """Returns a batch of nothing, to measure a step by."""
        side = self._decoding.size
        return torch.zeros(size, side, side, 3, dtype=torch.uint8)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._cache.close()

    def _order(self, epoch: int, count: int) -> Ints:
        rng = np.random.default_rng([self._seed, epoch])
        rounds = -(-count // self._count)
        return np.concatenate([rng.permutation(self._count) for _ in range(rounds)])[:count]

    def _view(self, place: int, epoch: int, turn: int) -> "_View":
        """Makes a view uint8 [size, size, 3], or says which one the device is to make."""
        rng = np.random.default_rng([self._seed, epoch, place, turn])
        if self._on_device is None:
            image = Image.fromarray(self._cache.image(place))
            return random_view(image, self._decoding, self._drawn, rng)
        pixels = None if self._on_device.has(place) else self._cache.image(place)
        height, width = self._on_device.shape(place) if pixels is None else pixels.shape[:2]
        box, is_mirrored = cropped_and_mirrored(width, height, self._decoding, self._drawn, rng)
        return Asked(place, pixels, box, is_mirrored)

    def _collected(self, futures: "list[Future[_View]]", places: Ints) -> tuple[torch.Tensor, Ints]:
        views = [future.result() for future in futures]
        if self._on_device is not None:
            asked = [view for view in views if isinstance(view, Asked)]
            return self._on_device.views(asked), places
        pixels = [view for view in views if not isinstance(view, Asked)]
        return torch.from_numpy(np.stack(pixels)), places


class AsServed:
    """Images to judge by, with the very pixels that serving makes; `caches` as `Images`."""

    def __init__(self, files: Files, threads: int, caches: int = 1) -> None:
        self._files, self._threads = files, threads
        self._is_small = len(files) * files.decoding.size**2 * 3 <= memory_share(caches)
        self._pixels: Pixels | None = None

    def prepare(self, on_done: Callable[[float], None] = lambda _: None) -> None:  # noqa: ARG002
        """Decodes them, where they are few enough to be kept."""
        if self._is_small and self._pixels is None:
            self._pixels = self._files.decode(threads=self._threads)

    def batches(self, size: int) -> Iterator[Pixels]:
        """uint8 [n, size, size, 3], in order."""
        for start in range(0, len(self._files), size):
            end = min(start + size, len(self._files))
            if self._pixels is not None:
                yield self._pixels[start:end]
            else:
                yield self._files.decode(range(start, end), self._threads)

    def close(self) -> None:
        """Gives the space back."""
        self._pixels = None

    def outputs(self, network: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """Computes what a network makes of them as served, in fp32; lies on the CPU."""
        network.to(device).eval()
        with torch.inference_mode():
            parts = [
                network(torch.from_numpy(shown).to(device))
                for shown in self.batches(_EVALUATION_BATCH)
            ]
        return torch.cat(parts).cpu()


def compact(image: Image.Image, side: int, *, is_squeezed: bool) -> Image.Image:
    """Scales an image down to a shorter side of `side` pixels, where it is larger.

    Of a longer one than LONGEST says, the middle is kept, in which lies what is served; where
    images are squeezed into a square to be served, its longer side is squeezed.
    """
    if not is_squeezed:
        most = LONGEST * min(image.size)
        width, height = min(image.width, most), min(image.height, most)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
    scale = min(1.0, side / min(image.size))
    most = LONGEST * side
    size = (min(most, round(image.width * scale)), min(most, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def starts(count: int, size: int) -> list[int]:
    """Returns where batches begin: a last one of one image is left out, unless it is alone."""
    return [start for start in range(0, count, size) if count - start > 1 or count == 1]
