"""What is uploaded is what lies there: streamed, in bounded memory, whole or not at all."""

import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graft
import numpy as np
import pytest
from graft import _uploads
from graft.testing import FakeGraft
from PIL import Image


def expected(folder: Path) -> list[tuple[str, str, bytes]]:
    return [
        ("", label, (folder / label / f"{number}.jpg").read_bytes())
        for label in ("cat", "dog")
        for number in range(3)
    ]


def test_a_folder_arrives_without_hidden_files_and_links(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    dataset = client.upload_dataset(folder)
    assert server.images(dataset.dataset_id) == expected(folder)
    assert dataset.display_name == "pets"
    assert dataset.classes == (graft.ClassCount("cat", 3, 0), graft.ClassCount("dog", 3, 0))


def test_a_folder_with_splits_keeps_them(client: Any, server: FakeGraft, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0.jpg").write_text(f"{split} {label}")
    dataset = client.upload_dataset(str(tmp_path), display_name="split")
    assert dataset.has_validation_split
    assert dataset.classes == (graft.ClassCount("cat", 1, 1), graft.ClassCount("dog", 1, 1))


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
    dataset = client.upload_dataset(path)
    assert server.images(dataset.dataset_id) == expected(folder)


def test_the_same_images_get_the_same_id_whichever_way_they_come(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    pairs = [(label, data) for _, label, data in expected(folder)]
    assert client.upload_dataset(folder).dataset_id == client.upload_dataset(pairs).dataset_id


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
    sent = server.images(client.upload_dataset(pairs).dataset_id)
    assert [data for _, label, data in sent if label == "cat"] == [
        (folder / "cat" / "0.jpg").read_bytes(),
        b"bytes",
    ]
    for _, label, data in sent:
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
        assert [(m.name, m.size) for m in tar] == [("cat/big.jpg", size), ("dog/big.jpg", size)]


def test_names_longer_and_stranger_than_a_tar_header_arrive(
    client: Any, server: FakeGraft, tmp_path: Path
) -> None:
    label = "Käfer 🐞 " + "x" * 90
    for name in (label, "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("n" * 120 + ".jpg")).write_text(name)
    dataset = client.upload_dataset(tmp_path)
    assert {count.label for count in dataset.classes} == {label, "dog"}


def test_an_upload_tells_how_far_it_is(client: Any, server: FakeGraft, folder: Path) -> None:
    told: list[tuple[int, int | None]] = []
    client.upload_dataset(folder, on_progress=lambda sent, total: told.append((sent, total)))
    total = sum(len(data) for _, _, data in expected(folder))
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

    server.fail("UploadDataset", graft.InvalidArgument("no", reason="DATASET_UNUSABLE"))
    with pytest.raises(graft.InvalidArgument):
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
    with pytest.raises(graft.InvalidArgument, match="became shorter"):
        list(messages)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "a int is no data"),
        ([("cat", b"x"), "dog"], r"data\[1\] is no pair"),
        ([("cat", 3)], r"data\[0\]: a int is no image"),
    ],
)
def test_what_is_no_data_is_refused_with_what_is(client: Any, data: Any, message: str) -> None:
    with pytest.raises(graft.InvalidArgument, match=message):
        client.upload_dataset(data)


def test_an_empty_folder_and_a_missing_one_are_refused(client: Any, tmp_path: Path) -> None:
    with pytest.raises(graft.InvalidArgument, match="holds no files"):
        client.upload_dataset(tmp_path)
    with pytest.raises(FileNotFoundError):
        client.upload_dataset(tmp_path / "nope")


def test_what_the_service_has_already_is_not_uploaded(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    dataset = client.upload_dataset(folder)
    for data in (dataset, dataset.dataset_id, graft.ServerPath("/images")):
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
    with pytest.raises(graft.NotFound):
        client.fine_tune("ds-pets", "pets")
