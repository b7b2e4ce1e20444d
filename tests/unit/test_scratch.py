"""Temporary files lie where they can be written: as TMPDIR says, or in the data folder."""

import os
import tempfile
from pathlib import Path

import pytest

from service import scratch
from service.config import BadConfig


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has what a test changes for its process end with the test."""
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())


def test_without_a_variable_they_lie_in_the_data_folder(tmp_path: Path) -> None:
    scratch.use(tmp_path / "data", {})
    folder = tmp_path / "data" / "tmp"
    assert not (tmp_path / "data").exists()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)


def test_a_folder_that_is_named_is_used(tmp_path: Path) -> None:
    scratch.use(tmp_path / "data", {"TMPDIR": str(tmp_path)})
    assert not (tmp_path / "data").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(BadConfig, match=f"TMPDIR is '{missing}', where no temporary file"):
        scratch.use(tmp_path / "data", {"TMPDIR": str(missing)})


def test_what_was_left_is_removed(tmp_path: Path) -> None:
    scratch.prepare(tmp_path)
    folder = tmp_path / "tmp"
    assert folder.is_dir()
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "file").touch()
    (folder / "link").symlink_to(tmp_path)
    scratch.prepare(tmp_path)
    assert list(folder.iterdir()) == []
    assert tmp_path.is_dir()
