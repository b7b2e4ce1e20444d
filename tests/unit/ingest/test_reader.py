"""The one reader: what is used, what is left out and why, and what refuses a dataset."""

import errno
import os
import tarfile
import threading
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain import ClassCount, LeftOut, LeftOutReason, PartName
from service.engine.formats import recognise
from service.engine.preprocess import ImageFacts
from service.errors import InvalidInput, Reason
from service.ingest import index as indexes
from service.ingest import reader
from service.ingest.archives import FILE_BYTES, Limits
from service.ingest.folder import read_plain
from service.ingest.index import Index
from service.ingest.packs import Location
from service.ingest.reader import INDEX_FILE, PACK_FILE, RAW_FILE, Given, ReadRequest
from tests.unit.ingest.packing import MAKERS, Entries
from tests.unit.storage import conftest
from tests.unit.storage.conftest import digest

LIMITS = Limits(10**6, 10**6, 1000)


def inspect(data: bytes, name: str) -> ImageFacts:
    """Takes for an image what begins with PIC, and says of a text that it is one."""
    if data.startswith(b"text"):
        recognise(data)
    return conftest.inspect(data, name)


def lay(root: Path, entries: Entries) -> Path:
    for name, content in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def read(root: Path, entries: Entries, **options: object) -> Index:
    return reader.read_folder(lay(root, entries), 2, inspect=inspect, **options)  # type: ignore[arg-type]


def refusal(root: Path, entries: Entries, **options: object) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(root, entries, **options)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    return caught.value.message


def good(label: str, count: int, first: int = 0) -> Entries:
    """Makes images of a class that differ from one another and from other classes'."""
    return {f"{label}/{n:03}.png": f"PIC {label} {n}".encode() for n in range(first, first + count)}


def bad(label: str, count: int) -> Entries:
    return {f"{label}/bad{n:03}.png": b"broken" for n in range(count)}


def test_a_folder_is_read_with_an_account_of_every_file(tmp_path: Path) -> None:
    entries = {
        **good("ants", 4), **good("bees", 3), "ants/deep/5.png": b"PIC deep",
        "bees/notes.txt": b"text", "bees/cut.png": b"cut", "README.md": b"text",
        "ants/.hidden": b"x", "ants/Thumbs.db": b"x", "ants/copy.png": b"PIC ants 1",
    }  # fmt: skip
    index = read(tmp_path / "pets", entries)
    assert index.classes == [ClassCount("ants", 5, 0), ClassCount("bees", 3, 0)]
    assert index.summary.left_out == [
        LeftOut(LeftOutReason.COPY, "ants", 1),
        LeftOut(LeftOutReason.HIDDEN, "", 1),
        LeftOut(LeftOutReason.STRAY, "", 1),
        LeftOut(LeftOutReason.SYSTEM, "", 1),
        LeftOut(LeftOutReason.UNREADABLE, "bees", 1),
        LeftOut(LeftOutReason.WRONG_FORMAT, "bees", 1),
    ]
    summary = index.summary
    assert (summary.seen, summary.used, summary.left_out_count, summary.nested) == (14, 8, 6, 1)
    assert {i.name: i.size for i in index.images} == {
        i.name: len(entries[i.name]) for i in index.images
    }
    assert index.size_bytes == sum(image.size for image in index.images)
    assert all((tmp_path / "pets" / image.path).is_file() for image in index.images)


@pytest.mark.parametrize(
    ("good_count", "bad_count", "is_refused"),
    [(1, 4, False), (20, 5, False), (19, 5, True), (0, 1, True), (80, 20, False), (79, 20, True)],
)
def test_bad_files_refuse_a_dataset_from_five_on_above_a_fifth(
    tmp_path: Path, good_count: int, bad_count: int, is_refused: bool
) -> None:
    entries = {**good("ants", good_count), **bad("ants", bad_count)}
    if not is_refused:
        assert read(tmp_path / "pets", entries).summary.left_out_count == bad_count
        return
    message = refusal(tmp_path / "pets", entries)
    assert "'ants/bad000.png' (no image)" in message
    if good_count:
        assert f"{bad_count} of {good_count + bad_count} files" in message
        assert ("and 10 more" in message) == (bad_count == 20)


