"""The database is damaged under a server: told, never guessed at, and models are served on."""

import random
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import graft
import pytest

from service.storage.check import read_only
from tests.e2e.conftest import GUARD_S, Ended
from tests.e2e.faults.house import ROOT, House, wait_until

pytestmark = pytest.mark.e2e

BACK_UP = ROOT / "deploy" / "backup.py"
WAITS = {"stand_in": "waits"}


def write_over(file: Path) -> None:
    """Writes noise over every page but the first; no cache of them holds."""
    with closing(sqlite3.connect(file, timeout=GUARD_S, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE noise (x)")
        connection.execute("DROP TABLE noise")
        wait_until(lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        with file.open("rb+") as opened:
            opened.seek(page_bytes)
            opened.write(random.Random(0).randbytes((pages - 1) * page_bytes))


def scraped(house: House) -> str:
    with urllib.request.urlopen(house.server.metrics_url, timeout=GUARD_S) as response:
        return str(response.read().decode())


def answers(client: graft.Client, image: Path) -> list[tuple[int, str]]:
    """By the model's name, by an alias and by a number."""
    found = [
        client.predict(image, model="ants", **which)[0]  # type: ignore[arg-type]
        for which in ({}, {"alias": "live"}, {"version": 1})
    ]
    return [(one.version, one.label) for one in found]


RIGHT = [(2, "red"), (1, "red"), (1, "red")]


@contextmanager
def predicts_all_the_while(client: graft.Client, image: Path) -> Iterator[None]:
    """Fails where anything but the right answer came."""
    over, given = threading.Event(), []

    def ask() -> None:
        while True:
            try:
                given.append(answers(client, image))
            except graft.errors.GraftError as error:
                given.append([(error.code, error.message)])
            if over.is_set():
                return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_until(lambda: bool(given))
        yield
    finally:
        over.set()
        asking.join()
    assert [one for one in given if one != RIGHT] == []


def waiting(client: graft.Client, dataset: graft.Dataset) -> graft.JobHandle:
    """A job that is under way and goes on until it is stopped."""
    job = client.fine_tune(dataset, "bees", labels=WAITS)
    for event in job.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graft.Note):
            break
    return job


def is_told(call: Callable[[], object], house: House) -> None:
    with pytest.raises(graft.errors.DataLoss, match="its operator has restored it") as caught:
        call()
    assert caught.value.reason == "STORAGE_DAMAGED"
    assert str(house.data_dir) not in str(caught.value)


@pytest.mark.parametrize("trainers", ["killed", "at work"])
def test_a_database_that_is_damaged_under_a_server_is_told_and_models_are_served_on(
    home: House, images: Path, tmp_path: Path, trainers: str
) -> None:
    backup = tmp_path / "backup"
    image = next(images.glob("red/*"))
    client = home.start("", "--cpu-jobs=2")
    dataset = next(iter(client.list_datasets()))
    under_way = [waiting(client, dataset) for _ in range(2)]
    queued = client.fine_tune(dataset, "wasps", request_id="once")
    look_ups: list[Callable[[], object]] = [
        lambda: list(client.list_datasets()),
        lambda: list(client.list_models()),
        lambda: list(client.list_versions("ants")),
        lambda: client.get_model("ants"),
        lambda: client.get_dataset(dataset.dataset_id),
        lambda: [job.state for job in client.list_jobs()],
        lambda: client.get_job(queued.job_id).state,
        lambda: client.job(under_way[0].job_id).refresh().attempts,
    ]
    changes: list[Callable[[], object]] = [
        lambda: client.fine_tune(dataset, "wasps"),
        lambda: client.fine_tune(dataset, "wasps", request_id="once"),
        lambda: client.upload_dataset(images, display_name="again"),
        lambda: client.delete_dataset(dataset.dataset_id),
        lambda: client.set_alias("ants", "live", 2),
        lambda: client.rollback_alias("ants"),
        lambda: client.delete_version("ants", 1),
        lambda: client.delete_model("ants", force=True),
        queued.cancel,
    ]
    before = [look_up() for look_up in look_ups]
    assert answers(client, image) == RIGHT
    assert "graft_database_damaged 0.0" in scraped(home)

    subprocess.run([sys.executable, BACK_UP, home.data_dir, backup], check=True, timeout=GUARD_S)
    with predicts_all_the_while(client, image):
        write_over(home.data_dir / "graft.sqlite3")
        for change in changes:
            is_told(change, home)
        for look_up, right in zip(look_ups, before, strict=True):
            try:
                assert look_up() == right
            except graft.errors.DataLoss:
                is_told(look_up, home)
        # A name that nobody asked for before has to be looked up.
        is_told(lambda: client.predict(image, model="ants", version=2), home)
        if trainers == "killed":
            home.trainers()[0].kill()
            home.server.wait_for("jobs are stopped, and none is started, before the database is "
                                 "restored")  # fmt: skip
            wait_until(lambda: not home.trainers())
        assert client.is_serving()
    assert not list((home.data_dir / "datasets" / "tmp").iterdir())
    metrics = scraped(home)
    assert "graft_database_damaged 1.0" in metrics
    assert 'code="INTERNAL"' not in metrics
    server = home.server
    home.stop()
    log = "".join(server.seen)
    assert log.count("nothing is stored any more") == 1
    assert "unexpected error" not in log

    with pytest.raises(Ended, match="put the data folder back from a backup"):
        home.start()
    # As the runbook has it.
    home.data_dir.rename(tmp_path / "damaged")
    backup.rename(home.data_dir)
    client = home.start("", "--cpu-jobs=2")
    jobs = [client.job(job.job_id) for job in under_way]
    wait_until(lambda: [job.refresh().attempts for job in jobs] == [2, 2])
    with read_only(home.data_dir) as connection:
        assert connection.execute("SELECT SUM(crashes) FROM jobs").fetchone()[0] == 0
    for job in jobs:
        job.cancel()
    assert client.job(queued.job_id).wait(GUARD_S).version == 1
    assert answers(client, image) == RIGHT
    assert client.get_model("ants").aliases == {"latest": 2, "live": 1}
    home.is_sound()
