"""Batches of augmented pictures for the training loop.

Pictures are kept decoded as far as a bound on memory goes, the others are
decoded each time. Which crop a picture gets depends on the seed, the epoch and
its place alone, not on threads. The next batches are made while one is learned.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from service.inference import preprocess
from service.inference.preprocess import SIZE, Pixels
from trainer.data import Part

_CACHE_BYTES = 2 * 2**30
_AHEAD = 2
_SCALE, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


class Pictures:
    """The training part, as batches: RandomResizedCrop 224 and a horizontal flip."""

    def __init__(self, part: Part, seed: int, threads: int) -> None:
        self._part = part
        self._seed = seed
        self._pool = ThreadPoolExecutor(
            threads or len(os.sched_getaffinity(0)), thread_name_prefix="augment"
        )
        self._cache: dict[int, Pixels] = {}
        self._cached_bytes = 0

    def batches(self, epoch: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One pass in a new order: uint8 [n, 224, 224, 3] and int64 [n].

        A last batch of one picture is left out: BatchNorm learns nothing from it.
        """
        rng = np.random.default_rng([self._seed % 2**64, epoch])
        order = rng.permutation(len(self._part))
        waiting: deque[tuple[list[Future[Pixels]], torch.Tensor]] = deque()
        starts = [s for s in range(0, len(order), size) if len(order) - s > 1 or len(order) == 1]
        for start in starts:
            places = order[start : start + size]
            futures = [self._pool.submit(self._augmented, int(i), epoch) for i in places]
            waiting.append((futures, torch.from_numpy(self._part.targets[places])))
            if len(waiting) > _AHEAD:
                yield _collected(*waiting.popleft())
        while waiting:
            yield _collected(*waiting.popleft())

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _augmented(self, place: int, epoch: int) -> Pixels:
        picture = Image.fromarray(self._decoded(place))
        rng = np.random.default_rng([self._seed % 2**64, epoch, place])
        left, top, width, height = random_crop(picture.width, picture.height, rng)
        box = (left, top, left + width, top + height)
        small = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(small, dtype=np.uint8)
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    def _decoded(self, place: int) -> Pixels:
        if (known := self._cache.get(place)) is not None:
            return known
        path: Path = self._part.paths[place]
        pixels = np.asarray(preprocess.open_picture(path.read_bytes()), dtype=np.uint8)
        # A race adds a picture twice to the count at worst, which errs on the safe side.
        if self._cached_bytes + pixels.nbytes <= _CACHE_BYTES:
            self._cached_bytes += pixels.nbytes
            self._cache[place] = pixels
        return pixels


def random_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop, pixels.

    8 % to 100 % of the area, sides 3:4 to 4:3 (Szegedy et al. 2015). Drawn from
    a generator of its own: torchvision's draws from the one that threads share.
    """
    area = width * height
    for _ in range(_TRIES):
        cut = area * rng.uniform(*_SCALE)
        ratio = np.exp(rng.uniform(*np.log(_RATIO)))
        w, h = round(np.sqrt(cut * ratio)), round(np.sqrt(cut / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # A very long picture: the middle, as near to the ratios as it allows.
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def _collected(
    futures: list[Future[Pixels]], targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.stack([future.result() for future in futures])), targets