def test_links_and_files_of_other_formats_count_as_bad_and_what_nobody_took_for_images_does_not(
    tmp_path: Path,
) -> None:
    root = lay(tmp_path / "pets", good("ants", 10))
    noise = {f"ants/.hidden{n}": b"x" for n in range(9)} | {f"stray{n}": b"x" for n in range(9)}
    copies = {f"ants/copy{n}.png": b"PIC ants 0" for n in range(9)}
    lay(root, {**noise, **copies, "ants/a.txt": b"text", "ants/b.txt": b"text"})
    for number in range(2):
        (root / f"ants/link{number}.png").symlink_to("000.png")
    assert read(root, {}).summary.used == 10
    os.mkfifo(root / "ants/pipe.png")
    assert "5 of 24 files are not readable images" in refusal(root, {})


def test_one_class_alone_is_fine_and_a_class_left_without_images_is_not(tmp_path: Path) -> None:
    assert read(tmp_path / "1", good("ants", 1)).classes == [ClassCount("ants", 1, 0)]
    message = refusal(tmp_path / "2", {**good("ants", 9), **bad("wasps", 2)})
    assert "the class 'wasps' is left without images" in message
    assert "'wasps/bad000.png' (no image), 'wasps/bad001.png' (no image)" in message
    # Of many files, how many and two of them.
    told = refusal(tmp_path / "many", {**good("ants", 99), **bad("wasps", 4)})
    assert "all its files (4) are left out: 'wasps/bad000.png'" in told
    assert "'wasps/bad001.png' (no image) and 2 more; fix them" in told
    # Whatever became of its files.
    message = refusal(tmp_path / "3", {**good("ants", 3), "bees/1.png": b"PIC ants 0"})
    assert "'bees/1.png' (the same image is in the classes 'ants', 'bees')" in message


@pytest.mark.parametrize("is_labelled", [True, False])
def test_a_dataset_without_a_readable_image_is_refused(tmp_path: Path, is_labelled: bool) -> None:
    message = refusal(tmp_path / "pets", bad("ants", 1), is_labelled=is_labelled)
    assert message == "no image was found among 1 files: 'ants/bad000.png' (no image)"


def test_of_copies_in_a_class_one_stays(tmp_path: Path) -> None:
    index = read(tmp_path / "pets", {"a/2": b"PIC", "a/1": b"PIC", "a/3": b"PIC", "b/1": b"PIC b"})
    assert [image.name for image in index.images] == ["a/1", "b/1"]
    assert [(row.path, row.reason, row.detail) for row in index.summary.files] == [
        ("a/2", LeftOutReason.COPY, "a copy of 'a/1'"),
        ("a/3", LeftOutReason.COPY, "a copy of 'a/1'"),
    ]


def test_of_copies_in_several_parts_the_one_that_is_measured_on_stays(tmp_path: Path) -> None:
    entries = {
        "train/a/1": b"PIC1", "val/a/1": b"PIC1", "test/a/1": b"PIC1",
        "train/a/2": b"PIC2", "val/a/2": b"PIC2", "train/a/3": b"PIC3",
    }  # fmt: skip
    index = read(tmp_path / "pets", entries)
    assert [image.name for image in index.images] == ["test/a/1", "train/a/3", "val/a/2"]
    assert index.classes == [ClassCount("a", 1, 1, 1)]
    assert index.summary.left_out == [LeftOut(LeftOutReason.COPY, "a", 3)]


def test_of_the_same_image_in_two_classes_none_stays(tmp_path: Path) -> None:
    entries = {**good("a", 2), **good("b", 2), "a/x": b"PIC", "b/y": b"PIC", "b/z": b"PIC"}
    index = read(tmp_path / "pets", entries)
    assert index.summary.left_out == [
        LeftOut(LeftOutReason.CONTRADICTION, "a", 1),
        LeftOut(LeftOutReason.CONTRADICTION, "b", 2),
    ]
    assert index.summary.used == 4
    assert "the same image is in the classes 'a', 'b'" in index.summary.files[0].detail


def test_of_the_same_image_in_many_classes_each_file_names_a_few(tmp_path: Path) -> None:
    names = [f"class{n:03}" for n in range(50)]
    entries = {f"{name}/x.png": b"PIC" for name in names}
    for name in names:
        entries |= good(name, 1)
    details = {row.detail for row in read(tmp_path, entries).summary.files}
    assert details == {
        "the same image is in the classes 'class000', 'class001', 'class002' and 47 more"
    }


