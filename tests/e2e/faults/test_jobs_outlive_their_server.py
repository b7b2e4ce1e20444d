"""The server is killed at each step of a job's life: the job ends well, once, all the same."""

import shutil
from pathlib import Path

import graft
import pytest

from service.storage.check import read_only
from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, until_death, wait_until

pytestmark = pytest.mark.e2e


def published(data_dir: Path) -> int:
    """How many versions whoever looked at the moment of death could see."""
    with read_only(data_dir) as connection:
        (count,) = connection.execute("SELECT COUNT(*) FROM versions").fetchone()
        return int(count)


ATTEMPTS = {
    "job.creating": {1},
    # Its row may have been claimed in the same moment.
    "job.created": {1, 2},
    "job.claimed": {2},
    "job.preparing": {2},
    "job.trainer_started": {2},
    "job.record_kept": {2},
    "job.record_kept#3": {2},
    "job.publishing": {2},
    "artifacts.backbone_copied": {2},
    "artifacts.backbone_renamed": {2},
    "artifacts.version_copied": {2},
    "artifacts.version_renamed": {2},
    "job.warmed": {2},
    "version.inserted": {2},
    "alias.moved": {2},
    "job.succeeding": {2},
    "model.changed": {1},
    "job.settled": {1},
}
"""How many a job has had at its end."""
PUBLISHED = {"model.changed", "job.settled"}
NUMBERED = {"job.created", "version.inserted", *PUBLISHED}
"""Where a number was given out at the death: the next job's ids and numbers go on."""


@pytest.mark.parametrize("point", ATTEMPTS)
def test_a_job_whose_server_is_killed_ends_well_and_makes_one_version(
    house: House, images: Path, point: str
) -> None:
    client = house.start(f"kill@{point}")
    dataset = client.upload_dataset(images)
    accepted = ""
    seen: list[graft.JobEvent] = []
    with until_death():
        job = client.fine_tune(dataset, "ants", request_id="once", labels={"team": "post"})
        accepted = job.job_id
        for event in job.events(timeout_s=GUARD_S):
            seen.append(event)
    house.died()
    assert published(house.data_dir) == (point in PUBLISHED)

    client = house.start()
    assert client.get_dataset(dataset.dataset_id) == dataset
    if accepted:
        assert client.get_job(accepted).job_id == accepted
    job = client.fine_tune(dataset, "ants", request_id="once", labels={"team": "post"})
    assert accepted in ("", job.job_id)
    after = list(job.events(after=len(seen), timeout_s=GUARD_S))
    assert [event.sequence for event in seen + after] == list(range(1, len(seen + after) + 1))
    # By their text: errors within them are equal to themselves alone.
    assert repr(list(job.events(timeout_s=GUARD_S))) == repr(seen + after)
    version = job.wait(GUARD_S)
    assert (version.version, version.aliases) == (1, ("latest",))
    assert job.refresh().attempts in ATTEMPTS[point]
    assert [known.job_id for known in client.list_jobs()] == [job.job_id]
    [answer] = client.predict(next(images.glob("red/*")), model="ants")
    assert answer.label == "red"

    if point in NUMBERED:
        later = client.fine_tune(dataset, "ants")
        assert later.wait(GUARD_S).version == 2
        assert later.job_id > job.job_id
    house.is_sound()


def test_a_job_that_was_under_way_at_two_deaths_fails_and_the_server_goes_on(
    house: House, images: Path
) -> None:
    client = house.start("kill@job.claimed")
    dataset = client.upload_dataset(images)
    with until_death():
        client.fine_tune(dataset, "ants", request_id="bad")
    house.died()
    # The job comes first at the next start.
    house.start_unready("kill@job.claimed")
    house.died()
    client = house.start()
    job = client.fine_tune(dataset, "ants", request_id="bad")
    with pytest.raises(graft.JobFailed, match="attempt 2 of 2") as failed:
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
    house.dies_at_start("kill@job.requeued")
    job = house.start().fine_tune(dataset, "ants", request_id="once")
    assert job.wait(GUARD_S).version == 1
    assert job.refresh().attempts == 2
    house.is_sound()


def test_a_death_while_leftovers_are_swept_leaves_them_to_the_next_start(
    house: House, images: Path
) -> None:
    client = house.start("kill@artifacts.version_renamed")
    dataset = client.upload_dataset(images)
    with until_death():
        client.fine_tune(dataset, "ants", request_id="once").wait(GUARD_S)
    house.died()
    house.dies_at_start("kill@artifacts.sweeping")
    job = house.start().fine_tune(dataset, "ants", request_id="once")
    assert job.wait(GUARD_S).version == 1
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
            if isinstance(event.payload, graft.Note):
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
    data = graft.ServerPath(str(archive))
    with until_death():
        client.fine_tune(data, "ants", request_id="once").wait(GUARD_S)
    house.died()
    client = house.start("", allowed)
    job = client.fine_tune(data, "ants", request_id="once")
    assert job.wait(GUARD_S).version == 1
    assert len(list(client.list_datasets())) == 1
    house.is_sound()


def test_a_ranking_dies_with_its_server_and_leaves_nothing(house: House, images: Path) -> None:
    client = house.start("kill@ranking.trainer_started")
    dataset = client.upload_dataset(images)
    with until_death():
        client.rank_backbones(dataset)
    house.died()
    house.start()
    house.is_sound()
