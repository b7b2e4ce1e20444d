"""The database is damaged under a server: it ends, and goes on when the database is restored."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import graftml
import pytest

from service.__main__ import main
from tests.e2e.conftest import GUARD_S, Ended
from tests.e2e.faults.house import House, wait_until

pytestmark = pytest.mark.e2e

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


def waiting(client: graftml.Client, dataset: graftml.Dataset) -> graftml.JobHandle:
    """A job that is under way and goes on until it is stopped."""
    job = client.fine_tune(dataset, "bees", labels=WAITS)
    for event in job.events(timeout_s=GUARD_S):
        if isinstance(event.payload, graftml.Note):
            break
    return job


def test_a_server_whose_database_is_damaged_ends_and_goes_on_when_it_is_restored(
    home: House, images: Path, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    image = next(images.glob("red/*"))
    client = home.start("", "--cpu-jobs=2")
    dataset = next(iter(client.list_datasets()))
    job = waiting(client, dataset)
    (before,) = client.predict(image, model="ants")
    assert main(["backup", str(backup), f"--data-dir={home.data_dir}"]) == 0

    write_over(home.data_dir / "graft.sqlite3")
    # Whoever comes first upon a page that is damaged ends it: this call, or a look at changes.
    with pytest.raises((graftml.errors.DataLoss, graftml.errors.Unavailable)) as refused:
        client.set_alias("ants", "live", 2)
    if isinstance(refused.value, graftml.errors.DataLoss):
        assert refused.value.reason == "STORAGE_DAMAGED"
    home.ended(1)
    log = "".join(home.said_last)
    assert "is damaged" in log
    assert "CRITICAL" in log
    assert "put the data folder back from a backup" in log
    wait_until(lambda: not home.trainers())

    with pytest.raises(Ended, match="put the data folder back from a backup"):
        home.start()
    # As the runbook has it.
    home.data_dir.rename(tmp_path / "damaged")
    assert main(["restore", str(backup), f"--data-dir={home.data_dir}"]) == 0
    client = home.start("", "--cpu-jobs=2")
    again = client.job(job.job_id)
    wait_until(lambda: again.refresh().attempts == 2)
    again.cancel()
    assert client.predict(image, model="ants") == [before]
    home.is_sound()
