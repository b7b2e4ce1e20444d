from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from service.domain import ClassCount, PartName
from service.errors import (
    Damaged,
    InvalidInput,
    Reason,
    WrongState,
)
from service.ingest import index as indexes
from service.ingest.folder import read_plain
from service.ingest.index import Index
from service.ingest.packs import Location, members
from service.storage import holds
from service.storage.blobs import Blob, BlobGone, Blobs
from service.storage.collector import Collector
from service.storage.database import Connection, Database
from service.storage.dataset_keeping import DatasetKeeper
from service.storage.datasets import DatasetRecord, DatasetStore, Limits, Upload
from tests.keys import BIRDS
from tests.unit.ingest.packing import FILES, tar_gz_of, tar_of, zip_of
from tests.unit.storage.conftest import QUOTAS, TENANT, MakeDatasets, Publish, digest

Images = list[tuple[str, bytes, PartName]]
IMAGES: Images = [("cat", b"PIC1", ""), ("cat", b"PIC2", ""), ("dog", b"PIC3", "")]


def upload(datasets: DatasetStore, images: Images, name: str = "pets") -> DatasetRecord:
    sending = datasets.begin_upload(name, "", tenant=TENANT)
    for label, content, split in images:
        sending.add_image(label, content, "", split)
    return sending.finish()


def send(datasets: DatasetStore, archive: bytes) -> DatasetRecord:
    sending = datasets.begin_upload("pets", "", tenant=TENANT)
    for start in range(0, len(archive), 1000):
        sending.write(archive[start : start + 1000])
    return sending.finish()


def index_of(datasets: DatasetStore, dataset_id: str, tenant: str = TENANT) -> Index:
    """Reads a dataset's index."""
    with datasets._keeper.index_file(datasets.get(dataset_id, tenant)) as path:
        return indexes.load(path)


def stored(
    datasets: DatasetStore, dataset_id: str, tenant: str = TENANT
) -> dict[str, tuple[str, str, bytes]]:
    """Reads a dataset's images by its index: name -> part, class and bytes."""
    index = index_of(datasets, dataset_id, tenant)
    assert sorted(index.packs) == datasets.source(dataset_id, tenant).packs
    with datasets._keeper._blobs.files(index.packs) as files:
        found = {
            i.name: (i.part, i.label, read_plain(Location(files[i.pack], i.offset, i.size)))
            for i in index.images
            if not i.is_erased
        }
        held = [digest for pack in index.packs for digest, _ in members(files[pack])]
    assert {image.digest for image in index.images if not image.is_erased} <= set(held)
    return found


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "uploads").iterdir())


def test_images_become_a_dataset_that_can_be_read(datasets: DatasetStore, tmp_path: Path) -> None:
    record = upload(datasets, IMAGES)
    assert record.dataset_id == "ds-" + record.digest[:20]
    assert record.display_name == "pets"
    assert record.classes == [ClassCount("cat", 2, 0), ClassCount("dog", 1, 0)]
    assert (record.image_count, record.size_bytes) == (3, 12)
    assert (record.summary.seen, record.summary.used, record.summary.left_out) == (3, 3, [])
    assert datasets.get(record.dataset_id, TENANT) == record
    assert sorted(stored(datasets, record.dataset_id).values()) == [
        ("", "cat", b"PIC1"), ("", "cat", b"PIC2"), ("", "dog", b"PIC3"),
    ]  # fmt: skip
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("make", [tar_of, tar_gz_of, zip_of])
def test_an_archive_and_single_images_with_the_same_content_are_one_dataset(
    datasets: DatasetStore, make: object, tmp_path: Path
) -> None:
    first = upload(datasets, IMAGES)
    second = send(datasets, make({f"wrapped/{k}": v for k, v in FILES.items()}))  # type: ignore[operator]
    assert second == replace(first, summary=second.summary, index_digest=second.index_digest)
    assert (first.summary.nested, second.summary.nested) == (0, 1)
    assert datasets.list(0, "", TENANT)[0] == [second]
    # As they are called in the newest upload of them.
    assert set(stored(datasets, first.dataset_id)) == {
        "wrapped/cat/1.png", "wrapped/cat/deep/2.png", "wrapped/dog/3.png",
    }  # fmt: skip
    assert leftovers(tmp_path) == []


