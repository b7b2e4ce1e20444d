import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import class_folders
from service.class_folders import SplitName
from service.domain import ClassCount
from service.errors import GraftError, InvalidInput, NotFound, Reason, Unavailable, WrongState
from service.storage.database import Database
from service.storage.datasets import DatasetRecord, DatasetStore, Limits, Upload
from service.storage.entry_names import file_name, label_problem
from tests.unit.storage.conftest import GUARD_S, LIMITS, TENANT, MakeDatasets, decoders
from tests.unit.storage.test_archives import FILES, tar_gz_of, tar_of, zip_of

Images = list[tuple[str, bytes, SplitName]]
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


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "datasets" / "tmp").iterdir())


def add_job(database: Database, dataset_id: str, state: str) -> None:
    ended = None if state in ("QUEUED", "RUNNING") else 1.0
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO jobs (job_id, fingerprint, model, dataset_id, device, request_json,"
            " state, create_time_s, end_time_s) VALUES ('job-1', '', 'm', ?, 'cpu', '{}', ?, 0, ?)",
            (dataset_id, state, ended),
        )


def test_images_become_a_dataset_that_can_be_read(datasets: DatasetStore, tmp_path: Path) -> None:
    record = upload(datasets, IMAGES)
    assert record.dataset_id == "ds-" + record.digest[:20]
    assert record.display_name == "pets"
    assert record.classes == [ClassCount("cat", 2, 0), ClassCount("dog", 1, 0)]
    assert (record.image_count, record.size_bytes, record.rejected_count) == (3, 12, 0)
    assert not record.has_validation_split
    assert datasets.get(record.dataset_id, TENANT) == record
    files = class_folders.find(datasets.path(record.dataset_id))
    assert sorted((f.label, f.path.read_bytes()) for f in files) == [
        ("cat", b"PIC1"), ("cat", b"PIC2"), ("dog", b"PIC3"),
    ]  # fmt: skip
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("make", [tar_of, tar_gz_of, zip_of])
def test_an_archive_and_single_images_with_the_same_content_are_one_dataset(
    datasets: DatasetStore, make: object, tmp_path: Path
) -> None:
    first = upload(datasets, IMAGES)
    second = send(datasets, make({f"wrapped/{k}": v for k, v in FILES.items()}))  # type: ignore[operator]
    assert second == first
    assert datasets.list(0, "", TENANT)[0] == [first]
    assert leftovers(tmp_path) == []


def test_the_same_upload_from_two_threads_at_once_makes_one_dataset(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda n: upload(datasets, IMAGES, f"name {n}"), range(8)))
    assert len({record.dataset_id for record in records}) == 1
    assert len({record.create_time_s for record in records}) == 1
    assert leftovers(tmp_path) == []


def test_an_archive_on_the_servers_disk_is_imported(datasets: DatasetStore, tmp_path: Path) -> None:
    archive = tmp_path / "pets.tar.gz"
    archive.write_bytes(tar_gz_of(FILES))
    record = datasets.import_archive(archive, tenant=TENANT)
    assert record.display_name == "pets.tar.gz"
    assert record == datasets.import_archive(archive, tenant=TENANT)
    assert archive.exists()
    assert leftovers(tmp_path) == []


def test_splits_that_are_named_are_kept(datasets: DatasetStore) -> None:
    record = upload(
        datasets,
        [("cat", b"PIC1", "train"), ("dog", b"PIC2", "train"), ("dog", b"PIC3", "val")],
    )
    assert record.has_validation_split
    assert record.classes == [ClassCount("cat", 1, 0), ClassCount("dog", 1, 1)]


def test_files_that_are_no_images_are_left_out_and_listed(datasets: DatasetStore) -> None:
    bad = {f"cat/bad{n:03}.txt": b"text" for n in range(60)}
    bad |= {f"dog/bad{n:03}.txt": b"text" for n in range(30)}
    record = send(datasets, zip_of({**FILES, **bad}))
    assert record.image_count == 3
    assert record.rejected_count == 90
    assert record.rejected[0].path == "cat/bad000.txt"
    assert record.rejected[0].detail == "no image"
    assert len(class_folders.find(datasets.path(record.dataset_id))) == 3


