"""Datasets read for jobs from the server's own disk, and what makes a reading stop."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.contract import ImageSource
from service.engine.preprocess import ImageFacts
from service.errors import Expired, GraftError, InvalidInput, Reason, Unavailable
from service.ingest import index
from service.ingest.index import Index
from service.storage.datasets import DatasetStore, Limits
from tests.unit.ingest.packing import FILES, tar_gz_of
from tests.unit.storage.conftest import GUARD_S, TENANT, FakeReader, MakeDatasets
from tests.unit.storage.test_datasets import IMAGES, leftovers, upload


def test_an_archive_on_the_servers_disk_is_imported(datasets: DatasetStore, tmp_path: Path) -> None:
    archive = tmp_path / "pets.tar.gz"
    archive.write_bytes(tar_gz_of(FILES))
    record = datasets.import_archive(archive, tenant=TENANT)
    assert record.display_name == "pets.tar.gz"
    assert record == datasets.import_archive(archive, tenant=TENANT)
    assert archive.exists()
    assert leftovers(tmp_path) == []


def test_closing_makes_an_import_give_up(make_datasets: MakeDatasets, tmp_path: Path) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def inspect(_data: bytes, _name: str) -> ImageFacts:
        decoding.set()
        assert go_on.wait(GUARD_S)
        return ImageFacts(1, 0)

    datasets = make_datasets(reader=FakeReader(inspect, 1))
    with ThreadPoolExecutor(1) as pool:
        importing = pool.submit(upload, datasets, IMAGES)
        assert decoding.wait(GUARD_S)
        datasets.close()
        go_on.set()
        with pytest.raises(Unavailable) as caught:
            importing.result(GUARD_S)
    assert caught.value.reason is Reason.SHUTTING_DOWN
    with pytest.raises(GraftError):
        datasets.begin_upload("", "", tenant=TENANT)
    assert leftovers(tmp_path) == []


def test_an_upload_whose_caller_has_gone_gives_up(make_datasets: MakeDatasets) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def inspect(_data: bytes, _name: str) -> ImageFacts:
        decoding.set()
        assert go_on.wait(GUARD_S)
        return ImageFacts(1, 0)

    datasets = make_datasets(reader=FakeReader(inspect, 1))
    sending = datasets.begin_upload("", "", tenant=TENANT)
    for label, content, part in IMAGES:
        sending.add_image(label, content, "", part)
    with ThreadPoolExecutor(1) as pool:
        importing = pool.submit(sending.finish)
        assert decoding.wait(GUARD_S)
        sending.abandon()
        go_on.set()
        with pytest.raises(Expired):
            importing.result(GUARD_S)
    assert datasets.list(0, "", TENANT) == ([], "")


def lay(root: Path, entries: dict[str, bytes]) -> Path:
    for name, content in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def loaded(source: ImageSource) -> Index:
    return index.load(Path(source.index_file))


def test_a_folder_of_the_server_is_read_where_it_lies(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    folder, told = lay(tmp_path / "pets", FILES), list[tuple[int, int]]()
    source = datasets.read_folder(
        folder,
        tmp_path / "work",
        tenant=TENANT,
        on_progress=lambda *counts: told.append(counts),
    )
    assert source == ImageSource(folder=str(folder), index_file=source.index_file)
    read = loaded(source)
    assert [(image.label, image.path) for image in read.images] == [
        ("cat", "cat/1.png"), ("cat", "cat/deep/2.png"), ("dog", "dog/3.png"),
    ]  # fmt: skip
    assert read.digest == upload(datasets, IMAGES).digest
    assert told == [(n, 3) for n in range(4)]
    assert sorted(path.name for path in folder.rglob("*.png")) == ["1.png", "2.png", "3.png"]
    some = datasets.read_folder(folder, tmp_path / "some", tenant=TENANT, most=2)
    assert loaded(some).summary.used == 2
    target = datasets.read_folder(folder, tmp_path / "target", tenant=TENANT, is_unlabelled=True)
    assert not loaded(target).is_labelled


def test_a_folder_of_the_server_with_too_many_files_is_refused(
    make_datasets: MakeDatasets, tmp_path: Path
) -> None:
    datasets = make_datasets(Limits(1000, 1000, 5))
    folder = lay(tmp_path / "pets", FILES)
    with pytest.raises(InvalidInput, match="more than 5 files and folders") as caught:
        datasets.read_folder(folder, tmp_path / "work", tenant=TENANT)
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_leaving_jobs_makes_their_imports_give_up_and_lets_uploads_end(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    datasets.leave_jobs()
    with pytest.raises(Unavailable):
        datasets.import_archive(tmp_path / "archive.tar", tenant=TENANT)
    with pytest.raises(Unavailable):
        datasets.read_folder(lay(tmp_path / "pets", FILES), tmp_path / "work", tenant=TENANT)
    assert upload(datasets, IMAGES).image_count == 3