def test_the_same_upload_from_two_threads_at_once_makes_one_dataset(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda n: upload(datasets, IMAGES, f"name {n}"), range(8)))
    assert len({record.dataset_id for record in records}) == 1
    assert len({record.create_time_s for record in records}) == 1
    assert leftovers(tmp_path) == []


def test_no_more_than_a_hundred_left_out_files_are_listed(make_datasets: MakeDatasets) -> None:
    datasets = make_datasets(Limits(10**6, 10**6, 1000))
    copies = {f"cat/copy{n:03}.png": b"PIC1" for n in range(150)}
    record = send(datasets, tar_of({**FILES, **copies}))
    assert (record.summary.left_out_count, len(record.summary.files)) == (150, 100)
    assert datasets.get(record.dataset_id, TENANT) == record


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([("cat", b"bad", "")], "no image was found among 1 files"),
        ([("cat", b"PIC1", ""), ("dog", b"bad", "")], "the class 'dog' is left without images"),
        ([("cat", b"PIC1", ""), ("dog", b"PIC1", "")], "the class 'cat' is left without images"),
        (
            [("cat", b"PIC1", ""), *[("cat", b"bad", "")] * 5],
            "5 of 6 files are not readable images",
        ),
        ([("cat", b"PIC1", ""), ("Cat", b"PIC2", "")], "differ in upper and lower case alone"),
        ([("caf\u00e9", b"PIC1", ""), ("cafe\u0301", b"PIC2", "")], "look the same"),
        ([], "brought nothing"),
    ],
    ids=["no image", "unreadable", "contradicted", "too many", "case", "forms", "nothing"],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_and_leaves_nothing(
    datasets: DatasetStore, tmp_path: Path, images: Images, said: str
) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        upload(datasets, images)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    assert leftovers(tmp_path) == []
    assert datasets.list(0, "", TENANT) == ([], "")