def test_no_more_than_a_hundred_rejected_files_are_listed(make_datasets: MakeDatasets) -> None:
    datasets = make_datasets(Limits(10**6, 10**6, 1000))
    bad = {f"cat/bad{n:03}.txt": b"text" for n in range(150)}
    record = send(datasets, tar_of({**FILES, **bad}))
    assert (record.rejected_count, len(record.rejected)) == (150, 100)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([("cat", b"PIC1", "")], "of 1 classes, and 2 are needed"),
        ([("cat", b"PIC1", ""), ("dog", b"bad", "")], "1 are no readable images, such as 'dog/"),
        ([("cat", b"PIC1", "val"), ("dog", b"PIC1", "val")], "of 0 classes"),
        (
            [("cat", b"P", "train"), ("cat", b"PIC1", "train"), ("dog", b"PIC1", "train"),
             ("emu", b"PIC1", "val")],
            "'emu' has validation images and none to learn from",
        ),
        ([], "brought nothing"),
    ],
    ids=["one class", "unreadable", "validation alone", "class without training", "nothing"],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused(
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


def test_a_bad_class_name_in_an_archive_is_refused(datasets: DatasetStore) -> None:
    with pytest.raises(InvalidInput, match="control characters") as caught:
        send(datasets, tar_of({**FILES, "a\nb/1": b"PIC"}))
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_a_class_name_in_two_unicode_forms_is_one_class(datasets: DatasetStore) -> None:
    record = upload(
        datasets, [("caf\u00e9", b"PIC1", ""), ("cafe\u0301", b"PIC2", ""), ("x", b"PIC", "")]
    )
    assert [c.label for c in record.classes] == ["caf\u00e9", "x"]


def test_a_class_called_train_is_refused_unless_the_splits_are_named(
    datasets: DatasetStore,
) -> None:
    with pytest.raises(InvalidInput, match="cannot be told from the folder"):
        upload(datasets, [("train", b"PIC1", ""), ("bus", b"PIC2", "")])
    record = upload(datasets, [("train", b"PIC1", "train"), ("bus", b"PIC2", "train")])
    assert [c.label for c in record.classes] == ["bus", "train"]


def test_a_class_called_val_is_a_class_like_any_other(datasets: DatasetStore) -> None:
    record = upload(datasets, [("val", b"PIC1", ""), ("bus", b"PIC2", "")])
    assert [c.label for c in record.classes] == ["bus", "val"]


@pytest.mark.parametrize("splits", [("", "train"), ("train", ""), ("val", "")])
def test_either_all_images_name_their_split_or_none(
    datasets: DatasetStore, splits: tuple[SplitName, SplitName]
) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    sending.add_image("cat", b"PIC", "", splits[0])
    with pytest.raises(InvalidInput, match="for all or for none"):
        sending.add_image("dog", b"PIC", "", splits[1])


def test_an_archive_and_images_do_not_mix(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    sending.add_image("cat", b"PIC", "", "")
    with pytest.raises(InvalidInput, match="send either"):
        sending.write(b"bytes")
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
    sending = make_datasets(Limits(1000, 1000, 2)).begin_upload("", "", tenant=TENANT)
    with pytest.raises(InvalidInput, match="more than 2 images") as caught:
        as_images(sending)
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
        with pytest.raises(WrongState):
            sending.write(b"more")
        with pytest.raises(WrongState):
            sending.finish()
    assert leftovers(tmp_path) == []
    assert datasets.list(0, "", TENANT) == ([], "")


def test_an_abort_after_the_finish_is_harmless(datasets: DatasetStore) -> None:
    sending = datasets.begin_upload("", "", tenant=TENANT)
    for label, content, split in IMAGES:
        sending.add_image(label, content, "", split)
    record = sending.finish()
    sending.abort()
    assert datasets.get(record.dataset_id, TENANT) == record
    assert class_folders.find(datasets.path(record.dataset_id))


def test_what_a_crash_left_is_swept_and_what_is_stored_stays(
    datasets: DatasetStore, make_datasets: MakeDatasets, tmp_path: Path
) -> None:
    record = upload(datasets, IMAGES)
    half = tmp_path / "data" / "datasets" / "tmp" / "0123"
    half.mkdir()
    (half / "archive").write_bytes(b"half")
    orphan = datasets.path("ds-" + "0" * 20)
    (orphan / "cat").mkdir(parents=True)
    again = make_datasets()
    assert leftovers(tmp_path) == []
    assert not orphan.exists()
    assert len(class_folders.find(again.path(record.dataset_id))) == 3


def test_a_deleted_dataset_is_gone_and_can_come_again(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    record = upload(datasets, IMAGES)
    datasets.delete(record.dataset_id, TENANT)
    assert not datasets.path(record.dataset_id).exists()
    for missing in (datasets.get, datasets.delete):
        with pytest.raises(NotFound) as caught:
            missing(record.dataset_id, TENANT)
        assert caught.value.reason is Reason.DATASET_NOT_FOUND
    assert upload(datasets, IMAGES).dataset_id == record.dataset_id
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "is_in_use"), [("QUEUED", True), ("RUNNING", True), ("CANCELLED", False)]
)
def test_a_dataset_stays_while_a_job_needs_it(
    datasets: DatasetStore, database: Database, state: str, is_in_use: bool
) -> None:
    record = upload(datasets, IMAGES)
    add_job(database, record.dataset_id, state)
    if is_in_use:
        with pytest.raises(WrongState, match="used by job-1") as caught:
            datasets.delete(record.dataset_id, TENANT)
        assert caught.value.reason is Reason.DATASET_IN_USE
        assert datasets.path(record.dataset_id).exists()
    else:
        datasets.delete(record.dataset_id, TENANT)


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


def test_closing_makes_an_import_give_up(database: Database, tmp_path: Path) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def decode(_: bytes) -> None:
        decoding.set()
        assert go_on.wait(GUARD_S)

    datasets = DatasetStore(database, tmp_path / "ds", decoders(decode, 1), LIMITS)
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
    assert list((tmp_path / "ds" / "tmp").iterdir()) == []


def test_leaving_jobs_makes_their_imports_give_up_and_lets_uploads_end(
    datasets: DatasetStore, tmp_path: Path
) -> None:
    datasets.leave_jobs()
    with pytest.raises(Unavailable):
        datasets.import_archive(tmp_path / "archive.tar", tenant=TENANT)
    assert upload(datasets, IMAGES).image_count == 3


@given(st.text(max_size=300), st.integers(1, 10**6))
def test_any_name_becomes_a_safe_file_name_of_its_own(said: str, place: int) -> None:
    name = file_name(said, place)
    assert "/" not in name
    assert name.isprintable() or not any(c in name for c in "\0\n\r")
    assert not name.startswith(".")
    assert len(os.fsencode(name)) <= 255
    assert name.startswith(f"{place:06d}")


@given(st.text(max_size=200))
def test_a_label_that_passes_can_be_a_folder_below_its_parent(label: str) -> None:
    if not label_problem(label):
        path = Path("/root") / label
        assert path.parent == Path("/root")
        assert path.name == label
        assert len(os.fsencode(label)) <= 255


def test_images_can_be_stored_though_a_folder_without_a_row_has_their_name(
    datasets: DatasetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = upload(datasets, IMAGES)
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path == datasets.path(dataset.dataset_id):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", refused)
        datasets.delete(dataset.dataset_id, TENANT)
    assert datasets.path(dataset.dataset_id).exists()
    assert upload(datasets, IMAGES).dataset_id == dataset.dataset_id
    kept = [path for path in datasets.path(dataset.dataset_id).rglob("*") if path.is_file()]
    assert len(kept) == len(IMAGES)
    assert list(datasets._temporary.iterdir()) == []