def test_without_labels_an_image_of_two_folders_is_of_none(tmp_path: Path) -> None:
    entries = {"a/1": b"PIC", "b/1": b"PIC", "2": b"PIC2"}
    index = read(tmp_path / "pets", entries, is_labelled=False)
    assert [(image.name, image.label) for image in index.images] == [("2", ""), ("a/1", "")]
    assert (index.classes, index.is_labelled) == ([], False)


def test_a_sample_takes_images_in_turn_from_each_class_whatever_their_order(tmp_path: Path) -> None:
    entries = {**good("ants", 30), **good("bees", 3), **good("wasps", 10)}
    sample = read(tmp_path / "pets", entries, most=15)
    assert [(count.label, count.train) for count in sample.classes] == [
        ("ants", 6), ("bees", 3), ("wasps", 6),
    ]  # fmt: skip
    assert sample == read(tmp_path / "pets", {}, most=15)
    assert [image.name for image in sample.images] != sorted(entries)[:15]
    assert read(tmp_path / "pets", {}, most=100) == read(tmp_path / "pets", {})


def test_a_sample_may_lack_classes_and_is_not_refused_for_links_beside_it(tmp_path: Path) -> None:
    root = lay(tmp_path / "pets", {**good("ants", 50), **good("bees", 50)})
    for number in range(8):
        (root / f"ants/link{number}.png").symlink_to("000.png")
    assert read(root, {}).summary.used == 100
    assert read(root, {}, most=10).summary.used == 10
    assert read(root, {}, most=1).summary.used == 1


def test_the_digest_is_of_what_images_show_and_where_they_belong(tmp_path: Path) -> None:
    def of(entries: Entries, **options: object) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return read(root, entries, **options).digest

    first = of({"cat/1.png": b"PIC1", "dog/2.png": b"PIC2"})
    assert first == of({"cat/other.png": b"PIC1", "dog/deep/names.png": b"PIC2"})
    assert first != of({"dog/1.png": b"PIC1", "cat/2.png": b"PIC2"})
    assert first != of({"train/cat/1": b"PIC1", "train/dog/2": b"PIC2", "val/cat/3": b"PIC3"})
    assert first != of({"cat/1.png": b"PIC1", "dog/2.png": b"PIC2"}, is_labelled=False)


def test_the_greatest_depth_of_bits_is_told(tmp_path: Path) -> None:
    root = lay(tmp_path / "pets", {**good("ants", 3), **good("bees", 1)})
    depths = {"ants/001.png": 12, "ants/002.png": 10}
    index = reader.read_folder(
        root, 2, inspect=lambda data, name: ImageFacts(1, depths.get(name, 0))
    )
    assert index.bit_depth == 12


