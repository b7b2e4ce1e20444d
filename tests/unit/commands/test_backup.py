"""Backups as the runbook makes them: taken while serving, brought up to date, put back."""

import contextlib
import io
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from graftml import Client

from service import backup as backups
from service import fsck
from service.__main__ import main
from service.domain import JobState
from service.jobs.replicas import Replicas
from service.jobs.store import JobStore
from service.storage.database import Database
from tests.deploy.sample_image import IMAGES
from tests.e2e.conftest import GUARD_S, INSTANT, ServiceProcess


def backup(data_dir: Path, target: Path, *flags: str) -> str:
    """Returns why there is no backup, or nothing."""
    return failure("backup", target, data_dir, *flags)


def restore(source: Path, data_dir: Path, *flags: str) -> str:
    """Returns why nothing was restored, or nothing."""
    return failure("restore", source, data_dir, *flags)


def failure(name: str, folder: Path, data_dir: Path, *flags: str) -> str:
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code = main([name, str(folder), f"--data-dir={data_dir}", *flags])
    if code:
        assert (code, printed.getvalue()) == (1, "")
        return said.getvalue()
    assert " files of " in printed.getvalue()
    return ""


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """A backup of `data`."""
    assert backup(data, tmp_path / "copy") == ""
    return tmp_path / "copy"


def sql(folder: Path, statement: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(folder / "graft.sqlite3")) as connection, connection:
        return connection.execute(statement).fetchall()


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns each file of a folder with its inode and size, by its name."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def objects(folder: Path) -> list[Path]:
    return sorted(folder.glob("blobs/??/*"))


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.e2e
def test_a_backup_that_was_taken_while_serving_serves_the_same_when_restored(
    tmp_path: Path,
) -> None:
    image = IMAGES[0][1]
    service = ServiceProcess(tmp_path / "data", module=INSTANT)
    try:
        with Client(service.address, timeout_s=GUARD_S) as client:
            client.wait_ready(timeout_s=GUARD_S)
            client.fine_tune(IMAGES, name="colours").wait(timeout_s=GUARD_S)
            (before,) = client.predict(image, model="colours")
            assert backup(tmp_path / "data", tmp_path / "copy") == ""
    finally:
        service.end()

    assert restore(tmp_path / "copy", tmp_path / "restored") == ""
    assert fsck.problems(tmp_path / "restored") == []
    restored = ServiceProcess(tmp_path / "restored", "--warm-trainers=0")
    try:
        with Client(restored.address, timeout_s=GUARD_S) as client:
            client.wait_ready(timeout_s=GUARD_S)
            assert client.predict(image, model="colours") == [before]
            (dataset,) = client.list_datasets()
            assert dataset.image_count == len(IMAGES)
    finally:
        restored.end()


def test_a_backup_holds_what_rows_name_and_is_closed_to_others(data: Path, copy: Path) -> None:
    (data / "weights").mkdir()
    assert fsck.problems(copy) == []
    assert {path.name for path in copy.iterdir()} == {"graft.sqlite3", "blobs"}
    assert fsck.orphans(data)["blobs that no row needs"] == len(objects(data)) - len(objects(copy))
    assert len(objects(copy)) > 10
    assert {path.stat().st_mode & 0o077 for path in copy.rglob("*")} == {0}


def test_a_second_backup_copies_what_is_new_and_drops_what_is_not_needed(
    data: Path, copy: Path
) -> None:
    before = state(copy)
    sql(data, "DELETE FROM registered_backbones")
    added = objects(data)[-1]
    assert backup(data, copy) == ""
    after = state(copy)
    assert fsck.problems(copy) == []
    assert len(before) - len(after) == 1
    kept = [name for name in after if name.startswith("blobs/")]
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert added.exists()


def test_a_blob_that_vanishes_leaves_the_last_state_whole(data: Path, copy: Path) -> None:
    before = state(copy)
    sql(data, "DELETE FROM registered_backbones")
    name = objects(copy)[-1].relative_to(copy)
    digest = name.name.partition("-")[0]
    # A blob that was collected and put again is another object, which is not there yet.
    sql(data, f"UPDATE blobs SET generation = 'later' WHERE digest = '{digest}'")
    assert f"{digest}-later is missing" in backup(data, copy)
    assert before.items() <= state(copy).items()
    assert fsck.problems(copy) == []
    (data / name).rename(data / name.with_name(f"{digest}-later"))
    assert backup(data, copy) == ""
    assert fsck.problems(copy) == []
    assert str(name) not in state(copy)
    assert not list(copy.rglob("*.new*"))


def test_a_first_backup_that_was_interrupted_goes_on(data: Path, tmp_path: Path) -> None:
    for path in objects(data):
        path.rename(path.with_name(path.name + ".away"))
    assert "is missing" in backup(data, tmp_path / "copy")
    for path in objects(data):
        path.rename(path.with_suffix(""))
    # A kill leaves this, too, which SQLite would play back into the next copy.
    (tmp_path / "copy" / "graft.sqlite3.new-journal").touch()
    assert backup(data, tmp_path / "copy") == ""
    assert fsck.problems(tmp_path / "copy") == []
    assert not list((tmp_path / "copy").rglob("*.new*"))


def test_what_rots_is_not_copied(data: Path, copy: Path, tmp_path: Path) -> None:
    (object_of, *_) = objects(copy)
    damage(data / object_of.relative_to(copy))
    # One that the backup has stays as it was.
    assert backup(data, copy) == ""
    assert fsck.problems(copy) == []
    assert f"{object_of.name} is damaged" in backup(data, tmp_path / "other")


