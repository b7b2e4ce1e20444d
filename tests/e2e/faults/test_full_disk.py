"""Disks without room and a database that somebody holds: told to callers, waited out by jobs."""

import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import graftml
import pytest

from service import fsck
from tests.e2e.conftest import GUARD_S, Ended
from tests.e2e.faults.house import House, until_death, wait_until

pytestmark = pytest.mark.e2e

SMALL = "3m"
"""Of the disk: an empty data folder takes a tenth of it."""


def on_a_disk(folder: Path, options: str) -> tuple[str, ...]:
    """A command before a server's, which sees a disk of its own there."""
    mount = f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"'
    return ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")


@pytest.fixture
def small(tmp_path: Path, parts: Path) -> Iterator[House]:
    """A data folder on a disk of 3 MiB, which goes with its server."""
    house = House(tmp_path, parts)
    house.data_dir.mkdir()
    house.prefix = on_a_disk(house.data_dir, f"size={SMALL}")
    tried = subprocess.run([*house.prefix, "true"], check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"this user may mount nothing: {tried.stderr.strip()}")
    yield house
    house.close()


def inside(house: House) -> Path:
    """The data folder as its server sees it."""
    return Path(f"/proc/{house.server.process.pid}/root{house.data_dir}")


@contextmanager
def filled(folder: Path, leave: int = 0) -> Iterator[None]:
    """The disk without room but for some bytes."""
    filler = folder / "filler"
    free = shutil.disk_usage(folder).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - leave, 1))
    try:
        yield
    finally:
        filler.unlink()


def problems(house: House, copy: Path) -> list[str]:
    # A copy, since paths of another mount namespace lead back into one's own.
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(inside(house), copy)
    return fsck.problems(copy)


def noise(folder: Path) -> Path:
    """Images of 4 MiB, which no packing makes smaller."""
    from PIL import Image

    for label in ("green", "red"):
        (folder / label).mkdir(parents=True)
        pixels = random.Random(label).randbytes(3 * 832 * 832)
        Image.frombytes("RGB", (832, 832), pixels).save(folder / label / "0.png")
    return folder


def many_jobs(client: graftml.Client, dataset: graftml.Dataset) -> None:
    # The database may have room left in its own files.
    for _ in range(200):
        client.fine_tune(dataset, "wasps")


def is_full(error: pytest.ExceptionInfo[graftml.errors.ResourceExhausted]) -> bool:
    return error.value.reason == "STORAGE_FULL"


def test_on_a_full_disk_calls_are_told_models_are_served_and_all_goes_on_with_room(
    small: House, images: Path, tmp_path: Path
) -> None:
    client = small.start("", "--min-free-mb=0")
    dataset = client.upload_dataset(images)
    assert client.fine_tune(dataset, "ants").wait(GUARD_S).version == 1

    # An upload that does not fit leaves nothing.
    with pytest.raises(graftml.errors.ResourceExhausted) as caught:
        client.upload_dataset(noise(tmp_path / "noise"))
    assert is_full(caught)
    assert [known.dataset_id for known in client.list_datasets()] == [dataset.dataset_id]
    wait_until(lambda: not list((inside(small) / "uploads").iterdir()))
    assert problems(small, tmp_path / "copy") == []

    waiting = client.fine_tune(dataset, "ants", labels={"stand_in": "waits"})
    for event in waiting.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graftml.Note):
            break
    queued = client.fine_tune(dataset, "bees")
    with filled(inside(small)):
        with pytest.raises(graftml.errors.ResourceExhausted) as caught:
            many_jobs(client, dataset)
        assert is_full(caught)
        with pytest.raises(graftml.errors.ResourceExhausted) as caught:
            client.upload_dataset(images, display_name="again")
        assert is_full(caught)
        assert client.predict(next(images.glob("red/*")), model="ants")[0].label == "red"
        assert waiting.refresh().state == "RUNNING"
        # Its end is kept when there is room.
        for trainer in small.trainers():
            trainer.kill()
        small.server.wait_for("a job's outcome cannot be saved yet")
        assert waiting.refresh().state == "RUNNING"
        assert small.server.process.poll() is None
    wait_until(lambda: waiting.refresh().attempts == 2)
    waiting.cancel()
    assert queued.wait(GUARD_S).version == 1
    for job in client.list_jobs(model="wasps"):
        client.job(job.job_id).wait(GUARD_S)
    wait_until(lambda: problems(small, tmp_path / "copy") == [])


def test_what_was_trained_is_published_when_a_full_disk_has_room_again(
    house: House, images: Path
) -> None:
    points = (
        "blob.copied#3",
        "blob.copied#5",
        "database.committing#9",
        "database.committing#10",
        "database.committing#11",
    )
    client = house.start(";".join(f"full@{point}" for point in points))
    dataset = client.upload_dataset(images)
    job = client.fine_tune(dataset, "ants")
    events = list(job.events(timeout_s=GUARD_S))
    assert job.wait(GUARD_S).version == 1
    assert job.refresh().attempts == 1
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    house.said("a result cannot be published yet")
    house.said("No space left on device")
    house.is_sound()


def test_a_server_that_starts_on_a_full_disk_serves_and_takes_its_jobs_up_with_room(
    home: House, images: Path
) -> None:
    client = home.start("kill@job.trainer_started")
    dataset = next(iter(client.list_datasets()))
    with until_death():
        client.fine_tune(dataset, "bees", request_id="once").wait(GUARD_S)
    home.died()
    client = home.start("full@database.committing;full@database.committing#2")
    assert client.predict(next(images.glob("red/*")), model="ants")[0].version == 2
    assert client.fine_tune(dataset, "bees", request_id="once").wait(GUARD_S).version == 1
    home.said("what an earlier process left cannot be taken up yet")
    home.is_sound()


