"""Folders as they are listed, and whose files change between the look and the reading."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from service.domain import LeftOutFile, LeftOutReason
from service.engine.preprocess import ImageFacts
from service.errors import InvalidInput, Reason
from service.ingest import folder, reader
from service.ingest.folder import open_plain, read_plain, walk
from service.ingest.layout import Arranged, Kind, arrange
from service.ingest.packs import Location


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/cat/1.png", "root/cat/deep/2.png", "root/dog/3.png", "outside/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "root"


def look(root: Path, *, is_labelled: bool = True) -> Arranged:
    return arrange(walk(root), is_labelled=is_labelled)


def read(arranged: Arranged, root: Path) -> tuple[list[str], list[LeftOutFile]]:
    """Reads what was listed, any bytes for images: their names, and what is left out."""
    index = reader.examine(
        arranged, root, lambda data, name: ImageFacts(1, 0), 2, is_labelled=False
    )
    return [image.name for image in index.images], index.summary.files


def kinds(root: Path) -> dict[str, Kind]:
    return {"/".join(entry.name): entry.kind for entry in walk(root)}


def test_a_folder_is_listed_with_the_kinds_of_what_it_holds(root: Path) -> None:
    (root / "dog/link.png").symlink_to("3.png")
    (root / "wasps").symlink_to("cat")
    os.link(root / "cat/1.png", root / "dog/hard.png")
    os.mkfifo(root / "dog/pipe")
    (root / ".git/deep").mkdir(parents=True)
    (root / "dog/@eaDir").mkdir()
    (root / "dog/@eaDir/3.jpg").write_bytes(b"x")
    assert kinds(root) == {
        "cat": Kind.FOLDER,
        "cat/1.png": Kind.FILE,
        "cat/deep": Kind.FOLDER,
        "cat/deep/2.png": Kind.FILE,
        "dog": Kind.FOLDER,
        "dog/3.png": Kind.FILE,
        "dog/link.png": Kind.LINK,
        "dog/hard.png": Kind.FILE,
        "dog/pipe": Kind.OTHER,
        "wasps": Kind.LINK,
        # What is in hidden and system folders is not listed.
        ".git": Kind.FOLDER,
        "dog/@eaDir": Kind.FOLDER,
    }
    assert {entry.location for entry in walk(root)} >= {Location(root / "cat/deep/2.png"), None}


def test_a_folder_with_too_many_entries_is_refused(root: Path) -> None:
    assert len(walk(root, 6)) == 6
    with pytest.raises(InvalidInput, match="more than 5 files and folders") as caught:
        walk(root, 5)
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_a_folder_that_is_not_there_is_refused(root: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file or directory") as caught:
        walk(root / "nowhere")
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_a_folder_below_that_may_not_be_read_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if path == root / "cat/deep":
            raise PermissionError(13, "Permission denied")
        return opened(path, flags)

    # By hand, since nothing is closed to the user who runs as root.
    monkeypatch.setattr(os, "open", refuse)
    found = kinds(root)
    assert found["cat/deep"] is Kind.DENIED
    assert len(found) == 5


@pytest.mark.parametrize("is_told", [True, False])
def test_a_file_that_is_too_large_is_left_out_unread(
    root: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 14)
    if not is_told:
        # One that grows while it is read.
        real = os.fstat
        monkeypatch.setattr(
            os, "fstat", lambda file: os.stat_result([*real(file)[:6], 1, *real(file)[7:10]])
        )
    assert read_plain(Location(root / "cat/1.png")) == b"root/cat/1.png"
    with pytest.raises(InvalidInput, match="larger than 14 bytes") as caught:
        read_plain(Location(root / "cat/deep/2.png"))
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE
    names, out = read(look(root), root)
    assert names == ["cat/1.png", "dog/3.png"]
    assert [(row.path, row.reason) for row in out] == [("cat/deep/2.png", LeftOutReason.UNREADABLE)]


def test_a_file_that_became_a_link_since_it_was_listed_is_left_out(root: Path) -> None:
    listed = look(root)
    (root / "cat/1.png").unlink()
    (root / "cat/1.png").symlink_to(root.parent / "outside/1.png")
    names, out = read(listed, root)
    assert names == ["cat/deep/2.png", "dog/3.png"]
    assert [row.path for row in out] == ["cat/1.png"]


def test_a_file_whose_folder_became_a_link_to_outside_is_left_out(root: Path) -> None:
    listed = look(root)
    shutil.rmtree(root / "cat")
    (root / "cat").symlink_to(root.parent / "outside")
    names, out = read(listed, root)
    assert names == ["dog/3.png"]
    assert sorted(row.path for row in out) == ["cat/1.png", "cat/deep/2.png"]


def test_a_pipe_is_not_waited_for_and_neither_it_nor_a_device_is_read(root: Path) -> None:
    listed = look(root)
    (root / "dog/3.png").unlink()
    os.mkfifo(root / "dog/3.png")
    _, out = read(listed, root)
    assert [(row.path, row.detail) for row in out] == [
        ("dog/3.png", "it is not a plain file of this folder")
    ]
    for path in (root / "dog/3.png", Path("/dev/zero")):
        with pytest.raises(InvalidInput, match="not a plain file"):
            open_plain(path, None)


@pytest.mark.parametrize("above", [0, 1])
def test_a_root_that_became_a_link_or_lies_behind_one_is_not_read(root: Path, above: int) -> None:
    deep = root / "cat"
    listed = look(deep, is_labelled=False)
    swapped = [deep, root][above]
    kept = root.parent / "kept"
    swapped.rename(kept)
    swapped.symlink_to(kept)
    with pytest.raises(InvalidInput, match="no image was found among 2 files"):
        read(listed, deep)
    # Nor is anything listed behind it.
    with pytest.raises(InvalidInput, match="the folder cannot be read"):
        look(deep, is_labelled=False)


def test_a_folder_that_became_a_link_since_its_own_was_listed_tells_no_names(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.png").write_bytes(b"1")
    opened = os.open

    def swap(path: Path, flags: int) -> int:
        if path == root / "cat/deep":
            path.rename(root.parent / "kept")
            path.symlink_to(elsewhere)
        return opened(path, flags)

    monkeypatch.setattr(os, "open", swap)
    found = kinds(root)
    assert found["cat/deep"] is Kind.DENIED
    assert not any("secret" in name for name in found)


def test_folders_nested_deeper_than_the_stack_are_read(tmp_path: Path) -> None:
    root = tmp_path / "r"
    (root / "dog").mkdir(parents=True)
    (root / "dog/1.png").write_bytes(b"1")
    (root / "cat").mkdir()
    handle = os.open(root / "cat", os.O_RDONLY)
    depth = 600
    for _ in range(depth):
        os.mkdir("d", dir_fd=handle)
        inner = os.open("d", os.O_RDONLY, dir_fd=handle)
        os.close(handle)
        handle = inner
    os.close(os.open("2.png", os.O_CREAT | os.O_WRONLY, dir_fd=handle))
    os.close(handle)
    try:
        assert [file.location.path.name for file in look(root).files] == ["2.png", "1.png"]
    finally:
        # Python's own removal is not made for it, and would fail at the end of all tests.
        subprocess.run(["rm", "-rf", str(root)], check=True)
