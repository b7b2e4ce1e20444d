"""The check of a data folder: a clean one is clean, and each thing that is broken is told."""

import fcntl
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from service import check
from service.contract import Gate, Progressed
from service.errors import Reason
from service.jobs.store import JobStore
from service.storage.artifacts import Artifacts
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from tests.unit.jobs.conftest import request
from tests.unit.storage.conftest import LIMITS, TENANT, FakeReader, write_result

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a bit of everything, as a clean stop leaves it."""
    root = tmp_path_factory.mktemp("whole")
    data = root / "data"
    database = Database(data)
    artifacts = Artifacts(data / "artifacts")
    models = ModelStore(database, artifacts)
    datasets = DatasetStore(database, data / "datasets", FakeReader(), LIMITS)
    jobs = JobStore(database, max_queued=100)
    stored = {}
    for is_unlabelled in (False, True):
        upload = datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=is_unlabelled)
        for label in ("cat", "dog"):
            upload.add_image(label, f"PIC {label}".encode(), f"{label}.png", "")
        stored[is_unlabelled] = upload.finish()

    def runs(model: str, **changes: object) -> str:
        job, _ = jobs.create(
            request(model, server_path="", dataset_id=stored[False].dataset_id, **changes), "", ""
        )
        jobs.claim(["", "auto"])
        jobs.append_event(job.job_id, Progressed("training", 0.5))
        return job.job_id

    def succeeds(model: str, **changes: object) -> str:
        job_id = runs(model)
        out = write_result(root / job_id, job_id, model, **changes)  # type: ignore[arg-type]
        publish = partial(
            models.publish, model=model, job_id=job_id, stored=artifacts.put(out), gate=Gate()
        )
        jobs.succeed(job_id, publish)
        return job_id

    for _ in range(4):
        succeeds("birds")
    succeeds("ants", weights="random:1", backbone=b"another")
    models.set_alias("birds", "prod", 1)
    models.set_alias("birds", "prod", 2)
    models.roll_back_alias("birds", "latest")
    models.delete_version("birds", 4)
    succeeds("gone")
    models.delete_model("gone")
    jobs.fail(runs("birds"), Reason.TRAINING_FAILED, "no")
    jobs.request_cancel(again := runs("birds"), TENANT)
    jobs.cancelled(again)
    jobs.requeue(waits := runs("birds"), "again", Reason.TRAINER_CRASHED, 3)
    (data / "work" / waits / "checkpoint").mkdir(parents=True)
    database.close()
    return data


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def test_a_clean_folder_is_clean_and_stays_as_it_was(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(data.rglob("*"))
    assert check.problems(data) == []
    assert check.main([str(data), "--quick"]) == check.EXIT_SOUND
    assert capsys.readouterr().out == ""
    assert sorted(data.rglob("*")) == before


def test_what_an_open_database_has_in_its_log_is_seen(data: Path) -> None:
    with closing(Database(data)) as database:
        with database.transaction() as connection:
            connection.execute("UPDATE models SET last_version = 0 WHERE name = 'ants'")
        found = check.problems(data)
    assert [line for line in found if "model ants" in line]


def sql(*statements: str) -> Break:
    def run(data: Path) -> None:
        with closing(sqlite3.connect(data / "graft.sqlite3")) as connection, connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            connection.execute("PRAGMA ignore_check_constraints = ON")
            connection.execute("DROP TRIGGER jobs_legal_transition")
            for statement in statements:
                assert connection.execute(statement).rowcount, statement

    return run


def one(data: Path, pattern: str) -> Path:
    return sorted(data.glob(pattern))[0]


def remove(pattern: str) -> Break:
    def run(data: Path) -> None:
        path = one(data, pattern)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return run


def damage(pattern: str) -> Break:
    def run(data: Path) -> None:
        path = one(data, pattern)
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])

    return run


def leave(name: str) -> Break:
    def run(data: Path) -> None:
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    return run


def swap_indexes(data: Path) -> None:
    first, second = sorted(data.glob(f"{SET}/index.json"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


VERSION, SET = "artifacts/versions/*", "datasets/ds-*"
ENDED = "(SELECT job_id FROM jobs WHERE state = 'SUCCEEDED' LIMIT 1)"
FAILED = "(SELECT job_id FROM jobs WHERE state = 'FAILED' LIMIT 1)"

BROKEN: dict[str, tuple[Break, str]] = {
    # files of versions
    "a version's folder is gone": (remove(VERSION), "its head.safetensors is missing"),
    "a report is gone": (remove(f"{VERSION}/report.html"), "its report.html is missing"),
    "a head is damaged": (damage(f"{VERSION}/head.safetensors"), "its head.safetensors has digest"),
    "the answers are damaged": (
        damage(f"{VERSION}/answers.safetensors"),
        "its files together have digest",
    ),
    "a report is damaged": (damage(f"{VERSION}/report.json"), "its files together have digest"),
    "a manifest is damaged": (damage(f"{VERSION}/manifest.json"), "manifest.json cannot be read"),
    "a version has another's manifest": (
        sql("UPDATE versions SET backbone_digest = 'b' WHERE model = 'ants'"),
        "version 1 of ants: its manifest.json is of",
    ),
    "a version has a file more": (
        lambda data: (one(data, VERSION) / "more").touch(),
        "its folder holds 'more'",
    ),
    "a backbone is gone": (remove("artifacts/backbones/*"), "backbone .*: its file is missing"),
    "a backbone is damaged": (damage("artifacts/backbones/*"), "backbone .*: its file has digest"),
    "a backbone for later is gone": (
        sql("UPDATE exported_backbones SET digest = 'gone'"),
        "backbone gone: its file is missing",
    ),
    # what no row names
    "a version has no row": (leave("artifacts/versions/stray"), "versions/'stray': is there"),
    "a backbone has no row": (leave("artifacts/backbones/s.onnx"), "backbones/'s.onnx': is there"),
    "a dataset has no row": (leave("datasets/ds-stray"), "datasets/'ds-stray': is there"),
    "a file was being put": (leave("artifacts/tmp/x"), "artifacts/tmp/'x': was left behind"),
    "an upload was under way": (leave("datasets/tmp/x"), "datasets/tmp/'x': was left behind"),
    "a work folder is nobody's": (leave("work/x"), "work/x: was left behind by no known job"),
    "a work folder is of the past": (
        sql("UPDATE jobs SET state = 'CANCELLED' WHERE state = 'QUEUED'"),
        "work/job-.*: was left behind; its job is CANCELLED",
    ),
    # aliases and numbers
    "an alias points nowhere": (
        sql("UPDATE aliases SET version = 9 WHERE alias = 'prod'"),
        "alias prod of birds: points to version 9, which is not there",
    ),
    "a move is missing": (
        sql("DELETE FROM alias_moves WHERE alias = 'prod' AND version = 2"),
        "alias prod of birds: points to 2 and not where its last move went: that was to 1",
    ),
    "a move leads nowhere": (
        sql("UPDATE alias_moves SET version = 9 WHERE alias = 'prod' AND version = 1"),
        "alias prod of birds: can be rolled back to version 9",
    ),
    "moves without an alias": (
        sql("DELETE FROM aliases WHERE alias = 'prod'"),
        "alias prod of birds: has moved, and there is no such alias",
    ),
    "latest is lost": (
        sql("DELETE FROM aliases WHERE model = 'ants'"),
        "model ants: has published versions and no alias latest",
    ),
    "latest is a candidate": (
        sql("UPDATE versions SET is_candidate = 1 WHERE model = 'ants'"),
        "alias latest of ants: points to version 1, a candidate",
    ),
    "a number could be given twice": (
        sql("UPDATE models SET last_version = 2 WHERE name = 'birds'"),
        "model birds: has version 3, and 2 is noted",
    ),
    "a model is empty": (
        sql("INSERT INTO models (name, create_time_s, last_version) VALUES ('none', 1, 1)"),
        "model none: has no version",
    ),
    "a model is another tenant's": (
        sql("UPDATE models SET tenant = 'acme' WHERE name = 'ants'"),
        "model ants: belongs to tenant acme",
    ),
    # jobs and versions
    "a version's job is unknown": (
        sql("UPDATE versions SET job_id = 'job-x' WHERE model = 'ants'"),
        "version 1 of ants: was made by job-x, which is not known",
    ),
    "a version's job failed": (
        sql(f"UPDATE versions SET job_id = {FAILED} WHERE model = 'ants'"),
        "version 1 of ants: was made by job-.*, which is FAILED",
    ),
    "a version is lost": (
        sql(
            "DELETE FROM versions WHERE model = 'birds' AND version = 3",
            "UPDATE models SET last_version = 2 WHERE name = 'birds'",
        ),
        "made version 3 of birds, which was lost",
    ),
    "a job was not counted": (
        sql("UPDATE job_bytes SET size_bytes = size_bytes - 1"),
        r"tenant default: its jobs take \d+ bytes, and \d+ are noted",
    ),
    # jobs and events
    "an event is lost": (
        sql(f"DELETE FROM job_events WHERE job_id = {ENDED} AND sequence = 3"),
        "has 4 events, numbered 1-2, 4-5, and its last number is 5",
    ),
    "the last event is lost": (
        sql(f"DELETE FROM job_events WHERE job_id = {ENDED} AND sequence = 5"),
        "is SUCCEEDED, and its last event of a state tells of RUNNING",
    ),
    "an event is damaged": (
        sql(f"UPDATE job_events SET payload_json = '{{' WHERE job_id = {ENDED} AND sequence = 2"),
        "its event 2 cannot be read",
    ),
    "a job went on after its end": (
        sql(
            f"UPDATE job_events SET sequence = 6 WHERE job_id = {ENDED} AND sequence = 3",
            f"UPDATE job_events SET sequence = 3 WHERE job_id = {ENDED} AND sequence = 5",
        ),
        "is SUCCEEDED, and its last event does not say so",
    ),
    "a job ended out of the queue": (
        sql(f"UPDATE job_events SET sequence = 0 WHERE job_id = {ENDED} AND sequence = 2"),
        "its events tell of SUCCEEDED after QUEUED",
    ),
    "a job began in the middle": (
        sql(f"DELETE FROM job_events WHERE job_id = {ENDED} AND sequence = 1"),
        "its first state was RUNNING, not QUEUED",
    ),
    "an attempt is not counted": (
        sql(f"UPDATE jobs SET attempts = 2 WHERE job_id = {ENDED}"),
        "was RUNNING 1 times by its events, and had 2 attempts",
    ),
    "more crashes than attempts": (
        sql(f"UPDATE jobs SET crashes = 2 WHERE job_id = {ENDED}"),
        "crashed 2 times in 1 attempts",
    ),
    "a job never began": (
        sql(f"UPDATE jobs SET start_time_s = NULL WHERE job_id = {ENDED}"),
        "has start time None after 1 attempts",
    ),
    "a job never ended": (
        sql(f"UPDATE jobs SET end_time_s = NULL WHERE job_id = {ENDED}"),
        "is SUCCEEDED with end time None",
    ),
    "a job failed without a why": (
        sql("UPDATE jobs SET error_reason = NULL WHERE state = 'FAILED'"),
        "is FAILED with the reason None",
    ),
    "a job made another version": (
        sql(f"UPDATE jobs SET version = 7 WHERE job_id = {ENDED}"),
        "is SUCCEEDED with version 7, and its events tell of",
    ),
    "a job runs under nobody": (
        sql("UPDATE jobs SET state = 'RUNNING' WHERE state = 'QUEUED'"),
        "is RUNNING, and no server works on it",
    ),
    "a job is another tenant's": (
        sql(f"UPDATE jobs SET tenant = 'acme' WHERE job_id = {ENDED}"),
        "is of tenant acme, and its model birds is not",
    ),
    # datasets
    "a dataset's folder is gone": (remove(SET), "dataset ds-.*: its index or its images cannot"),
    "an index is gone": (remove(f"{SET}/index.json"), "its index or its images cannot be read"),
    "an index is damaged": (damage(f"{SET}/index.json"), "its index or its images cannot be read"),
    "an image is gone": (remove(f"{SET}/images/*"), "its index or its images cannot be read"),
    "an image is cut short": (
        lambda data: os.truncate(one(data, f"{SET}/images/*"), 3),
        r"holds 2 files, and its index 2 images of 10 bytes together, not 2 of 14",
    ),
    "an image is too many": (
        lambda data: (one(data, SET) / "images" / "more").touch(),
        r"holds 3 files, and its index 2 images of 14 bytes",
    ),
    "an image is damaged": (
        damage(f"{SET}/images/*"),
        "dataset ds-.*: 1 of its images are not what was stored, such as '000001-cat.png'",
    ),
    "an index is another dataset's": (swap_indexes, "dataset ds-.*: its index has digest"),
    "a class was counted wrong": (
        sql("UPDATE datasets SET classes_json = '[]' WHERE is_unlabelled = 0"),
        "its classes are not those of its images",
    ),
    "a waiting job's dataset is gone": (
        sql("DELETE FROM datasets WHERE is_unlabelled = 0"),
        "job-.*: is QUEUED and needs dataset ds-.*, which is not there",
    ),
    "a job uses another tenant's images": (
        sql("UPDATE datasets SET tenant = 'acme' WHERE is_unlabelled = 0"),
        "job-.*: is of tenant default and uses dataset ds-.* of tenant acme",
    ),
    # the database
    "a row refers to nothing": (
        sql("INSERT INTO job_datasets (job_id, dataset_id) VALUES ('job-x', 'ds-x')"),
        r"database: job_datasets \(job_id job-x, dataset_id ds-x\) refers to no row of jobs",
    ),
    "a job's state is unknown": (
        sql(f"UPDATE jobs SET state = 'LOST' WHERE job_id = {FAILED}"),
        "is LOST, which is no state",
    ),
    "the format is another's": (
        sql("INSERT INTO aliases VALUES ('ants', 'old', 1, 0)", "PRAGMA user_version = 99"),
        "database: has format 99",
    ),
    "a page is damaged": (
        lambda data: os.truncate(data / "graft.sqlite3", 9000),
        "database: ",
    ),
    "it is no database": (
        lambda data: (data / "graft.sqlite3").write_bytes(b"no database" * 1000),
        "database: cannot be read",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_told(what: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, told = BROKEN[what]
    break_it(data)
    assert check.main([str(data)]) == check.EXIT_BROKEN
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if re.search(told, line)], lines


def test_contents_are_not_read_where_that_is_not_asked_for(data: Path) -> None:
    damage(f"{VERSION}/head.safetensors")(data)
    damage(f"{SET}/images/*")(data)
    assert check.main([str(data), "--quick"]) == check.EXIT_SOUND
    assert check.main([str(data)]) == check.EXIT_BROKEN


def test_of_a_killed_server_what_a_start_sweeps_is_passed_over(data: Path) -> None:
    leave("artifacts/versions/stray")(data)
    leave("datasets/tmp/x")(data)
    sql("UPDATE jobs SET cancel_requested = 1 WHERE state = 'QUEUED'")(data)
    assert check.main([str(data), "--killed"]) == check.EXIT_SOUND
    remove(f"{VERSION}/report.html")(data)
    assert check.main([str(data), "--killed"]) == check.EXIT_BROKEN


def test_of_a_running_server_only_what_stays_broken_is_told(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, moved = one(data, f"{VERSION}/report.html"), data / "moved"
    report.rename(moved)
    damage("artifacts/backbones/*")(data)
    monkeypatch.setattr("service.check.time.sleep", lambda seconds: moved.rename(report))
    (line,) = check.problems(data, "running")
    assert line.startswith("backbone ")


def test_a_held_folder_is_checked_with_a_warning_and_its_lock_stays_free(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (data / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check.main([str(data)]) == check.EXIT_SOUND
        assert "a server uses" in capsys.readouterr().err
    assert check.main([str(data)]) == check.EXIT_SOUND
    assert "a server uses" not in capsys.readouterr().err
    Database(data).close()


def test_what_is_no_data_folder_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(tmp_path)]) == check.EXIT_NO_FOLDER
    assert "no data folder" in capsys.readouterr().err
