"""Folders whose files change between the look and the reading."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from service import class_folders
from service.class_folders import ImageFile
from service.domain import RejectedFile


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("root/cat/1.png", "root/cat/deep/2.png", "root/dog/3.png", "outside/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "root"


def read(root: Path, files: list[ImageFile]) -> tuple[list[str], list[RejectedFile]]:
    found, rejected = class_folders.examine(files, lambda data: data.decode(), root, map)
    return [each.decoded for each in found], rejected


def test_a_file_that_became_a_link_since_it_was_listed_is_rejected(root: Path) -> None:
    files = class_folders.find(root)
    (root / "cat/1.png").unlink()
    (root / "cat/1.png").symlink_to(root.parent / "outside/1.png")
    found, rejected = read(root, files)
    assert found == ["root/cat/deep/2.png", "root/dog/3.png"]
    assert [file.path for file in rejected] == ["cat/1.png"]


def test_a_file_whose_folder_became_a_link_to_outside_is_rejected(root: Path) -> None:
    files = class_folders.find(root)
    shutil.rmtree(root / "cat")
    (root / "cat").symlink_to(root.parent / "outside")
    found, rejected = read(root, files)
    assert found == ["root/dog/3.png"]
    assert sorted(file.path for file in rejected) == ["cat/1.png", "cat/deep/2.png"]


def test_a_pipe_is_not_waited_for_and_neither_it_nor_a_device_is_read(root: Path) -> None:
    files = class_folders.find(root)
    (root / "dog/3.png").unlink()
    os.mkfifo(root / "dog/3.png")
    assert len(class_folders.find(root)) == 2
    _, rejected = read(root, files)
    assert [(file.path, file.detail) for file in rejected] == [
        ("dog/3.png", "it is no plain file of this folder")
    ]
    _, rejected = read(Path("/dev"), [ImageFile("", "", Path("/dev/zero"))])
    assert rejected


@pytest.mark.parametrize("above", [0, 1])
def test_a_root_that_became_a_link_or_lies_behind_one_is_not_read(root: Path, above: int) -> None:
    deep = root / "cat"
    files = class_folders.find_any(deep)
    swapped = [deep, root][above]
    kept = root.parent / "kept"
    swapped.rename(kept)
    swapped.symlink_to(kept)
    found, rejected = read(deep, files)
    assert (found, len(rejected)) == ([], 2)
    # Nor what is listed behind it only then.
    found, rejected = read(deep, class_folders.find_any(deep))
    assert (found, len(rejected)) == ([], 2)


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
        assert [file.path.name for file in class_folders.find(root)] == ["2.png", "1.png"]
    finally:
        # Python's own removal is not made for it, and would fail at the end of all tests.
        subprocess.run(["rm", "-rf", str(root)], check=True)