def request(work: Path, **options: object) -> ReadRequest:
    work.mkdir()
    return ReadRequest(work=str(work), limits=LIMITS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_leaves_the_images_that_are_used_and_their_index(
    tmp_path: Path, kind: str
) -> None:
    entries = {**good("a", 6), **bad("a", 1), "b/1.png": b"PIC", "b/2.png": b"PIC", ".x": b"PIC"}
    (tmp_path / "archive").write_bytes(MAKERS[kind](entries))
    work = tmp_path / "work"
    read_one = reader.read(request(work, archive=str(tmp_path / "archive")), inspect, 2)
    assert {path.name for path in work.iterdir()} == {PACK_FILE, INDEX_FILE}
    assert read_one.index_digest == digest((work / INDEX_FILE).read_bytes())
    assert read_one.pack_digest == digest((work / PACK_FILE).read_bytes())
    index = indexes.load(work / INDEX_FILE)
    assert msgspec.structs.replace(index, images=[]) == read_one.index
    assert {(i.pack, i.path) for i in index.images} == {(read_one.pack_digest, "")}
    assert packed(work) == {i.name: entries[i.name] for i in index.images}
    folder = read(tmp_path / "folder", entries)
    assert (folder.digest, folder.summary) == (index.digest, index.summary)


def test_a_pack_is_a_plain_tar_in_the_order_of_the_index(tmp_path: Path) -> None:
    entries = {**good("b", 3), **good("a", 3), "a/copy.png": b"PIC a 0", "a/odd.png": b"PIC" * 999}
    (tmp_path / "archive").write_bytes(MAKERS["zip"](entries))
    work = tmp_path / "work"
    reader.read(request(work, archive=str(tmp_path / "archive")), inspect, 2)
    images = indexes.load(work / INDEX_FILE).images
    with tarfile.open(work / PACK_FILE, "r:") as tar:
        found = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
        assert tar.format == tarfile.USTAR_FORMAT or all(not m.pax_headers for m in tar)
    assert found == [(image.digest, entries[image.name]) for image in images]


def test_a_folder_is_read_where_it_lies_and_left_as_it_is(tmp_path: Path) -> None:
    root = lay(tmp_path / "pets", {**good("a", 2), **good("b", 2), "b/copy": b"PIC b 0"})
    before = sorted(root.rglob("*"))
    read_one = reader.read(request(tmp_path / "work", folder=str(root)), inspect, 2)
    assert sorted(root.rglob("*")) == before
    assert {path.name for path in (tmp_path / "work").iterdir()} == {INDEX_FILE}
    assert read_one.pack_digest == ""
    index = indexes.load(tmp_path / "work" / INDEX_FILE)
    assert index == reader.read_folder(root, 1, inspect=inspect)
    assert {(i.path, i.pack, i.offset) for i in index.images} == {
        (i.name, "", 0) for i in index.images
    }


def give(work: Path, *images: tuple[str, PartName, bytes], **options: object) -> Index:
    given, raw = [], b""
    for n, (label, part, content) in enumerate(images):
        given.append(Given(f"{n}.png", label, part, len(raw), len(content)))
        raw += content
    asked = request(work, given=given, **options)
    (work / RAW_FILE).write_bytes(raw)
    return reader.read(asked, inspect, 2).index


def packed(work: Path) -> dict[str, bytes]:
    """Returns the bytes of a dataset's images, by name."""
    pack, images = work / PACK_FILE, indexes.load(work / INDEX_FILE).images
    return {i.name: read_plain(Location(pack, i.offset, i.size)) for i in images}


def test_images_that_were_given_are_read_as_those_of_a_folder(tmp_path: Path) -> None:
    index = give(
        tmp_path / "work", (" a", "train", b"PIC1"), (" a", "test", b"PIC2"),
        ("b", "train", b"PIC3"), ("b", "val", b"PIC3"), ("b", "val", b"text"),
    )  # fmt: skip
    entries = {
        "train/a/1": b"PIC1", "test/a/1": b"PIC2", "val/b/1": b"PIC3", "train/b/1": b"PIC3",
        "val/b/2": b"text",
    }  # fmt: skip
    folder = read(tmp_path / "folder", entries)
    assert (folder.digest, folder.classes) == (index.digest, index.classes)
    assert folder.summary.left_out == index.summary.left_out
    assert packed(tmp_path / "work") == {"0.png": b"PIC1", "1.png": b"PIC2", "3.png": b"PIC3"}


def test_the_index_keeps_looks_groups_and_how_deep_images_lie(tmp_path: Path) -> None:
    def seen(data: bytes, name: str) -> ImageFacts:
        return ImageFacts(1, 0, look=data[-1:].hex() * 8)

    root = lay(tmp_path / "pets", {"train/a/1": b"PIC1", "train/a/x/y/2": b"PIC2", "val/a/3": b"P"})
    folder = reader.read_folder(root, 1, inspect=seen)
    assert [(i.look, i.group, i.depth) for i in folder.images] == [
        ("31" * 8, "", 0), ("32" * 8, "", 2), ("50" * 8, "", 0),
    ]  # fmt: skip
    assert folder.summary.nested == 1
    work = tmp_path / "work"
    given = [Given("1.png", "a", "", 0, 4, "patient 1"), Given("2.png", "a", "", 4, 4)]
    asked = request(work, given=given)
    (work / RAW_FILE).write_bytes(b"PIC1PIC2")
    reader.read(asked, seen, 1)
    images = indexes.load(work / INDEX_FILE).images
    assert [(i.look, i.group) for i in images] == [("31" * 8, "patient 1"), ("32" * 8, "")]


def test_labels_that_were_given_must_not_look_the_same_unless_they_are_not_learned(
    tmp_path: Path,
) -> None:
    pairs: list[tuple[str, PartName, bytes]] = [("a", "", b"PIC1"), ("A", "", b"PIC2")]
    with pytest.raises(InvalidInput, match="upper and lower case") as caught:
        give(tmp_path / "1", *pairs)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    assert len(give(tmp_path / "2", *pairs, case_sensitive=True).classes) == 2
    assert give(tmp_path / "3", *pairs, is_labelled=False).summary.used == 2


def test_what_go_on_raises_ends_the_reading(tmp_path: Path) -> None:
    class Gone(Exception):  # noqa: N818
        """The caller has left."""

    is_gone = threading.Event()

    def leave(data: bytes, name: str) -> ImageFacts:
        is_gone.set()
        return inspect(data, name)

    def go_on() -> None:
        if is_gone.is_set():
            raise Gone

    root = lay(tmp_path / "pets", good("a", 50))
    with pytest.raises(Gone):
        reader.read(request(tmp_path / "work", folder=str(root)), leave, 1, go_on)
    assert not (tmp_path / "work" / INDEX_FILE).exists()


@pytest.mark.parametrize(
    ("number", "is_of_the_file"),
    [(errno.EIO, True), (errno.EACCES, True), (errno.EMFILE, False), (errno.ENOMEM, False)],
)
def test_an_error_of_the_system_is_no_fault_of_a_file(
    tmp_path: Path, number: int, is_of_the_file: bool
) -> None:
    def fail(data: bytes, name: str) -> ImageFacts:
        if name == "a/001.png":
            raise OSError(number, os.strerror(number))
        return inspect(data, name)

    root = lay(tmp_path / "pets", good("a", 3))
    if is_of_the_file:
        index = reader.read_folder(root, 2, inspect=fail)
        assert index.summary.files[0].detail == os.strerror(number)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            reader.read_folder(root, 2, inspect=fail)


def test_progress_is_told_from_none_to_all(tmp_path: Path) -> None:
    root = lay(tmp_path / "pets", {**good("a", 5), **bad("a", 1)})
    told: list[tuple[int, int]] = []
    asked = request(tmp_path / "work", folder=str(root))
    reader.read(asked, inspect, 2, on_progress=lambda *counts: told.append(counts))
    assert told == [(done, 6) for done in range(7)]


def test_an_archive_that_has_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has gone") as caught:
        reader.read(request(tmp_path / "work", archive=str(tmp_path / "none.zip")), inspect, 1)
    assert caught.value.reason is Reason.ARCHIVE_UNREADABLE


def test_what_is_larger_than_there_is_room_for_is_told_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(MAKERS["tar"]({f"a/{n}": bytes(100) for n in range(9)}))
    with pytest.raises(reader.OverRoom) as caught:
        reader.read(
            request(
                tmp_path / "work",
                archive=str(tmp_path / "archive"),
                max_new_bytes=3 * FILE_BYTES + 250,
            ),
            inspect,
            1,
        )
    assert caught.value.size_bytes == 3 * FILE_BYTES + 300


LABELS = st.sampled_from(["ants", "bees", "Wasps", ".git", "@eaDir", ""])
LEAVES = st.sampled_from(["1.png", "2.png", "deep/3.png", ".DS_Store", "Thumbs.db", "notes.txt"])
CONTENTS = st.sampled_from([b"text", b"cut", b"", *(b"PIC%d" % n for n in range(6))])
MIXED = st.dictionaries(
    st.tuples(st.sampled_from(["", "train", "val", "test"]), LABELS, LEAVES), CONTENTS, max_size=15
)


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mixed=MIXED, is_labelled=st.booleans(), most=st.sampled_from([0, 0, 3]))
def test_every_file_that_was_seen_is_used_or_left_out(
    tmp_path_factory: pytest.TempPathFactory,
    mixed: dict[tuple[str, str, str], bytes],
    is_labelled: bool,
    most: int,
) -> None:
    entries = {"/".join(filter(None, name)): content for name, content in mixed.items()}
    entries |= {**good("ants", 5), **good("bees", 5)}
    root = tmp_path_factory.mktemp("any")
    try:
        index = read(root, entries, is_labelled=is_labelled, most=most)
    except InvalidInput:
        return
    summary = index.summary
    assert summary.used == len(index.images) > 0
    assert summary.seen == summary.used + sum(row.count for row in summary.left_out)
    assert summary.left_out_count == len(summary.files)
    rows = Counter((row.reason, row.label) for row in summary.files)
    assert [LeftOut(*key, count) for key, count in sorted(rows.items())] == summary.left_out
    assert len({image.digest for image in index.images}) == summary.used
    assert sum(c.train + c.validation + c.test for c in index.classes) in (summary.used, 0)
    told = [image.name for image in index.images] + [row.path for row in summary.files]
    assert len(set(told)) == len(told)
    if most == 0:
        # What is in a hidden or a system's folder is told as that folder.
        for name in entries:
            above = {"/".join(name.split("/")[:n]) + "/" for n in range(1, name.count("/") + 1)}
            assert name in told or above & set(told)
