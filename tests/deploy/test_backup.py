"""Backups as the runbook makes them: taken while serving, brought up to date, put back."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from graftml import Client

from service import fsck
from service.domain import JobState
from service.jobs.replicas import Replicas
from service.jobs.store import JobStore
from service.storage.database import Database
from tests.data_folder import make_data_folder
from tests.deploy.queries import DEPLOY
from tests.deploy.sample_image import IMAGES
from tests.e2e.conftest import GUARD_S, INSTANT, ServiceProcess


def run(command: str, source: Path, target: Path, *flags: str) -> str:
    """Runs the script as it is piped into a container; returns why it failed, or nothing."""
    done = subprocess.run(
        # Isolated and without site-packages: it needs Python alone.
        [sys.executable, "-I", "-S", "-", command, str(source), str(target), *flags],
        input=(DEPLOY / "backup.py").read_text(),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert bool(done.returncode) == bool(done.stderr), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """A backup of `data`."""
    assert run("backup", data, tmp_path / "copy") == ""
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
            assert run("backup", tmp_path / "data", tmp_path / "copy") == ""
    finally:
        service.end()

    assert run("restore", tmp_path / "copy", tmp_path / "restored") == ""
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
    assert run("backup", data, copy) == ""
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
    assert f"{digest}-later is missing" in run("backup", data, copy)
    assert before.items() <= state(copy).items()
    assert fsck.problems(copy) == []
    (data / name).rename(data / name.with_name(f"{digest}-later"))
    assert run("backup", data, copy) == ""
    assert fsck.problems(copy) == []
    assert str(name) not in state(copy)
    assert not list(copy.rglob("*.new*"))


def test_a_first_backup_that_was_interrupted_goes_on(data: Path, tmp_path: Path) -> None:
    for path in objects(data):
        path.rename(path.with_name(path.name + ".away"))
    assert "is missing" in run("backup", data, tmp_path / "copy")
    for path in objects(data):
        path.rename(path.with_suffix(""))
    # A kill leaves this, too, which SQLite would play back into the next copy.
    (tmp_path / "copy" / "graft.sqlite3.new-journal").touch()
    assert run("backup", data, tmp_path / "copy") == ""
    assert fsck.problems(tmp_path / "copy") == []
    assert not list((tmp_path / "copy").rglob("*.new*"))


def test_what_rots_is_not_copied(data: Path, copy: Path, tmp_path: Path) -> None:
    (object_of, *_) = objects(copy)
    damage(data / object_of.relative_to(copy))
    # One that the backup has stays as it was.
    assert run("backup", data, copy) == ""
    assert fsck.problems(copy) == []
    assert f"{object_of.name} is damaged" in run("backup", data, tmp_path / "other")


def test_a_damaged_backup_is_not_restored(copy: Path, tmp_path: Path) -> None:
    (first, *_, last) = objects(copy)
    content = last.read_bytes()
    damage(last)
    assert f"{last.name} is damaged" in run("restore", copy, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    last.write_bytes(content)
    first.rename(tmp_path / "moved")
    assert f"{first.name} is missing" in run("restore", copy, tmp_path / "restored")
    (tmp_path / "moved").rename(first)
    assert run("restore", copy, tmp_path / "restored") == ""
    assert fsck.problems(tmp_path / "restored") == []
    assert not list(tmp_path.glob("*.new"))


def test_what_is_there_is_not_restored_over(data: Path, copy: Path, tmp_path: Path) -> None:
    before = state(data)
    assert f"{data} exists: move it away first" in run("restore", copy, data)
    assert state(data) == before
    assert "is no backup" in run("restore", tmp_path / "nothing", tmp_path / "restored")


def test_blobs_that_lie_elsewhere_are_found_and_put_back(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (data / "blobs").rename(elsewhere)
    flag = f"--blobs-dir={elsewhere}"
    assert "is missing" in run("backup", data, tmp_path / "copy")
    assert run("backup", data, tmp_path / "copy", flag) == ""
    # Some of them are still there, and two are not what they were.
    copied = objects(tmp_path / "copy")
    paths = [elsewhere / path.relative_to(tmp_path / "copy" / "blobs") for path in copied]
    paths[0].unlink()
    damage(paths[1])
    os.truncate(paths[2], 1)
    kept = paths[3].stat().st_ino
    assert run("restore", tmp_path / "copy", tmp_path / "restored", flag) == ""
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
    assert run("backup", data, copy) == ""
    assert started(data) == [(JobState.QUEUED, 2)]
    assert run("restore", copy, tmp_path / "restored") == ""
    assert started(tmp_path / "restored") == [(JobState.QUEUED, 1)]


def test_a_backup_takes_a_data_folder_alone_and_overwrites_nothing(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "no data folder" in run("backup", tmp_path / "empty", tmp_path / "copy")
    other = shutil.copytree(data, tmp_path / "other")
    before = state(other)
    assert f"{other} holds lock and is no backup" in run("backup", data, other)
    assert state(other) == before
    (tmp_path / "empty" / "letters").touch()
    assert "holds letters and is no backup" in run("backup", data, tmp_path / "empty")


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
    assert f"the database of {data} is damaged" in run("backup", data, copy)
    # The last good state is there still.
    assert before.items() <= state(copy).items()
    assert fsck.problems(copy) == []
    damage_it(copy / "graft.sqlite3")
    assert f"the database of {copy} is damaged" in run("restore", copy, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
