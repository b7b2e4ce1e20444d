"""The server is killed at each step of a job's life: the job ends well, once, all the same."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, until_death, wait_until

pytestmark = pytest.mark.e2e


def published(data_dir: Path) -> int:
    """How many versions whoever looked at the moment of death could see."""
    with closing(sqlite3.connect(data_dir / "graft.sqlite3")) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM versions").fetchone()
        return int(count)


# The first of a group may be counted: nothing was done before in its server but the upload, whose
# blobs are the first.
GROUPS = (
    ("job.record_kept#3", "job.creating", "job.created", "claim.committed"),
    ("blob.intended#2", "job.claimed", "job.settled", "job.preparing"),
    ("blob.copied#3", "job.trainer_started", "model.changed", "job.record_kept"),
    ("blob.stored#3", "job.publishing", "version.inserted", "job.warmed"),
    ("blob.stored#8", "alias.moved", "publish.committed", "job.succeeding"),
)
PUBLISHED = {"model.changed", "publish.committed", "job.settled"}


def attempts(point: str) -> set[int]:
    """How many a job may have had at its end that its server died of there."""
    if point == "job.created":
        # Its row may have been claimed in the same moment.
        return {1, 2}
    return {1} if point in PUBLISHED | {"job.creating"} else {2}


@pytest.mark.parametrize("points", GROUPS, ids=lambda points: points[0])
def test_a_job_whose_server_is_killed_ends_well_and_makes_one_version(
    house: House, images: Path, tmp_path: Path, points: tuple[str, ...]
) -> None:
    first, *others = points
    # A fault acts when its file is not there: the server that finds one job ended well dies of
    # the next.
    for point in others:
        (tmp_path / point).touch()
    later = [f"kill@{point}!{tmp_path / point}" for point in others]
    client = house.start(";".join([f"kill@{first}", *later]))
    dataset = client.upload_dataset(images)
    jobs: list[str] = []
    for number, point in enumerate(points, 1):
        (tmp_path / point).unlink(missing_ok=True)
        wanted = {"request_id": point, "labels": {"team": "post"}}
        accepted = ""
        seen: list[graftml.JobEvent] = []
        with until_death():
            job = client.fine_tune(dataset, "ants", **wanted)
            accepted = job.job_id
            for event in job.events(timeout_s=GUARD_S):
                seen.append(event)
        house.died()
        assert published(house.data_dir) == number - 1 + (point in PUBLISHED)
        client = house.start(";".join(later))
        assert client.get_dataset(dataset.dataset_id) == dataset
        if accepted:
            assert client.get_job(accepted).job_id == accepted
        job = client.fine_tune(dataset, "ants", **wanted)
        assert accepted in ("", job.job_id)
        after = list(job.events(after=len(seen), timeout_s=GUARD_S))
        assert [event.sequence for event in seen + after] == list(range(1, len(seen + after) + 1))
        # By their text: errors within them are equal to themselves alone.
        assert repr(list(job.events(timeout_s=GUARD_S))) == repr(seen + after)
        version = job.wait(GUARD_S)
        assert (version.version, version.aliases) == (number, ("latest",))
        assert job.refresh().attempts in attempts(point)
        jobs.insert(0, job.job_id)
        # Ids and numbers that were given out at a death are not given again.
        assert [known.job_id for known in client.list_jobs()] == jobs == sorted(jobs, reverse=True)
        [answer] = client.predict(next(images.glob("red/*")), model="ants")
        assert (answer.label, answer.version) == ("red", number)
    house.is_sound()


def test_a_job_that_was_under_way_at_three_deaths_fails_and_the_server_goes_on(
    house: House, images: Path
) -> None:
    client = house.start("kill@job.claimed")
    dataset = client.upload_dataset(images)
    with until_death():
        client.fine_tune(dataset, "ants", request_id="bad")
    house.died()
    # The job comes first at the next starts.
    for _ in range(2):
        house.start_unready("kill@job.claimed")
        house.died()
    client = house.start()
    job = client.fine_tune(dataset, "ants", request_id="bad")
    with pytest.raises(graftml.JobFailed, match="attempt 3 of 3") as failed:
        job.wait(GUARD_S)
    assert failed.value.job.error is not None
    assert failed.value.job.error.reason == "TRAINER_CRASHED"
    assert client.fine_tune(dataset, "ants").wait(GUARD_S).version == 1
    house.is_sound()


def test_a_death_after_jobs_were_queued_again_counts_no_second_crash(
    house: House, images: Path
) -> None:
    client = house.start("kill@job.trainer_started")
    dataset = client.upload_dataset(images)
    with until_death():
        job = client.fine_tune(dataset, "ants", request_id="once")
        job.wait(GUARD_S)
    house.died()
    house.dies_at_start("kill@job.reaped")
    job = house.start().fine_tune(dataset, "ants", request_id="once")
    assert job.wait(GUARD_S).version == 1
    assert job.refresh().attempts == 2
    house.is_sound()


def test_a_job_whose_cancel_was_accepted_is_cancelled_by_the_next_start(
    house: House, images: Path
) -> None:
    client = house.start("kill@job.cancelling")
    job = client.fine_tune(images, "ants", labels={"stand_in": "waits"})
    seen = 0
    with until_death():
        for event in job.events(timeout_s=GUARD_S):
            seen = event.sequence
            if isinstance(event.payload, graftml.Note):
                job.cancel()
    house.died()
    client = house.start()
    last = list(client.watch_job(job.job_id, after=seen, timeout_s=GUARD_S))
    assert [event.sequence for event in last] == list(range(seen + 1, seen + 1 + len(last)))
    assert client.get_job(job.job_id).state == "CANCELLED"
    house.is_sound()


def test_a_trainer_that_waits_for_a_job_ends_with_its_server(house: House) -> None:
    house.start("", "--warm-trainers=1")
    wait_until(lambda: bool(house.trainers()))
    house.kill()


def test_an_archive_on_the_servers_disk_is_stored_once_though_the_server_dies_on_it(
    house: House, images: Path, tmp_path: Path
) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "allowed" / "colours"), "zip", images))
    allowed = f"--allowed-dirs={archive.parent}"
    client = house.start("kill@dataset.kept", allowed)
    data = graftml.ServerPath(str(archive))
    with until_death():
        client.fine_tune(data, "ants", request_id="once").wait(GUARD_S)
    house.died()
    client = house.start("", allowed)
    job = client.fine_tune(data, "ants", request_id="once")
    assert job.wait(GUARD_S).version == 1
    assert len(list(client.list_datasets())) == 1
    house.is_sound()


def test_a_ranking_outlives_its_server(house: House, images: Path) -> None:
    client = house.start("kill@job.trainer_started")
    dataset = client.upload_dataset(images)
    with until_death():
        client.start_ranking(dataset, request_id="once").wait(GUARD_S)
    house.died()
    client = house.start()
    job = client.start_ranking(dataset, request_id="once")
    assert job.wait(GUARD_S).explanation == "nothing was ranked"
    assert job.refresh().attempts == 2
    house.is_sound()
