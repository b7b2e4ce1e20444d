"""Images without labels, for domain adaptation: at any depth, with what their folders name."""

from dataclasses import replace
from pathlib import Path

import pytest

from service.domain import LeftOut, LeftOutReason
from service.errors import InvalidInput, Reason
from service.storage.datasets import DatasetRecord, DatasetStore
from tests.unit.ingest.packing import FILES, tar_gz_of, zip_of
from tests.unit.storage.conftest import TENANT
from tests.unit.storage.test_datasets import IMAGES, index_of, leftovers, upload
from tests.unit.storage.test_datasets import stored as all_of

LOOSE = {"a.png": b"PIC1", "deep/er/b.png": b"PIC2"}


def send(datasets: DatasetStore, archive: bytes) -> DatasetRecord:
    sending = datasets.begin_upload("target", "", tenant=TENANT, is_unlabelled=True)
    sending.write(archive)
    return sending.finish()


def stored(datasets: DatasetStore, record: DatasetRecord) -> dict[str, tuple[str, bytes]]:
    """Reads a dataset by its index: the name of each image, its folder's label and its bytes."""
    assert not index_of(datasets, record.dataset_id).is_labelled
    found = all_of(datasets, record.dataset_id)
    return {name: (label, content) for name, (_, label, content) in found.items()}


def test_an_archive_without_classes_keeps_its_images_at_any_depth(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    record = send(datasets, zip_of({**LOOSE, "notes.txt": b"text", ".hidden": b"x"}))
    assert record.is_unlabelled
    assert (record.classes, record.image_count) == ([], 2)
    assert record.summary.left_out == [
        LeftOut(LeftOutReason.HIDDEN, "", 1),
        LeftOut(LeftOutReason.UNREADABLE, "", 1),
    ]
    assert {name: data for name, (_, data) in stored(datasets, record).items()} == LOOSE
    assert datasets.get(record.dataset_id, TENANT) == record
    assert leftovers(tmp_path) == []


def test_images_keep_the_class_that_they_may_be_of(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=True)
    for number, label in enumerate(("cat", "", "Unlabelled", "CAT", " ", " cat")):
        sending.add_image(label, f"PIC{number}".encode(), "x.png", "")
    record = sending.finish()
    assert list(stored(datasets, record).values()) == [
        ("", b"PIC1"), ("", b"PIC2"), ("", b"PIC4"), ("CAT", b"PIC3"), ("cat", b"PIC0"),
        ("cat", b"PIC5"),
    ]  # fmt: skip


def test_folders_and_given_labels_say_the_same(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=True)
    for label, content in (("cat", b"PIC1"), ("cat", b"PIC2"), ("unlabelled", b"PIC3")):
        sending.add_image(label, content, "", "")
    files = {"cat/1.png": b"PIC1", "cat/x/2.png": b"PIC2", "unlabelled/3.png": b"PIC3"}
    assert send(datasets, zip_of(files)).digest == sending.finish().digest


def test_an_image_in_two_folders_counts_once_and_is_of_no_class(datasets: DatasetStore) -> None:
    record = send(datasets, zip_of({**FILES, "dog/again.png": b"PIC1"}))
    assert record.summary.left_out == [LeftOut(LeftOutReason.COPY, "dog", 1)]
    assert stored(datasets, record)["cat/1.png"] == ("", b"PIC1")


def test_one_image_is_enough_and_none_is_not(datasets: DatasetStore, tmp_path: Path) -> None:
    assert send(datasets, zip_of({"a.png": b"PIC1"})).image_count == 1
    for content in ({"a.png": b"text"}, {}):
        with pytest.raises(InvalidInput) as caught:
            send(datasets, zip_of(content))
        assert caught.value.reason is Reason.DATASET_UNUSABLE
    assert leftovers(tmp_path) == []


def test_an_image_without_classes_belongs_to_no_part(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=True)
    with pytest.raises(InvalidInput) as caught:
        sending.add_image("cat", b"PIC1", "", "val")
    assert caught.value.field == "image.split"


def test_the_same_images_in_the_same_folders_are_one_dataset_and_in_others_another(
    datasets: DatasetStore,
) -> None:
    first = send(datasets, zip_of(FILES))
    assert send(datasets, tar_gz_of(FILES)) == first
    wrapped = send(datasets, zip_of({f"x/{name}": data for name, data in FILES.items()}))
    assert replace(wrapped, summary=first.summary, index_digest=first.index_digest) == first
    moved = {f"x{name}": content for name, content in FILES.items()}
    assert send(datasets, zip_of(moved)).dataset_id != first.dataset_id


def test_a_labelled_dataset_is_never_taken_for_an_unlabelled_one(datasets: DatasetStore) -> None:
    labelled = upload(datasets, IMAGES)
    unlabelled = send(datasets, zip_of(FILES))
    assert labelled.image_count == unlabelled.image_count
    assert labelled.dataset_id != unlabelled.dataset_id
    assert not datasets.get(labelled.dataset_id, TENANT).is_unlabelled


def test_an_archive_on_the_servers_disk_is_imported_without_classes(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    archive = tmp_path / "target.zip"
    archive.write_bytes(zip_of(LOOSE))
    record = datasets.import_archive(archive, tenant=TENANT, is_unlabelled=True)
    assert set(stored(datasets, record)) == set(LOOSE)
