"""Views that a device makes are Pillow's, to a level or so; the device is the CPU here."""

import numpy as np
import pytest
import torch

from service.contract import Augmentation
from service.engine.preprocess import Pixels
from tests.trainer.conftest import MakeFolder
from trainer import compute, crops, data, device_views, images
from trainer.crops import Views
from trainer.device_views import Asked, DeviceViews
from trainer.images import Images

CPU = torch.device("cpu")
BIG = 2**30


def inner_difference(found: Pixels, expected: Pixels, edge: int) -> np.ndarray:
    """Without the edges, where Pillow looks at the image beyond the crop."""
    inner = (..., slice(edge, -edge), slice(edge, -edge), slice(None))
    return np.abs(found[inner].astype(int) - expected[inner].astype(int))


def drawn_images(files: data.Files, drawn: Views) -> list[tuple[Pixels, list[int]]]:
    made = Images(files, drawn, 3, 2)
    try:
        return [(p.numpy().copy(), places.tolist()) for p, places in made.batches(1, 3)]
    finally:
        made.close()


@pytest.mark.parametrize("memory_bytes", [BIG, 0], ids=["kept", "no memory"])
def test_the_same_views_are_drawn_as_on_the_cpu(
    make_folder: MakeFolder, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = data.load(make_folder(per_class=4)).train
    drawn = Views()
    expected = drawn_images(files, drawn)
    monkeypatch.setattr(
        device_views, "make", lambda _d, _v, size: DeviceViews(CPU, size, memory_bytes)
    )
    found = drawn_images(files, drawn)
    assert [places for _, places in found] == [places for _, places in expected]
    for (own, _), (wanted, _) in zip(found, expected, strict=True):
        assert own.dtype == np.uint8
        assert own.shape == wanted.shape
        # So small are the images that a pixel of one is several of a view.
        assert inner_difference(own, wanted, 12).max() <= 2


@pytest.mark.parametrize("is_mirrored", [False, True])
@pytest.mark.parametrize("shape", [(288, 384), (700, 288), (60, 90)])
def test_a_noisy_image_is_scaled_as_pillow_does(shape: tuple[int, int], is_mirrored: bool) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = images.Image.fromarray(pixels)
    left, top, width, height = crops.random_crop(shape[1], shape[0], rng, 0.4)
    expected = image.resize(
        (224, 224), images.Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    wanted = np.asarray(expected)
    if is_mirrored:
        wanted = wanted[:, ::-1]
    views = DeviceViews(CPU, 224, BIG)
    asked = Asked(0, pixels, (left, top, width, height), is_mirrored)
    difference = inner_difference(views.views([asked]).numpy()[0], wanted, 4)
    assert difference.max() <= 2
    assert difference.mean() < 0.5


def test_an_image_is_brought_once_where_there_is_room() -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    views = DeviceViews(CPU, 8, memory_bytes=pixels.nbytes)
    box = (0, 0, 20, 10)
    views.views([Asked(0, pixels, box, False), Asked(1, pixels, box, False)])
    assert (views.has(0), views.has(1), views.shape(0)) == (True, False, (10, 20))
    assert views.views([Asked(0, None, box, True)]).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "asked",
    [
        Augmentation(rotation_degrees=5),
        Augmentation(colour=0.1),
        Augmentation(trivial_augment=True),
    ],
)
def test_what_pillow_alone_does_stays_on_the_cpu(
    asked: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (BIG, BIG))
    assert device_views.make("auto", crops.views(asked, 0.4), 224) is None
    assert device_views.make("auto", crops.views(None, 0.4), 224) is not None
    monkeypatch.setattr(compute, "choose_device", lambda _: CPU)
    assert device_views.make("cpu", crops.views(None, 0.4), 224) is None
