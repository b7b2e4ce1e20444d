"""The file of an index: written and read an image at a time, however many it has."""

import hashlib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from service.domain import ClassCount, LeftOutFile, LeftOutReason
from service.ingest import index as indexes
from service.ingest.index import Index, IndexedImage

MANY = 40_000


def image(number: int) -> IndexedImage:
    return IndexedImage(
        f"{number:06d}/photo.jpg", f"class {number % 7}", "",
        hashlib.sha256(b"%d" % number).hexdigest(), pack="a" * 64, offset=1024 * number,
        size=1000, look=f"{number:016x}",
    )  # fmt: skip


def index_of(images: list[IndexedImage]) -> Index:
    left_out = indexes.summarise(0, [LeftOutFile("x", "", LeftOutReason.HIDDEN, "hidden")])
    header = indexes.describe(
        images, is_labelled=True, case_sensitive=False, bit_depth=0, left_out=left_out
    )
    return msgspec.structs.replace(header, images=images)


def test_an_index_is_read_as_it_was_written_and_named_by_its_bytes(tmp_path: Path) -> None:
    index = index_of([image(number) for number in range(9)])
    digest = indexes.save(index, tmp_path / "index")
    assert digest == hashlib.sha256((tmp_path / "index").read_bytes()).hexdigest()
    assert indexes.load(tmp_path / "index") == index
    assert indexes.load_header(tmp_path / "index") == msgspec.structs.replace(index, images=[])
    assert list(indexes.iterate(tmp_path / "index")) == index.images
    # Written from a stream, it is the same.
    header = msgspec.structs.replace(index, images=[])
    assert indexes.save(header, tmp_path / "again", iter(index.images)) == digest


@pytest.mark.parametrize("cut", [0, 5, -3])
def test_a_damaged_index_is_told(tmp_path: Path, cut: int) -> None:
    indexes.save(index_of([image(1)]), tmp_path / "index")
    (tmp_path / "index").write_bytes((tmp_path / "index").read_bytes()[:cut])
    with pytest.raises(msgspec.DecodeError):
        indexes.load(tmp_path / "index")


def test_of_an_erased_image_only_what_the_digest_is_made_of_is_kept(tmp_path: Path) -> None:
    images = [image(number) for number in range(9)]
    grouped = msgspec.structs.replace(images[0], group="patient 1", part="test")
    gone = grouped.erased()
    assert (gone.name, gone.look, gone.pack, gone.offset, gone.size) == ("", "", "", 0, 0)
    assert (gone.label, gone.part, gone.digest, gone.group) == (
        grouped.label, "test", grouped.digest, "patient 1",
    )  # fmt: skip
    before = index_of([grouped, *images[1:]])
    after = index_of([gone, *images[1:]])
    assert after.digest == before.digest == indexes.digest_of([gone, *images[1:]], is_labelled=True)
    assert (after.summary.used, after.erased_count, after.size_bytes) == (8, 1, 8000)
    assert (after.summary.seen, before.summary.seen) == (9, 10)
    assert before.classes[0] == ClassCount("class 0", 1, 0, 1)
    assert after.classes[0] == ClassCount("class 0", 1, 0, 0)


def test_the_packs_of_an_index_are_those_that_hold_an_image(tmp_path: Path) -> None:
    images = [msgspec.structs.replace(image(n), pack=name * 64) for n, name in enumerate("bab")]
    assert index_of(images).packs == ["b" * 64, "a" * 64]
    images[1] = images[1].erased()
    assert index_of(images).packs == ["b" * 64]


def test_a_large_index_is_written_counted_and_read_without_its_images_in_memory(
    tmp_path: Path,
) -> None:
    header, path = index_of([image(0)]), tmp_path / "index"

    def images() -> Iterator[IndexedImage]:
        return map(image, range(MANY))

    tracemalloc.start()
    try:
        indexes.save(msgspec.structs.replace(header, images=[]), path, images())
        count = sum(1 for _ in indexes.iterate(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == MANY
    assert path.stat().st_size > 8 * 2**20
    assert peak < 2**20
