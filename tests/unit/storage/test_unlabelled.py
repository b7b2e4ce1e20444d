from pathlib import Path

import pytest

from service.errors import InvalidInput, Reason
from service.storage.datasets import DatasetRecord, DatasetStore
from tests.unit.storage.conftest import TENANT
from tests.unit.storage.test_archives import FILES, tar_gz_of, zip_of
from tests.unit.storage.test_datasets import IMAGES, leftovers, upload

LOOSE = {"a.png": b"PIC1", "deep/er/b.png": b"PIC2"}


def send(datasets: DatasetStore, archive: bytes) -> DatasetRecord:
    sending = datasets.begin_upload("target", "", tenant=TENANT, is_unlabelled=True)
    sending.write(archive)
    return sending.finish()


def stored(datasets: DatasetStore, record: DatasetRecord) -> dict[str, bytes]:
    root = datasets.path(record.dataset_id)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_an_archive_without_classes_keeps_its_images_at_any_depth(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    record = send(datasets, zip_of({**LOOSE, "notes.txt": b"text"}))
    assert record.is_unlabelled
    assert (record.classes, record.image_count, record.rejected_count) == ([], 2, 1)
    assert not record.has_validation_split
    assert stored(datasets, record) == LOOSE
    assert datasets.get(record.dataset_id, TENANT) == record
    assert leftovers(tmp_path) == []


def test_images_keep_their_class_folders_and_those_without_one_lie_beside_them(
    datasets: DatasetStore,
) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=True)
    for label, content in (("cat", b"PIC1"), ("", b"PIC2"), ("", b"PIC3")):
        sending.add_image(label, content, "x.png", "")
    record = sending.finish()
    assert stored(datasets, record) == {
        "cat/000001-x.png": b"PIC1",
        "unlabelled/000002-x.png": b"PIC2",
        "unlabelled/000003-x.png": b"PIC3",
    }


def test_one_image_is_enough_and_none_is_not(datasets: DatasetStore, tmp_path: Path) -> None:
    assert send(datasets, zip_of({"a.png": b"PIC1"})).image_count == 1
    for content in ({"a.png": b"text"}, {}):
        with pytest.raises(InvalidInput) as caught:
            send(datasets, zip_of(content))
        assert caught.value.reason is Reason.DATASET_UNUSABLE
    assert leftovers(tmp_path) == []


def test_an_image_without_classes_has_no_split(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=True)
    with pytest.raises(InvalidInput) as caught:
        sending.add_image("cat", b"PIC1", "", "val")
    assert caught.value.field == "image.split"


def test_the_same_images_in_the_same_folders_are_one_dataset_and_in_others_another(
    datasets: DatasetStore,
) -> None:
    first = send(datasets, zip_of(FILES))
    assert send(datasets, tar_gz_of(FILES)) == first
    moved = {f"x/{name}": content for name, content in FILES.items()}
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
    assert stored(datasets, record) == LOOSE
