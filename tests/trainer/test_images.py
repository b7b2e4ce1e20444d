"""Images to learn from: the same whatever keeps them, decoded once."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from service.domain import Framing, ImageDecoding
from service.engine import preprocess
from service.engine.preprocess import Pixels
from service.errors import InvalidInput, Reason
from service.ingest.packs import Location
from tests.trainer.conftest import MakeFolder
from trainer import data, kept, memory
from trainer.crops import Views
from trainer.data import Files
from trainer.images import AsServed, Cache, Images


def files_of(folder: Path) -> Files:
    paths = tuple(sorted(folder.rglob("*.png")))
    return Files(
        tuple(map(Location, paths)),
        tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths),
    )


def all_batches(made: Images, epoch: int, size: int) -> list[tuple[torch.Tensor, list[int]]]:
    return [(pixels, places.tolist()) for pixels, places in made.batches(epoch, size)]


@pytest.mark.parametrize("memory_bytes", [0, 10_000, 2**30], ids=["file", "both", "memory"])
def test_a_kept_image_is_the_one_that_was_decoded(
    make_folder: MakeFolder, tmp_path: Path, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(make_folder(per_class=3))
    cache = Cache(files, memory_bytes, tmp_path)
    decoded: Counter[bytes] = Counter()
    real = preprocess.open_image

    def counted(content: bytes, decoding: ImageDecoding) -> Image.Image:
        decoded[content] += 1
        return real(content, decoding)

    monkeypatch.setattr(preprocess, "open_image", counted)
    first = [cache.image(place).copy() for place in range(6)]
    again = [cache.image(place) for place in range(6)]
    for pixels, later, at in zip(first, again, files.locations, strict=True):
        exact = np.asarray(Image.open(at.path))
        assert (pixels == exact).all()
        assert (later == exact).all()
    assert set(decoded.values()) == {1}
    # The file has no name: a kill leaves nothing behind.
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []
    cache.close()


def test_a_disk_that_is_full_costs_time_alone(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(make_folder(per_class=1))
    cache = Cache(files, 0, tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.kept.os.pwrite", full)
    for _ in range(2):
        assert (cache.image(0) == np.asarray(Image.open(files.locations[0].path))).all()
    cache.close()


@pytest.mark.parametrize("change", ["deleted", "overwritten"])
def test_an_image_that_is_not_what_it_was_is_named(make_folder: MakeFolder, change: str) -> None:
    files = files_of(make_folder(per_class=1))
    first, other = (at.path for at in files.locations)
    if change == "deleted":
        first.unlink()
    else:
        first.write_bytes(other.read_bytes())
    cache = Cache(files, 2**30)
    with pytest.raises(InvalidInput, match=f"{first.name} is not the image any more") as caught:
        cache.image(0)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    cache.close()


def test_all_caches_together_keep_a_quarter_of_the_memory_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "usable_bytes", lambda: 2**32)
    assert [kept.memory_share(kinds) for kinds in (1, 2, 4)] == [2**30, 2**29, 2**28]
    monkeypatch.setattr(memory, "usable_bytes", lambda: 2**40)
    assert kept.memory_share(4) == kept.MEMORY_BYTES


def test_large_images_are_kept_no_larger_than_crops_need(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 900), (10, 200, 30)).save(tmp_path / "wide.png")
    cache = Cache(files_of(tmp_path), 2**30)
    image = cache.image(0)
    assert image.shape == (288, 384, 3)
    assert (image == (10, 200, 30)).all()
    cache.close()
    # A larger network's views are larger, too.
    larger = replace(files_of(tmp_path), decoding=ImageDecoding(size=260))
    cache = Cache(larger, 2**30)
    assert cache.image(0).shape == (334, 445, 3)
    cache.close()


@pytest.mark.parametrize(
    ("framing", "size", "shape"),
    [
        # The middle is kept, whether it is scaled down or not.
        ("crop", (20_000, 300), (288, 1152, 3)),
        ("crop", (300, 20_000), (1152, 288, 3)),
        ("crop", (5000, 10), (10, 40, 3)),
        ("crop", (1150, 300), (288, 1104, 3)),
        # All of it is.
        ("whole", (20_000, 300), (288, 1152, 3)),
        ("whole", (5000, 10), (10, 1152, 3)),
    ],
)
def test_a_long_image_takes_no_more_than_a_few_others(
    framing: Framing, size: tuple[int, int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    # Grey from one end to the other.
    width, height = size
    ramp = np.linspace(0, 255, max(size)).round().astype(np.uint8)
    pixels = np.broadcast_to(ramp if width > height else ramp[:, None], (height, width))
    Image.fromarray(pixels).save(tmp_path / "long.png")
    files = replace(files_of(tmp_path), decoding=ImageDecoding(framing=framing))
    cache = Cache(files, 2**30)
    image = cache.image(0)
    cache.close()
    assert image.shape == shape
    short = image[..., 0] if width > height else image[..., 0].T
    ends = short[:, 0].mean(), short[:, -1].mean()
    part = 1.0 if framing == "whole" else min(1.0, 4 * min(size) / max(size))
    assert ends == pytest.approx((127.5 * (1 - part), 127.5 * (1 + part)), abs=3)


@pytest.mark.parametrize("limit", ["constant", "free space"])
def test_what_is_beyond_the_files_limit_is_decoded_again(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    files = files_of(make_folder(side=40, per_class=3))
    room = 2 * 40 * 40 * 3
    if limit == "constant":
        monkeypatch.setattr(kept, "FILE_BYTES", room)
    else:
        monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * room))
    cache = Cache(files, 0, tmp_path)
    for _ in range(2):
        for place, path in enumerate(at.path for at in files.locations):
            assert (cache.image(place) == np.asarray(Image.open(path))).all()
    assert [cache._kept.get(place) is not None for place in range(6)] == [True] * 2 + [False] * 4
    cache.close()


def test_crops_depend_on_seed_and_epoch_and_not_on_threads_or_where_images_are_kept(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(make_folder(per_class=4))

    def made(seed: int, epoch: int, threads: int) -> list[tuple[Pixels, list[int]]]:
        source = Images(files, Views(), seed, threads)
        try:
            # An epoch before must not matter.
            all_batches(source, epoch + 7, 3)
            return [(pixels.numpy(), places) for pixels, places in all_batches(source, epoch, 3)]
        finally:
            source.close()

    first = made(0, 1, 1)
    monkeypatch.setattr(kept, "MEMORY_BYTES", 0)
    second = made(0, 1, 3)
    assert [places for _, places in first] == [places for _, places in second]
    assert all((a == b).all() for (a, _), (b, _) in zip(first, second, strict=True))
    for other in (made(1, 1, 1), made(0, 2, 1)):
        assert not all((a == b).all() for (a, _), (b, _) in zip(first, other, strict=True))


@pytest.mark.parametrize(("size", "steps"), [(3, 3), (7, 1), (4, 2), (8, 1), (100, 1)])
def test_one_pass_shows_each_image_once_and_no_batch_of_one(
    make_folder: MakeFolder, size: int, steps: int
) -> None:
    source = Images(files_of(make_folder(per_class=4)), Views(), 0, 1)
    batches = all_batches(source, 1, size)
    source.close()
    assert len(batches) == steps == source.steps(size)
    places = [place for _, own in batches for place in own]
    assert len(set(places)) == len(places)
    assert len(places) == (7 if size == 7 else 8)
    assert all(pixels.shape == (len(own), 224, 224, 3) for pixels, own in batches)


def test_whole_batches_go_round_as_often_as_it_takes(make_folder: MakeFolder) -> None:
    source = Images(files_of(make_folder(per_class=2)), Views(), 0, 2)
    batches = [(p.numpy(), places.tolist()) for p, places in source.batches(1, 3, 4)]
    source.close()
    assert [len(places) for _, places in batches] == [3, 3, 3, 3]
    shown = Counter(place for _, places in batches for place in places)
    assert shown == Counter(dict.fromkeys(range(4), 3))
    # Each time in another crop.
    of_first = [p[places.index(0)] for p, places in batches if 0 in places]
    assert len({crop.tobytes() for crop in of_first}) == 3


def test_images_to_judge_by_are_those_that_serving_makes(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = data.load(make_folder(side=300, per_class=2)).train
    exact = np.stack([preprocess.decode(at.path.read_bytes()) for at in part.locations])
    judged = AsServed(part, 1)
    judged.prepare()
    once = np.concatenate(list(judged.batches(3)))
    monkeypatch.setattr(kept, "MEMORY_BYTES", 0)
    made_each_time = np.concatenate(list(AsServed(part, 1).batches(3)))
    assert (once == exact).all()
    assert (made_each_time == exact).all()
