"""What training reads is what serving reads, whatever a file says of itself."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.domain import DEFAULT_DECODING
from service.engine import preprocess
from service.errors import InvalidInput, Reason
from service.ingest.packs import Location
from trainer.data import Files, open_again
from trainer.images import Cache


def written(path: Path, orientation: int, kind: str) -> Files:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, kind, exif=exif, lossless=True)
    return files(path)


def files(path: Path) -> Files:
    return Files((Location(path),), (hashlib.sha256(path.read_bytes()).hexdigest(),))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_training_and_serving_turn_an_image_the_same_way(
    tmp_path: Path, orientation: int, kind: str
) -> None:
    of = written(tmp_path / "image", orientation, kind)
    data = of.locations[0].path.read_bytes()
    served = preprocess.decode(data)
    np.testing.assert_array_equal(of.decode(threads=1)[0], served)
    learned = Cache(of, 2**20)
    kept = learned.image(0)
    learned.close()
    np.testing.assert_array_equal(kept, np.asarray(preprocess.open_image(data)))
    assert kept.shape == ((80, 60, 3) if orientation >= 5 else (60, 80, 3))


def test_an_image_that_became_a_link_or_a_pipe_is_not_read(tmp_path: Path) -> None:
    of = written(tmp_path / "image", 1, "PNG")
    (at,), (digest,) = of.locations, of.digests
    path = at.path
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    for _ in range(2):
        with pytest.raises(InvalidInput) as caught:
            open_again(at, digest, DEFAULT_DECODING)
        assert caught.value.reason is Reason.DATASET_UNUSABLE
        path.unlink()
        os.mkfifo(path)
