"""The backup that the runbook tells to make: taken while serving, served from after."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from graft import Client

from tests.deploy.queries import DEPLOY
from tests.deploy.sample_image import IMAGES
from tests.e2e.conftest import GUARD_S, INSTANT, ServiceProcess


def back_up(data_dir: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    # Piped in, as into a container.
    return subprocess.run(
        [sys.executable, "-", str(data_dir), str(target)],
        input=(DEPLOY / "backup.py").read_text(),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )


@pytest.mark.e2e
def test_a_backup_taken_while_serving_serves_the_same_and_a_hole_in_it_is_told(
    tmp_path: Path,
) -> None:
    image = IMAGES[0][1]
    service = ServiceProcess(tmp_path / "data", module=INSTANT)
    try:
        with Client(service.address, timeout_s=GUARD_S) as client:
            client.wait_ready(timeout_s=GUARD_S)
            client.fine_tune(IMAGES, name="colours").wait(timeout_s=GUARD_S)
            (before,) = client.predict(image, model="colours")
            done = back_up(tmp_path / "data", tmp_path / "copy")
            assert done.returncode == 0, done.stderr
    finally:
        service.end()

    restored = ServiceProcess(tmp_path / "copy", "--warm-trainers=0")
    try:
        with Client(restored.address, timeout_s=GUARD_S) as client:
            client.wait_ready(timeout_s=GUARD_S)
            assert client.predict(image, model="colours") == [before]
            (dataset,) = client.list_datasets()
            assert dataset.image_count == len(IMAGES)
    finally:
        restored.end()

    (backbone,) = (tmp_path / "data" / "artifacts" / "backbones").iterdir()
    backbone.unlink()
    done = back_up(tmp_path / "data", tmp_path / "other")
    assert done.returncode != 0
    assert f"{backbone.name} was deleted meanwhile" in done.stderr


def test_a_backup_takes_a_data_folder_alone_and_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "no data folder" in back_up(tmp_path / "data", tmp_path / "copy").stderr
    with closing(sqlite3.connect(tmp_path / "data" / "graft.sqlite3")) as database:
        database.execute("CREATE TABLE anything (x)")
    (tmp_path / "copy").mkdir()
    assert "exists" in back_up(tmp_path / "data", tmp_path / "copy").stderr
    shutil.rmtree(tmp_path / "copy")
    assert "not whole" in back_up(tmp_path / "data", tmp_path / "copy").stderr


def test_a_damaged_database_is_not_taken_for_a_backup(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "graft.sqlite3"
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE anything (x)")
        database.commit()
    with file.open("rb+") as opened:
        opened.seek(4096)
        opened.write(b"\xff" * 4096)
    done = back_up(tmp_path / "data", tmp_path / "copy")
    assert done.returncode != 0
    assert "the database is damaged" in done.stderr
    # Without its first page it is no database any more.
    with file.open("rb+") as opened:
        opened.write(b"\xff" * 4096)
    done = back_up(tmp_path / "data", tmp_path / "other")
    assert done.returncode != 0
    assert f"remove {tmp_path / 'other'}, and keep older backups" in done.stderr
