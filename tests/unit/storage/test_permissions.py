"""What was left open to others is closed at the start, and the rest is left alone."""

import logging
from pathlib import Path

import pytest

from service.storage import permissions


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o7777 for p in folder.rglob("*")}


def test_what_is_stored_is_closed_and_what_is_not_ours_stays_as_it_was(tmp_path: Path) -> None:
    for name in ("blobs", "uploads", "somebody's"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    (tmp_path / "work").mkdir()
    (tmp_path / "work").chmod(0o2750)
    for name in ("graft.sqlite3", "graft.sqlite3-wal", "notes.txt"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o644)
    tmp_path.chmod(0o755)
    permissions.close_to_others(tmp_path)
    assert modes(tmp_path) == {
        "blobs": 0o700,
        "uploads": 0o700,
        "work": 0o2700,
        "graft.sqlite3": 0o600,
        "graft.sqlite3-wal": 0o600,
        "somebody's": 0o755,
        "notes.txt": 0o644,
    }
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_what_cannot_be_closed_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads").chmod(0o755)

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with caplog.at_level(logging.WARNING):
        permissions.close_to_others(tmp_path)
    assert "uploads, and its mode cannot be changed" in caplog.text


def test_a_folder_that_is_not_there_yet_is_no_trouble(tmp_path: Path) -> None:
    permissions.close_to_others(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_links_lead_to_is_left_alone_whether_it_is_there_or_not(tmp_path: Path) -> None:
    mirror, data = tmp_path / "mirror", tmp_path / "data"
    for folder in (mirror, data):
        folder.mkdir()
        folder.chmod(0o755)
    (data / "weights").symlink_to(mirror)
    (data / "old.sqlite").symlink_to(tmp_path / "nowhere")
    permissions.close_to_others(data)
    assert mirror.stat().st_mode & 0o777 == 0o755


def test_a_file_that_goes_while_it_is_looked_at_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("uploads", "graft.sqlite3-wal"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o755)
    found = Path.glob

    def glob(folder: Path, pattern: str) -> list[Path]:
        paths = list(found(folder, pattern))
        for path in paths:
            if path.name.endswith("-wal"):
                path.rmdir()
        return paths

    monkeypatch.setattr(Path, "glob", glob)
    permissions.close_to_others(tmp_path)
    assert modes(tmp_path) == {"uploads": 0o700}
    assert not caplog.records