def test_a_damaged_backup_is_not_restored(copy: Path, tmp_path: Path) -> None:
    (first, *_, last) = objects(copy)
    content = last.read_bytes()
    damage(last)
    assert f"{last.name} is damaged" in restore(copy, tmp_path / "restored")
    assert [path.name for path in (tmp_path / "restored").iterdir()] == ["lock"]
    last.write_bytes(content)
    first.rename(tmp_path / "moved")
    assert f"{first.name} is missing" in restore(copy, tmp_path / "restored")
    (tmp_path / "moved").rename(first)
    assert restore(copy, tmp_path / "restored") == ""
    assert fsck.problems(tmp_path / "restored") == []
    assert not list(tmp_path.rglob("*.new"))


def test_what_is_there_is_not_restored_over(data: Path, copy: Path, tmp_path: Path) -> None:
    before = state(data)
    assert f"{data} holds blobs: restore into an empty folder" in restore(copy, data)
    with closing(Database(data)):
        assert f"a server uses {data}: stop it" in restore(copy, data)
    assert state(data).keys() == before.keys()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a").touch()
    assert "holds a: restore into an empty folder" in restore(copy, tmp_path / "letters")
    assert len(list((tmp_path / "letters").iterdir())) == 1
    assert "is not a backup" in restore(tmp_path / "nothing", tmp_path / "restored")


def test_a_volume_of_its_own_and_a_restore_that_was_killed_are_no_hindrance(
    copy: Path, tmp_path: Path
) -> None:
    for left in ("lost+found", "restore.new/blobs/ab"):
        (tmp_path / "volume" / left).mkdir(parents=True)
    assert restore(copy, tmp_path / "volume") == ""
    assert {p.name for p in (tmp_path / "volume").iterdir()} == {
        "lost+found", "lock", "blobs", "graft.sqlite3",
    }  # fmt: skip
    assert fsck.problems(tmp_path / "volume") == []


def test_what_the_check_finds_of_a_restored_folder_is_told(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql(copy, "UPDATE models SET last_version = 0 WHERE name = 'ants'")
    assert main(["restore", str(copy), f"--data-dir={tmp_path}/restored"]) == 1
    printed = capsys.readouterr()
    assert "is restored to" in printed.out
    assert "model default/ants: has version" in printed.out
    assert "1 problem\n" in printed.err


def test_blobs_that_lie_elsewhere_are_found_and_put_back(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (data / "blobs").rename(elsewhere)
    flag = f"--blobs-dir={elsewhere}"
    assert "is missing" in backup(data, tmp_path / "copy")
    assert backup(data, tmp_path / "copy", flag) == ""
    # Some of them are still there, and two are not what they were.
    copied = objects(tmp_path / "copy")
    paths = [elsewhere / path.relative_to(tmp_path / "copy" / "blobs") for path in copied]
    paths[0].unlink()
    damage(paths[1])
    os.truncate(paths[2], 1)
    kept = paths[3].stat().st_ino
    assert restore(tmp_path / "copy", tmp_path / "restored", flag) == ""
    assert fsck.problems(tmp_path / "restored", elsewhere) == []
    assert not (tmp_path / "restored" / "blobs").exists()
    assert paths[3].stat().st_ino == kept


def test_of_jobs_that_ran_no_crash_is_counted(data: Path, copy: Path, tmp_path: Path) -> None:
    def started(folder: Path) -> list[tuple[JobState, int]]:
        with closing(Database(folder)) as database:
            replicas = Replicas(JobStore(database, max_queued=100))
            replicas.register()
            return [(job.state, job.crashes) for job in replicas.reap(max_crashes=3)]

    def runs(folder: Path) -> None:
        sql(
            folder,
            "UPDATE jobs SET state = 'RUNNING', crashes = 1,"
            " owner = (SELECT replica_id FROM replicas) WHERE state = 'QUEUED'",
        )

    runs(data)
    assert backup(data, copy) == ""
    assert started(data) == [(JobState.QUEUED, 2)]
    restored = tmp_path / "restored"
    backups.restore(copy, restored, restored / "blobs")
    assert started(restored) == [(JobState.QUEUED, 1)]


def test_a_backup_takes_a_data_folder_alone_and_overwrites_nothing(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "not a data folder" in backup(tmp_path / "empty", tmp_path / "copy")
    other = shutil.copytree(data, tmp_path / "other")
    before = state(other)
    assert f"{other} holds lock and is not a backup" in backup(data, other)
    assert state(other) == before
    (tmp_path / "empty" / "letters").touch()
    assert "holds letters and is not a backup" in backup(data, tmp_path / "empty")


def damage_page(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.seek(4096)
        opened.write(b"\xff" * 4096)


def damage_header(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.write(b"\xff" * 4096)


@pytest.mark.parametrize("damage_it", [damage_page, damage_header])
def test_a_damaged_database_is_no_backup(
    damage_it: Callable[[Path], None], data: Path, copy: Path, tmp_path: Path
) -> None:
    before = state(copy)
    damage_it(data / "graft.sqlite3")
    assert f"the database of {data} is damaged" in backup(data, copy)
    # The last good state is there still.
    assert before.items() <= state(copy).items()
    assert fsck.problems(copy) == []
    damage_it(copy / "graft.sqlite3")
    assert f"the database of {copy} is damaged" in restore(copy, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_folder_of_another_version_is_neither_copied_nor_put_back(
    data: Path, copy: Path, tmp_path: Path
) -> None:
    for folder in (data, copy):
        with closing(sqlite3.connect(folder / "graft.sqlite3")) as connection:
            connection.execute("PRAGMA application_id = 99")
    assert f"{data} was made by another version of Graft" in backup(data, tmp_path / "new")
    assert f"{copy} was made by another version of Graft" in restore(copy, tmp_path / "restored")
