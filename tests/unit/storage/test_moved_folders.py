"""Data folders behind links, and archives that are swapped between the look and the reading."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from service.domain import DEFAULT_TENANT
from service.errors import InvalidInput, Reason
from service.ingest import reader
from service.ingest.archives import unpack
from service.ingest.layout import Entry
from service.storage.database import Database
from service.storage.dataset_keeping import DatasetKeeper
from service.storage.datasets import DatasetStore
from tests.unit.ingest.packing import FILES, tar_of
from tests.unit.storage.conftest import LIMITS, QUOTAS, FakeReader, make_blobs
from tests.unit.storage.test_datasets import leftovers, stored

OTHERS = {f"{label}/other.png": b"PIC of somebody else" for label in ("cat", "dog")}


def test_a_data_folder_that_is_reached_by_a_link_keeps_datasets(
    database: Database, tmp_path: Path
) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk)
    (tmp_path / "pets.tar").write_bytes(tar_of(FILES))
    keeper = DatasetKeeper(database, make_blobs(database, link), QUOTAS, link / "work")
    datasets = DatasetStore(database, keeper, FakeReader(), LIMITS, QUOTAS)
    record = datasets.import_archive(tmp_path / "pets.tar", tenant=DEFAULT_TENANT)
    assert len(stored(datasets, record.dataset_id)) == len(FILES)


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_an_archive_that_has_become_a_link_is_not_read(
    datasets: DatasetStore, tmp_path: Path, swapped: str
) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    outside.mkdir()
    (outside / "pets.tar").write_bytes(tar_of(OTHERS))
    if swapped == "folder":
        allowed.symlink_to(outside)
    else:
        allowed.mkdir()
        (allowed / "pets.tar").symlink_to(outside / "pets.tar")
    with pytest.raises(InvalidInput, match="has become a link") as caught:
        datasets.import_archive(allowed / "pets.tar", tenant=DEFAULT_TENANT)
    assert caught.value.reason is Reason.ARCHIVE_UNREADABLE
    assert datasets.list(0, "", tenant=DEFAULT_TENANT)[0] == []
    assert leftovers(tmp_path) == []


def test_an_archive_that_cannot_be_opened_just_now_is_no_fault_of_its_owner(
    datasets: DatasetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pets.tar").write_bytes(tar_of(FILES))

    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(reader, "open_plain", fails)
        with pytest.raises(OSError, match="Too many open files"):
            datasets.import_archive(tmp_path / "pets.tar", tenant=DEFAULT_TENANT)
    assert datasets.import_archive(tmp_path / "pets.tar", tenant=DEFAULT_TENANT).image_count


def test_an_archive_that_is_swapped_while_it_is_read_is_the_one_that_was_opened(
    datasets: DatasetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, other = tmp_path / "pets.tar", tmp_path / "other.tar"
    archive.write_bytes(tar_of(FILES))
    other.write_bytes(tar_of(OTHERS))

    def swap(*args: object) -> list[Entry]:
        shutil.move(other, archive)
        return unpack(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("service.ingest.reader.archives.unpack", swap)
    stored = datasets.import_archive(archive, tenant=DEFAULT_TENANT)
    assert not other.exists(), "nothing was swapped"
    assert stored.image_count == len(FILES)
