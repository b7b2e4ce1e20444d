"""Random crops of images, as seen by whatever learns from them; without torch."""

import numpy as np
from PIL import Image

from service.inference.preprocess import Pixels

_SCALE, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


def describe() -> dict[str, float | int | str]:
    """Says what `random_view` draws from, as `preprocess.describe`."""
    scale, ratio = [f"{low:g} to {high:g}" for low, high in (_SCALE, _RATIO)]
    return {"scale": scale, "ratio": ratio, "tries": _TRIES, "mirrored": 0.5}


def random_view(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """A random crop, scaled to uint8 [size, size, 3]; every second one is mirrored."""
    left, top, width, height = random_crop(image.width, image.height, rng)
    box = (left, top, left + width, top + height)
    small = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(small, dtype=np.uint8)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


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
    # A very long image: the middle, as near to the ratios as it allows.
    w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h