def test_an_upload_that_finds_the_disk_full_leaves_nothing_and_goes_through_later(
    house: House, images: Path, tmp_path: Path
) -> None:
    # Two, since the renewal of the lease may take one.
    commits = [tmp_path / "first", tmp_path / "second"]
    for file in commits:
        file.touch()
    plan = [f"full@database.committing!{file}" for file in commits]
    client = house.start(";".join(["full@dataset.chunk_written", "full@blob.copied", *plan]))
    for turn in range(3):
        if turn == 2:
            for file in commits:
                file.unlink()
        with pytest.raises(graftml.errors.ResourceExhausted) as caught:
            client.upload_dataset(images)
        assert is_full(caught)
        assert list(client.list_datasets()) == []
        assert list((house.data_dir / "uploads").iterdir()) == []
    assert any(file.exists() for file in commits)
    for file in commits:
        file.touch()
    assert client.upload_dataset(images).image_count == 4
    house.is_sound()


def test_jobs_in_the_queue_wait_for_room_on_a_full_disk(
    small: House, images: Path, tmp_path: Path
) -> None:
    client = small.start("", "--min-free-mb=1")
    dataset = client.upload_dataset(images)
    busy = client.fine_tune(dataset, "ants", labels={"stand_in": "waits"})
    for event in busy.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graftml.Note):
            break
    jobs = [client.fine_tune(dataset, "bees") for _ in range(3)]
    with filled(inside(small), leave=2**18):
        busy.cancel()
        small.said("no job is started")
        assert [job.refresh().state for job in jobs] == ["QUEUED"] * 3
    assert [job.wait(GUARD_S).version for job in jobs] == [1, 2, 3]
    assert [job.refresh().attempts for job in jobs] == [1, 1, 1]
    wait_until(lambda: problems(small, tmp_path / "copy") == [])


def connected(house: House) -> sqlite3.Connection:
    """As another process that would have the database to itself, and waits for it."""
    file = house.data_dir / "graft.sqlite3"
    return sqlite3.connect(file, timeout=GUARD_S, isolation_level=None)


def test_services_that_are_stopped_while_the_database_is_held_count_no_crash(
    home: House, images: Path
) -> None:
    for turn in range(3):
        client = home.start("", "--database-timeout-s=0.1")
        if turn == 0:
            dataset = next(iter(client.list_datasets()))
            job = client.fine_tune(dataset, "bees", labels={"stand_in": "waits"})
        watched = client.job(job.job_id)
        for event in watched.events(timeout_s=GUARD_S):
            if isinstance(event.payload, graftml.Note) and watched.refresh().attempts == turn + 1:
                break
        with closing(connected(home)) as held:
            held.execute("BEGIN EXCLUSIVE")
            home.stop()
    # A crash would have been the third, and the last.
    client = home.start()
    again = client.job(job.job_id)
    wait_until(lambda: again.refresh().attempts == 4)
    assert again.refresh().state == "RUNNING"
    again.cancel()
    home.is_sound()


def test_while_another_process_holds_the_database_calls_are_told_and_jobs_wait(
    home: House, images: Path
) -> None:
    client = home.start("", "--database-timeout-s=0.1")
    dataset = next(iter(client.list_datasets()))
    waiting = client.fine_tune(dataset, "bees", labels={"stand_in": "waits"})
    for event in waiting.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graftml.Note):
            break
    with closing(connected(home)) as held:
        held.execute("BEGIN EXCLUSIVE")
        for call in (
            lambda: client.fine_tune(dataset, "bees"),
            lambda: client.set_alias("ants", "live", 2),
            lambda: client.delete_dataset(dataset.dataset_id),
        ):
            with pytest.raises(graftml.errors.Unavailable) as caught:
                call()
            assert caught.value.reason == "STORAGE_BUSY"
            assert caught.value.retry_after_s
        # What only reads goes on.
        assert client.predict(next(images.glob("red/*")), model="ants")[0].version == 2
        assert client.get_model("ants").aliases == {"latest": 2, "live": 1}
        for trainer in home.trainers():
            trainer.kill()
        home.server.wait_for("a job's outcome cannot be saved yet")
        assert waiting.refresh().state == "RUNNING"
    wait_until(lambda: waiting.refresh().attempts == 2)
    assert client.set_alias("ants", "live", 2).aliases["live"] == 2
    # A client that tries again waits by itself.
    waiting.cancel()
    with pytest.raises(graftml.JobCancelled):
        waiting.wait(GUARD_S)
    assert client.fine_tune(dataset, "bees").wait(GUARD_S).version == 1
    home.is_sound()


def test_a_damaged_database_ends_the_start_and_says_what_to_do(home: House) -> None:
    file = home.data_dir / "graft.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("rb+") as opened:
        opened.seek(4096)
        opened.write(bytes(4096))
    with pytest.raises(Ended) as caught:
        home.start()
    assert "is damaged" in str(caught.value)
    assert "put the data folder back from a backup" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_data_folder_that_cannot_be_written_ends_the_start_and_says_so(small: House) -> None:
    small.prefix = on_a_disk(small.data_dir, "ro")
    with pytest.raises(Ended, match=r"cannot be written \(Read-only file system\)"):
        small.start()