@pytest.mark.parametrize(
    "label",
    ["", "x" * 129, "a/b", "a\\b", "..", ".x", "a\nb", "a\0b", "__MACOSX", "\U0001f600" * 64],
)
def test_a_bad_class_name_is_refused(datasets: DatasetStore, label: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        datasets.begin_upload("", "", tenant=TENANT).add_image(label, b"PIC", "", "")
    assert caught.value.field == "image.label"


@pytest.mark.parametrize("label", ["train", "val", "test"])
def test_a_class_may_be_called_like_a_part(datasets: DatasetStore, label: str) -> None:
    for part in ("", "train"):
        record = upload(datasets, [(label, b"PIC1", part), ("bus", b"PIC2", part)])
        assert [c.label for c in record.classes] == sorted(["bus", label])
    record = send(datasets, tar_of({f"{label}/1.png": b"PIC1", "bus/2.png": b"PIC2"}))
    assert [c.label for c in record.classes] == sorted(["bus", label])


@pytest.mark.parametrize("parts", [("", "train"), ("train", ""), ("val", ""), ("", "test")])
def test_either_all_images_name_their_part_or_none(
    datasets: DatasetStore, parts: tuple[PartName, PartName]
) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    sending.add_image("cat", b"PIC", "", parts[0])
    with pytest.raises(InvalidInput, match="for all or for none"):
        sending.add_image("dog", b"PIC", "", parts[1])
    sending.abort()


def test_an_archive_and_images_do_not_mix(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    sending.add_image("cat", b"PIC", "", "")
    with pytest.raises(InvalidInput, match="send either"):
        sending.write(b"bytes")
    sending.abort()
    sending = datasets.begin_upload("", "", tenant=TENANT)
    sending.write(b"bytes")
    with pytest.raises(InvalidInput, match="send either"):
        sending.add_image("cat", b"PIC", "", "")
    sending.abort()


def as_archive(sending: Upload) -> None:
    for _ in range(3):
        sending.write(bytes(50))


def as_images(sending: Upload) -> None:
    for _ in range(3):
        sending.add_image("cat", b"PIC" * 15, "", "")


@pytest.mark.parametrize("fill", [as_archive, as_images])
def test_an_upload_that_is_too_large_is_refused(make_datasets: MakeDatasets, fill: object) -> None:
    sending = make_datasets(Limits(100, 1000, 100)).begin_upload("", "", tenant=TENANT)
    with pytest.raises(InvalidInput, match="larger than 100 bytes") as caught:
        fill(sending)  # type: ignore[operator]
    sending.abort()
    assert caught.value.reason is Reason.ARCHIVE_TOO_LARGE


def test_too_many_images_are_refused(make_datasets: MakeDatasets) -> None:
    sending = make_datasets(Limits(100_000, 1000, 2)).begin_upload("", "", tenant=TENANT)
    with pytest.raises(InvalidInput, match="more than 2 images") as caught:
        as_images(sending)
    sending.abort()
    assert caught.value.reason is Reason.ARCHIVE_TOO_LARGE


def test_a_display_name_has_a_bound(datasets: DatasetStore) -> None:
    with pytest.raises(InvalidInput):
        datasets.begin_upload("x" * 257, "", tenant=TENANT)


def test_an_aborted_upload_leaves_nothing(datasets: DatasetStore, tmp_path: Path) -> None:
    for fill in (as_archive, as_images, lambda _: None):
        sending = datasets.begin_upload("", "", tenant=TENANT)
        fill(sending)
        sending.abort()
        sending.abort()
    assert leftovers(tmp_path) == []
    assert datasets.list(0, "", TENANT) == ([], "")


def test_an_abort_after_the_finish_is_harmless(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    for label, content, split in IMAGES:
        sending.add_image(label, content, "", split)
    record = sending.finish()
    sending.abort()
    assert datasets.get(record.dataset_id, TENANT) == record
    assert len(stored(datasets, record.dataset_id)) == 3


def test_what_an_earlier_process_left_of_uploads_is_deleted(
    datasets: DatasetStore, database: Database, blobs: Blobs, tmp_path: Path
) -> None:
    record = upload(datasets, IMAGES)
    left = tmp_path / "data" / "uploads" / "0123"
    left.mkdir()
    (left / "archive").write_bytes(b"half")
    DatasetKeeper(database, blobs, QUOTAS, tmp_path / "data" / "uploads")
    assert leftovers(tmp_path) == []
    assert len(stored(datasets, record.dataset_id)) == 3


def test_a_dataset_stays_while_a_job_holds_it(datasets: DatasetStore, database: Database) -> None:
    record = upload(datasets, IMAGES)
    with database.transaction() as connection:
        holds.hold(connection, TENANT, "dataset", [record.dataset_id], "job-1")
    with pytest.raises(WrongState, match="used by job-1") as caught:
        datasets.delete(record.dataset_id, TENANT)
    assert caught.value.reason is Reason.DATASET_IN_USE
    assert datasets.get(record.dataset_id, TENANT) == record
    with database.transaction() as connection:
        holds.release(connection, "job-1")
    datasets.delete(record.dataset_id, TENANT)
    assert upload(datasets, IMAGES).dataset_id == record.dataset_id


def test_datasets_are_listed_in_pages_newest_first(datasets: DatasetStore) -> None:
    made = [upload(datasets, [*IMAGES, ("dog", f"PIC{n}".encode(), "")]) for n in range(10, 15)]
    listed: list[DatasetRecord] = []
    token = ""
    while True:
        page, token = datasets.list(2, token, TENANT)
        listed += page
        if not token:
            break
    assert listed == made[::-1]


def test_the_same_images_again_bring_their_names_and_their_losses_to_the_index(
    datasets: DatasetStore,
) -> None:
    first = send(datasets, tar_of({**FILES, "notes.txt": b"PIC?"}))
    second = send(datasets, tar_of({f"again/{name}": data for name, data in FILES.items()}))
    assert second.dataset_id == first.dataset_id
    kept = index_of(datasets, first.dataset_id)
    assert kept.summary == second.summary != first.summary
    assert all(image.name.startswith("again/") for image in kept.images)
    stored(datasets, first.dataset_id)


def test_the_same_images_in_other_groups_are_another_dataset(datasets: DatasetStore) -> None:
    def in_groups(*given: str) -> DatasetRecord:
        sending = datasets.begin_upload("", "", tenant=TENANT)
        for (label, content, part), group in zip(IMAGES, given, strict=True):
            sending.add_image(label, content, "", part, group)
        return sending.finish()

    def groups(record: DatasetRecord) -> list[str]:
        kept = index_of(datasets, record.dataset_id)
        found = {image.digest: image.group for image in kept.images}
        return [found[digest(content)] for _, content, _ in IMAGES]

    asked = (["a", "b"], ["a", ""], ["a", "a"], ["", ""])
    named = [[*two, *[""] * (len(IMAGES) - 2)] for two in asked]
    records = [in_groups(*each) for each in named]
    assert len({record.dataset_id for record in records}) == len(asked)
    assert [groups(record) for record in records] == named
    assert [in_groups(*each).dataset_id for each in named] == [r.dataset_id for r in records]
    assert upload(datasets, IMAGES).dataset_id == records[-1].dataset_id


@pytest.mark.parametrize("group", ["x" * 129, "a\nb"])
def test_a_group_that_cannot_be_shown_is_refused(datasets: DatasetStore, group: str) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    with pytest.raises(InvalidInput, match="a group has at most 128") as caught:
        sending.add_image("cat", b"PIC", "", "", group)
    assert caught.value.field == "image.group"
    sending.abort()


@pytest.mark.parametrize("lost", ["index", "pack"])
def test_a_file_that_was_lost_comes_back_with_the_same_images(
    datasets: DatasetStore, blobs: Blobs, lost: str
) -> None:
    first = send(datasets, tar_of(FILES))
    source = datasets.source(first.dataset_id, TENANT)
    digest = source.index if lost == "index" else source.packs[0]
    with blobs.files([digest]) as files:
        files[digest].unlink()
    with pytest.raises(Damaged, match="is missing"):
        stored(datasets, first.dataset_id)
    assert send(datasets, tar_of(FILES)).dataset_id == first.dataset_id
    assert len(stored(datasets, first.dataset_id)) == first.image_count


def test_what_no_dataset_names_any_more_is_collected(
    datasets: DatasetStore, database: Database, blobs: Blobs
) -> None:
    first, other = upload(datasets, IMAGES), upload(datasets, IMAGES[:2])
    gone, kept = (datasets.source(each.dataset_id, TENANT) for each in (first, other))
    datasets.delete(first.dataset_id, TENANT)
    collector = Collector(database, blobs._store, grace_s=0)
    collector.run()
    collector.run()
    assert blobs.are_there([gone.index, *gone.packs]) == set()
    assert blobs.are_there([kept.index, *kept.packs]) == {kept.index, *kept.packs}
    assert len(stored(datasets, other.dataset_id)) == 2


def test_files_that_were_collected_before_their_row_was_written_are_put_again(
    datasets: DatasetStore, database: Database, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, tries = blobs.reference, []

    def collected(connection: Connection, wanted: list[Blob]) -> None:
        tries.append(wanted)
        if len(tries) == 1:
            raise BlobGone
        reference(connection, wanted)

    monkeypatch.setattr(blobs, "reference", collected)
    assert len(stored(datasets, upload(datasets, IMAGES).dataset_id)) == 3
    assert len(tries) == 2


def test_old_datasets_that_nobody_needs_are_deleted(
    datasets: DatasetStore, database: Database, publish: Publish
) -> None:
    unused, trained_on, held = (
        upload(datasets, [*IMAGES, ("cat", f"PIC {n}".encode(), "")]).dataset_id for n in range(3)
    )
    publish(BIRDS, "job-1")
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO version_sources (tenant, model, version, position, role, dataset_id,"
            " folder) VALUES (?, ?, 1, 0, 'source', ?, '')",
            (*BIRDS, trained_on),
        )
        holds.hold(connection, TENANT, "dataset", [held], "job-2")
    assert datasets.delete_unused(60) == 0
    assert datasets.delete_unused(-60) == 1
    left = {record.dataset_id for record in datasets.list(0, "", TENANT)[0]}
    assert left == {trained_on, held} and unused not in left
