"""Indexes that are made of others, by names, classes and erasure; and images that are added."""

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from service.domain import ClassCount, LeftOut, LeftOutFile, LeftOutReason, PartName
from service.errors import InvalidInput, NotFound, Reason
from service.ingest import edits, packs, reader
from service.ingest import index as indexes
from service.ingest.edits import Edited, Repacked
from service.ingest.folder import read_plain
from service.ingest.index import Index, IndexedImage
from service.ingest.packs import Location
from service.ingest.reader import INDEX_FILE, PACK_FILE, RAW_FILE, Given, Read, ReadRequest
from tests.unit.ingest.test_reader import LIMITS, inspect
from tests.unit.storage.conftest import digest

Image = tuple[str, bytes] | tuple[str, bytes, PartName]


def read(work: Path, *images: Image, base: str = "", **options: object) -> Read:
    """Reads images that were given, with their classes, into a folder of its own."""
    work.mkdir()
    given, raw = [], b""
    for label, content, *part in images:
        name = f"{label}/{content.decode()}"
        part_name: PartName = part[0] if part else ""
        given.append(Given(name, label, part_name, len(raw), len(content)))
        raw += content
    (work / RAW_FILE).write_bytes(raw)
    asked = ReadRequest(work=str(work), given=given, base=base, limits=LIMITS, **options)  # type: ignore[arg-type]
    return reader.read(asked, inspect, 1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The index of a dataset of two classes."""
    read(
        tmp_path / "base", ("ants", b"PIC1"), ("ants", b"PIC2"), ("bees", b"PIC3"),
        ("bees", b"PIC4", "test"),
    )  # fmt: skip
    return tmp_path / "base" / INDEX_FILE


def classes(images: list[IndexedImage]) -> dict[str, str]:
    return {image.digest: image.label for image in images}


def check_whole(made: Edited, path: Path) -> Index:
    """Loads an index that was made, after a look whether it says of itself what is true."""
    assert made.digest == digest(path.read_bytes())
    loaded = indexes.load(path)
    assert msgspec.structs.replace(loaded, images=[]) == made.index
    counted = indexes.describe(
        loaded.images,
        is_labelled=loaded.is_labelled,
        case_sensitive=loaded.case_sensitive,
        bit_depth=loaded.bit_depth,
        left_out=loaded.summary,
    )
    assert counted == made.index
    live = [image.order for image in loaded.images if not image.is_erased]
    assert live == sorted(live)
    return loaded


def test_images_are_removed_and_others_stay_where_they_lie(base: Path, tmp_path: Path) -> None:
    before = indexes.load(base)
    made = edits.removed(base, tmp_path / "made", [digest(b"PIC2"), digest(b"PIC4")])
    loaded = check_whole(made, tmp_path / "made")
    assert loaded.images == [i for i in before.images if i.name in ("ants/PIC1", "bees/PIC3")]
    assert made.index.classes == [ClassCount("ants", 1, 0), ClassCount("bees", 1, 0)]
    assert made.index.packs == before.packs
    assert made.index.digest != before.digest
    # As if they had never been there.
    other = read(tmp_path / "other", ("ants", b"PIC1"), ("bees", b"PIC3"))
    assert made.index.digest == other.index.digest


def test_the_last_images_to_learn_from_are_not_removed(base: Path, tmp_path: Path) -> None:
    learned = [digest(b"PIC%d" % n) for n in (1, 2, 3)]
    with pytest.raises(InvalidInput, match="no image would be left to learn from") as caught:
        edits.removed(base, tmp_path / "made", learned)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    # A class may go.
    assert len(edits.removed(base, tmp_path / "made", learned[:2]).index.classes) == 1


def test_images_are_put_into_other_classes_in_their_order(base: Path, tmp_path: Path) -> None:
    before = indexes.load(base)
    wanted = {digest(b"PIC1"): " wasps", digest(b"PIC3"): "ants"}
    made = edits.relabelled(base, tmp_path / "made", wanted)
    loaded = check_whole(made, tmp_path / "made")
    now = {digest(b"PIC1"): "wasps", digest(b"PIC3"): "ants"}
    assert classes(loaded.images) == classes(before.images) | now
    by_digest = {image.digest: image for image in before.images}
    for image in loaded.images:
        assert (
            msgspec.structs.replace(image, label=by_digest[image.digest].label)
            == (by_digest[image.digest])
        )
    again = edits.relabelled(
        tmp_path / "made", tmp_path / "again", {digest(b"PIC1"): "ants", digest(b"PIC3"): "bees"}
    )
    assert again.index.digest == before.digest


@pytest.mark.parametrize(
    ("label", "reason"),
    [("a/b", Reason.INVALID_FIELD), ("", Reason.INVALID_FIELD), ("Bees", Reason.DATASET_UNUSABLE)],
)
def test_a_class_must_have_a_name_that_no_other_looks_like(
    base: Path, tmp_path: Path, label: str, reason: Reason
) -> None:
    with pytest.raises(InvalidInput) as caught:
        edits.relabelled(base, tmp_path / "made", {digest(b"PIC1"): label})
    assert caught.value.reason is reason
    assert caught.value.field == ("labels" if reason is Reason.INVALID_FIELD else "")


@pytest.mark.parametrize("is_erased", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda base, target, digest: edits.removed(base, target, [digest]),
        lambda base, target, digest: edits.relabelled(base, target, {digest: "ants"}),
    ],
    ids=["removed", "relabelled"],
)
def test_an_image_that_is_not_there_is_told(
    base: Path, tmp_path: Path, change: Callable[[Path, Path, str], Edited], is_erased: bool
) -> None:
    asked = digest(b"PIC1") if is_erased else digest(b"PIC9")
    if is_erased:
        edits.erased(base, tmp_path / "erased", {asked}, {})
        base = tmp_path / "erased"
    with pytest.raises(NotFound, match=f"no image of the digest '{asked}'") as caught:
        change(base, tmp_path / "made", asked)
    assert caught.value.reason is Reason.IMAGE_NOT_FOUND


def test_of_an_erased_image_nothing_is_left_but_that_it_was_there(
    base: Path, tmp_path: Path
) -> None:
    before, gone = indexes.load(base), digest(b"PIC1")
    pack, new = base.parent / PACK_FILE, tmp_path / "pack"
    repacked = Repacked(*packs.without(pack, new, {gone}, lambda: None))
    made = edits.erased(base, tmp_path / "made", {gone}, {before.packs[0]: repacked})
    loaded = check_whole(made, tmp_path / "made")
    assert made.index.digest == before.digest
    assert (made.index.erased_count, made.index.summary.used) == (1, 3)
    assert made.index.packs == [repacked.digest]
    assert [i.is_erased for i in loaded.images] == [i.digest == gone for i in before.images]
    for path in (tmp_path / "made", new):
        assert b"PIC1" not in path.read_bytes()
    live = [image for image in loaded.images if not image.is_erased]
    assert [read_plain(Location(new, i.offset, i.size)) for i in live] == [
        i.name.partition("/")[2].encode() for i in live
    ]


def test_the_summary_names_no_erased_image_nor_a_copy_of_it(tmp_path: Path) -> None:
    work = tmp_path / "base"
    read(work, ("ants", b"PIC1"), ("ants", b"PIC2"))
    header = indexes.load_header(work / INDEX_FILE)
    rows = [
        LeftOutFile("ants/other", "ants", LeftOutReason.COPY, "a copy of 'ants/PIC1'"),
        LeftOutFile("ants/third", "ants", LeftOutReason.COPY, "a copy of 'ants/PIC2'"),
    ]
    summary = indexes.summarise(2, rows)
    made = edits.erased(work / INDEX_FILE, tmp_path / "made", {digest(b"PIC1")}, {}, summary)
    assert [row.path for row in made.index.summary.files] == ["ants/third"]
    assert made.index.summary.left_out == [LeftOut(LeftOutReason.COPY, "ants", 2)]
    assert (made.index.summary.seen, made.index.summary.used) == (3, 1)
    assert header.summary.used == 2


def test_images_are_added_where_the_dataset_has_none_such(base: Path, tmp_path: Path) -> None:
    edits.erased(base, tmp_path / "erased", {digest(b"PIC2")}, {})
    before = indexes.load(tmp_path / "erased")
    made = read(
        tmp_path / "work", ("ants", b"PIC1"), ("ants", b"PIC2"), ("ants", b"PIC3"),
        ("bees", b"PIC5"), ("ants", b"PIC6"), ("ants", b"text"), base=str(tmp_path / "erased"),
    )  # fmt: skip
    loaded = check_whole(Edited(made.index, made.index_digest), tmp_path / "work" / INDEX_FILE)
    added = {digest(b"PIC5"): "bees", digest(b"PIC6"): "ants"}
    assert classes(loaded.images) == classes(before.images) | added
    assert loaded.packs == [before.packs[0], made.pack_digest]
    assert [name for name, _ in packs.members(tmp_path / "work" / PACK_FILE)] == [
        digest(b"PIC6"), digest(b"PIC5"),
    ]  # fmt: skip
    summary = made.index.summary
    assert (summary.seen, summary.used) == (9, 5)
    assert {row.path: (row.reason, row.detail) for row in summary.files} == {
        "ants/PIC1": (LeftOutReason.COPY, "a copy of 'ants/PIC1' of the dataset"),
        "ants/PIC2": (LeftOutReason.ERASED, "the image was erased from the dataset"),
        "ants/PIC3": (
            LeftOutReason.CONTRADICTION,
            "the dataset has the same image in the class 'bees': relabel that one to move it",
        ),
        "ants/text": (LeftOutReason.WRONG_FORMAT, "it is not an image but text"),
    }


def test_where_all_images_are_there_already_nothing_is_added(base: Path, tmp_path: Path) -> None:
    made = read(tmp_path / "work", ("ants", b"PIC1"), base=str(base))
    assert (made.pack_digest, made.index.digest) == ("", indexes.load(base).digest)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {INDEX_FILE}


def test_a_class_that_is_added_must_not_look_like_another(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'bees' and 'Bees' differ in upper and lower case"):
        read(tmp_path / "1", ("Bees", b"PIC9"), base=str(base))
    made = read(tmp_path / "2", ("Bees", b"PIC9"), base=str(base), case_sensitive=True)
    assert len(made.index.classes) == 3


def test_without_labels_a_copy_in_another_folder_is_a_copy(tmp_path: Path) -> None:
    read(tmp_path / "base", ("ants", b"PIC1"), ("", b"PIC2"), is_labelled=False)
    base = str(tmp_path / "base" / INDEX_FILE)
    made = read(
        tmp_path / "work", ("bees", b"PIC1"), ("bees", b"PIC3"), base=base, is_labelled=False
    )
    assert [row.reason for row in made.index.summary.files] == [LeftOutReason.COPY]
    assert (made.index.summary.used, made.index.classes) == (3, [])


def test_a_large_index_is_edited_without_its_images_in_memory(base: Path, tmp_path: Path) -> None:
    """Most of what it takes is a line of each image for the digest, some 160 bytes."""
    count = 20_000
    header = indexes.load_header(base)
    large = tmp_path / "large"

    def image(number: int) -> IndexedImage:
        name = hashlib.sha256(b"%d" % number).hexdigest()
        return IndexedImage(f"{number:06d}", "ants", "", name, pack="a" * 64, size=9, look="f" * 16)

    indexes.save(header, large, map(image, range(count)))
    tracemalloc.start()
    try:
        edits.erased(large, tmp_path / "made", {image(7).digest}, {})
        edits.relabelled(large, tmp_path / "moved", {image(7).digest: "bees"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in indexes.iterate(tmp_path / "made")) == count
    assert peak < 200 * count
