"""Photos to measure with where none are given: they come with scikit-learn, without any network.

Its two sample photographs, cut into pieces at seeded places and written as JPEG
files of a usual photo's size: `china/` and `flower/`. Real photographs, so that
decoding costs what it costs; too few of them for an accuracy to mean anything.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

_SIZE = (500, 375)
_QUALITY = 95


def write(folder: Path, per_class: int = 40) -> Path:
    """Writes the folder, the same one every time; returns it."""
    random = np.random.default_rng(0)
    images = resources.files("sklearn.datasets") / "images"
    for label in ("china", "flower"):
        (folder / label).mkdir(parents=True)
        with resources.as_file(images / f"{label}.jpg") as file:
            photo = Image.open(file).convert("RGB")
        for number in range(per_class):
            left = int(random.integers(photo.width - _SIZE[0] + 1))
            top = int(random.integers(photo.height - _SIZE[1] + 1))
            piece = photo.crop((left, top, left + _SIZE[0], top + _SIZE[1]))
            piece.save(folder / label / f"{number:03}.jpg", quality=_QUALITY)
    return folder


@contextlib.contextmanager
def given_or_written(folder: Path | None) -> Iterator[Path]:
    """The given folder, or a temporary one with the photographs above."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as temporary:
        yield write(Path(temporary) / "photos")


def photos(folder: Path, most: int = 64) -> list[bytes]:
    """Reads the folder's JPEG files, up to `most`."""
    found = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:most]]
    if not found:
        raise SystemExit(f"{folder} holds no .jpg files")
    return found
