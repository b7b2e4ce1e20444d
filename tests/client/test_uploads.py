"""What is uploaded is what lies there: streamed, in bounded memory, whole or not at all."""

import errno
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import graftml
import numpy as np
import pytest
from graftml import _answers, _uploads
from graftml.testing import FakeGraft
from graftml_stubs.v1 import dataset_pb2 as pb
from PIL import Image

from service.ingest import layout
from tests.client.conftest import arrived


def expected(folder: Path) -> list[tuple[str, bytes]]:
    return [
        (f"{label}/{number}.jpg", (folder / label / f"{number}.jpg").read_bytes())
        for label in ("cat", "dog")
        for number in range(3)
    ]


def test_a_folder_arrives_without_hidden_files_and_links(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    dataset = client.upload_dataset(folder)
    [sent] = server.requests("UploadDataset")
    assert arrived(sent) == expected(folder)
    assert dataset.display_name == "pets"
    assert dataset.classes == (graftml.ClassCount("cat", 3, 0), graftml.ClassCount("dog", 3, 0))
    assert (dataset.summary.seen_count, dataset.summary.used_count) == (8, 6)
    assert {(file.path, file.reason) for file in dataset.summary.files} == {
        ("cat/.hidden", "hidden"),
        ("dog/link.jpg", "link"),
    }
    assert str(dataset.summary) == "6 of 8 files are used; left out: 1 link, 1 hidden"


def test_a_summary_has_every_reason_and_one_that_is_too_new() -> None:
    numbers = sorted(pb.LeftOutReason.values())
    message = pb.UploadDatasetResponse(
        dataset=pb.Dataset(
            summary=pb.ReadSummary(
                seen_count=40,
                used_count=3,
                left_out=[
                    pb.LeftOut(reason=number, label="cat", count=2)  # type: ignore[arg-type]
                    for number in [*numbers, 99]
                ],
                left_out_files=[
                    pb.LeftOutFile(
                        path="cat/x", label="cat", reason=pb.LEFT_OUT_REASON_COPY, detail="why"
                    )
                ],
                nested_count=1,
                warnings=["look at it"],
            ),
            classes=[pb.ClassCount(label="cat", train_count=1, validation_count=2, test_count=3)],
            case_sensitive_labels=True,
        )
    )
    dataset = _answers.dataset(message.dataset)
    known = [name for name in get_args(graftml.LeftOutReason) if name != "unknown"]
    reasons = [row.reason for row in dataset.summary.left_out]
    assert reasons == ["unknown", *known, "unknown"]
    assert dataset.summary.left_out[1] == graftml.LeftOut("unreadable", "cat", 2)
    assert dataset.summary.files == (graftml.LeftOutFile("cat/x", "cat", "copy", "why"),)
    assert (dataset.summary.left_out_count, dataset.summary.nested_count) == (37, 1)
    assert dataset.summary.warnings == ("look at it",)
    assert dataset.classes == (graftml.ClassCount("cat", 1, 2, 3),)
    assert dataset.case_sensitive_labels


def test_a_jobs_data_summary_tells_what_was_left_out(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    job = client.fine_tune(folder, "pets")
    told = [e.payload for e in job.events() if isinstance(e.payload, graftml.DataSummary)]
    assert [(t.summary.seen_count, t.summary.left_out_count) for t in told] == [(8, 2)]
    assert client.get_job(job.job_id).data_summary == told[0].summary


def test_the_tar_of_a_folder_names_all_that_is_there_and_holds_images_alone(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "cat" / "deep").mkdir()
    (folder / "cat" / "deep" / "0.jpg").write_bytes(b"deep")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "also dog").symlink_to(folder / "dog")
    os.mkfifo(folder / "cat" / "pipe")
    sent = list(_uploads.prepare(folder, "", None).messages())
    with tarfile.open(fileobj=io.BytesIO(b"".join(m.archive_chunk for m in sent))) as tar:
        found = {member.name: (member.type, member.size) for member in tar}
        assert all(not member.linkname for member in tar)
    size = len(b"cat 0" * 100)
    assert found == {
        ".cache": (tarfile.DIRTYPE, 0),
        "also dog": (tarfile.SYMTYPE, 0),
        "cat": (tarfile.DIRTYPE, 0),
        "cat/.hidden": (tarfile.REGTYPE, 0),
        "cat/deep": (tarfile.DIRTYPE, 0),
        "cat/deep/0.jpg": (tarfile.REGTYPE, 4),
        "cat/pipe": (tarfile.FIFOTYPE, 0),
        "dog": (tarfile.DIRTYPE, 0),
        "dog/link.jpg": (tarfile.SYMTYPE, 0),
        "empty": (tarfile.DIRTYPE, 0),
        "gone": (tarfile.SYMTYPE, 0),
        **{f"cat/{n}.jpg": (tarfile.REGTYPE, size) for n in range(3)},
        **{f"dog/{n}.jpg": (tarfile.REGTYPE, size) for n in range(3)},
    }


@pytest.mark.parametrize("name", ["cat", "cat/1.jpg"])
def test_what_may_not_be_read_is_refused_before_anything_is_sent(
    client: Any, server: FakeGraft, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' user may read everything.
    denied = str(folder / name)
    scandir, access = os.scandir, os.access

    def scan(path: Any) -> Any:
        if os.fspath(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", denied)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(
        os, "access", lambda path, mode: os.fspath(path) != denied and access(path, mode)
    )
    with pytest.raises(graftml.InvalidArgument, match=f"{name} may not be read"):
        client.upload_dataset(folder)
    assert not server.requests("UploadDataset")


def test_files_and_folders_of_systems_are_named_and_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lost+found", "cat/@eaDir", "__MACOSX"):
        (folder / name).mkdir()
        (folder / name / "0.jpg").write_bytes(b"a system's")
    (folder / "dog" / "Thumbs.db").write_bytes(b"a system's")
    scandir, denied = os.scandir, str(folder / "lost+found")

    def scan(path: Any) -> Any:
        # The tests' user may read everything.
        if os.fspath(path) == denied:
            raise PermissionError(errno.EACCES, "Permission denied", denied)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    sent = list(_uploads.prepare(folder, "", None).messages())
    assert arrived(sent) == expected(folder)
    with tarfile.open(fileobj=io.BytesIO(b"".join(m.archive_chunk for m in sent))) as tar:
        found = {member.name: (member.isdir(), member.size) for member in tar}
    for name in ("lost+found", "cat/@eaDir", "__MACOSX"):
        assert found[name] == (True, 0)
        assert f"{name}/0.jpg" not in found
    assert found["dog/Thumbs.db"] == (False, 0)


def test_the_service_knows_the_same_names_of_systems() -> None:
    assert _uploads.SYSTEM_NAMES == layout._SYSTEM


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_arrives_as_it_is(
    client: Any, server: FakeGraft, folder: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"pets.{kind}"
    images = sorted(p for p in folder.rglob("[0-9].jpg"))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for image in images:
                zipped.write(image, image.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
            for image in images:
                tar.add(image, image.relative_to(folder))
    client.upload_dataset(path)
    assert arrived(server.requests("UploadDataset")[0]) == expected(folder)


def test_labelled_images_arrive_as_files_whatever_they_were(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    pairs: list[tuple[str, Any]] = [
        ("cat", folder / "cat" / "0.jpg"),
        ("cat", b"bytes"),
        ("dog", pixels),
        ("dog", (pixels / 255).astype(np.float32)),
        ("dog", Image.fromarray(pixels)),
    ]
    client.upload_dataset(pairs)
    sent = arrived(server.requests("UploadDataset")[0])
    assert [data for label, data in sent if label == "cat"] == [
        (folder / "cat" / "0.jpg").read_bytes(),
        b"bytes",
    ]
    for label, data in sent:
        if label == "dog":
            with Image.open(io.BytesIO(data)) as image:
                assert image.mode == "RGB"
                assert np.array_equal(np.asarray(image), pixels)


def test_a_large_file_is_sent_in_chunks_and_never_held_whole(tmp_path: Path) -> None:
    size = 3 * _uploads.CHUNK_BYTES + 17
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "big.jpg").write_bytes(label[:1].encode() * size)
    upload = _uploads.prepare(tmp_path, "", None)
    header, *chunks, end = upload.messages()
    assert header.WhichOneof("part") == "header"
    assert end.end.message_count == len(chunks)
    assert {len(chunk.archive_chunk) for chunk in chunks[:-1]} == {_uploads.CHUNK_BYTES}
    archive = io.BytesIO(b"".join(chunk.archive_chunk for chunk in chunks))
    with tarfile.open(fileobj=archive) as tar:
        found = [(m.name, m.size) for m in tar if m.isfile()]
    assert found == [("cat/big.jpg", size), ("dog/big.jpg", size)]


def test_names_longer_and_stranger_than_a_tar_header_arrive(
    client: Any, server: FakeGraft, tmp_path: Path
) -> None:
    label = "Käfer 🐞 " + "x" * 90
    for name in (label, "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("n" * 120 + ".jpg")).write_text(name)
    client.upload_dataset(tmp_path)
    names = [name for name, _ in arrived(server.requests("UploadDataset")[0])]
    assert {name.partition("/")[0] for name in names} == {label, "dog"}


def test_an_upload_tells_how_far_it_is(client: Any, server: FakeGraft, folder: Path) -> None:
    told: list[tuple[int, int | None]] = []
    client.upload_dataset(folder, on_progress=lambda sent, total: told.append((sent, total)))
    total = sum(len(data) for _, data in expected(folder))
    assert told[-1] == (total, total)


def test_an_upload_reads_no_further_ahead_than_the_connection_takes(
    client: Any, server: FakeGraft
) -> None:
    taken, hold = [0], threading.Event()

    def endless() -> Iterator[tuple[str, bytes]]:
        # 200 MB at most; the server refuses the second image at once.
        for number in range(200):
            taken[0] = number
            yield ("cat" if number % 2 else "dog", bytes(1_000_000))
        hold.set()

    server.fail("UploadDataset", graftml.InvalidArgument("no", reason="DATASET_UNUSABLE"))
    with pytest.raises(graftml.InvalidArgument):
        client.upload_dataset(endless())
    assert taken[0] < 100
    assert not hold.is_set()


def test_an_upload_whose_file_is_gone_is_no_smaller_dataset(
    client: Any, server: FakeGraft, tmp_path: Path
) -> None:
    pairs: list[tuple[str, Any]] = [
        ("cat", b"1"),
        ("dog", b"2"),
        ("dog", tmp_path / "gone.jpg"),
    ]
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        client.upload_dataset(pairs)
    assert list(client.list_datasets()) == []


def test_a_folder_that_loses_a_file_while_it_is_sent_is_no_smaller_dataset(
    client: Any, folder: Path
) -> None:
    (folder / "cat" / "0.jpg").write_bytes(bytes(4 * _uploads.CHUNK_BYTES))
    with pytest.raises(FileNotFoundError, match=r"2\.jpg"):
        client.upload_dataset(
            folder, on_progress=lambda *_: (folder / "dog" / "2.jpg").unlink(missing_ok=True)
        )
    assert list(client.list_datasets()) == []


def test_a_file_that_becomes_shorter_while_it_is_sent_is_noticed(folder: Path) -> None:
    image = folder / "cat" / "0.jpg"
    image.write_bytes(bytes(4 * _uploads.CHUNK_BYTES))
    messages = _uploads.prepare(folder, "", None).messages()
    next(messages)
    next(messages)
    image.write_bytes(b"")
    with pytest.raises(graftml.InvalidArgument, match="became shorter"):
        list(messages)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "a int is not data"),
        ([("cat", b"x"), "dog"], r"data\[1\] is a str, no pair: give a label"),
        ([("cat", 3)], r"data\[0\]: a int is not an image"),
    ],
)
def test_what_is_no_data_is_refused_with_what_is(client: Any, data: Any, message: str) -> None:
    with pytest.raises(graftml.InvalidArgument, match=message):
        client.upload_dataset(data)


def test_an_empty_folder_and_a_missing_one_are_refused(client: Any, tmp_path: Path) -> None:
    with pytest.raises(graftml.InvalidArgument, match="holds no files"):
        client.upload_dataset(tmp_path)
    with pytest.raises(FileNotFoundError):
        client.upload_dataset(tmp_path / "nope")


def test_what_the_service_has_already_is_not_uploaded(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    dataset = client.upload_dataset(folder)
    for data in (dataset, dataset.dataset_id, graftml.ServerPath("/images")):
        client.fine_tune(data, "pets")
    assert [call.method for call in server.calls].count("UploadDataset") == 1
    requests = server.requests("FineTune")
    assert [request.WhichOneof("data") for request in requests] == [
        "dataset_id",
        "dataset_id",
        "server_path",
    ]


def test_a_folder_that_is_named_like_a_dataset_is_uploaded_as_a_path(
    client: Any, server: FakeGraft, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(folder.parent / "ds-pets")
    monkeypatch.chdir(folder.parent)
    client.fine_tune(Path("ds-pets"), "pets").wait()
    with pytest.raises(graftml.NotFound):
        client.fine_tune("ds-pets", "pets")


def test_a_third_place_beside_an_image_names_its_group() -> None:
    data = [("cat", b"1", "litter 1"), ("dog", b"2"), ("hen", b"3", None)]
    images = [m.image for m in _uploads.prepare(data, "", None).messages() if m.HasField("image")]
    assert [(image.label, image.group) for image in images] == [
        ("cat", "litter 1"), ("dog", ""), ("hen", ""),
    ]  # fmt: skip
