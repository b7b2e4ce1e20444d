"""Clocks that jump, and trainers that hang or run out of memory or of disk."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, wait_until

pytestmark = pytest.mark.e2e

HOUR = timedelta(hours=1)


def in_order(times: Sequence[datetime | None]) -> bool:
    known = [time for time in times if time is not None]
    return len(known) == len(times) and known == sorted(known)


@pytest.mark.parametrize("jump", ["clock+3600", "clock-3600"])
@pytest.mark.parametrize("point", ["job.created", "job.trainer_started"])
def test_a_clock_that_jumps_leaves_jobs_events_and_versions_in_order(
    home: House, images: Path, jump: str, point: str
) -> None:
    client = home.start(f"{jump}@{point}")
    dataset = client.upload_dataset(images)
    jobs = [client.fine_tune(dataset, "bees") for _ in range(3)]
    assert [job.wait(GUARD_S).version for job in jobs] == [1, 2, 3]
    assert [job.job_id for job in client.list_jobs(model="bees")] == [
        job.job_id for job in reversed(jobs)
    ]
    for job in jobs:
        events = list(job.events(timeout_s=GUARD_S))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert in_order([event.time for event in events])
        record = job.refresh()
        assert in_order([record.create_time, record.start_time, record.end_time])
    assert [version.version for version in client.list_versions("bees")] == [3, 2, 1]
    assert client.get_model("bees").aliases == {"latest": 3}
    assert {model.name for model in client.list_models()} == {"ants", "bees"}
    assert [known.dataset_id for known in client.list_datasets()] == [dataset.dataset_id]
    # The jump was one.
    newest = client.get_job(jobs[-1].job_id).end_time
    assert newest is not None
    ahead = newest - datetime.now(UTC)
    assert (ahead > HOUR / 2) == (jump == "clock+3600")
    home.is_sound()


def test_a_server_whose_clock_is_an_hour_behind_its_data_goes_on_in_order(
    house: House, images: Path
) -> None:
    client = house.start("clock+3600@job.created")
    dataset = client.upload_dataset(images)
    before = [client.fine_tune(dataset, "ants") for _ in range(2)]
    assert [job.wait(GUARD_S).version for job in before] == [1, 2]
    house.kill()
    client = house.start()
    after = client.fine_tune(dataset, "ants")
    assert after.wait(GUARD_S).version == 3
    listed = [job.job_id for job in client.list_jobs()]
    assert listed == [after.job_id, before[1].job_id, before[0].job_id]
    record = after.refresh()
    assert in_order([record.create_time, record.start_time, record.end_time])
    house.is_sound()


def test_a_trainer_that_hangs_is_killed_tried_again_and_then_fails_its_job(
    home: House, images: Path
) -> None:
    client = home.start("", "--heartbeat-timeout-s=1")
    dataset = client.upload_dataset(images)
    # It says what it does and then waits for what never comes, while its threads live.
    job = client.fine_tune(dataset, "bees", labels={"stand_in": "waits"})
    with pytest.raises(graftml.JobFailed, match="said nothing for 1 s") as failed:
        job.wait(GUARD_S)
    assert failed.value.reason == "TRAINER_CRASHED"
    assert job.refresh().attempts == 3
    assert not home.trainers()
    # One that computes is let be, however long it says nothing.
    for timeout_s in (1, 8, 64):
        if timeout_s > 1:
            home.stop()
            client = home.start("", f"--heartbeat-timeout-s={timeout_s}")
        labels = {"stand_in": "computes", "for_s": f"{1.5 * timeout_s:g}"}
        busy = client.fine_tune(dataset, "bees", labels=labels)
        with suppress(graftml.JobFailed):
            busy.wait(GUARD_S)
        # Where others have all the cores its heartbeats come late: then once more, with more time.
        if busy.refresh().attempts == 1:
            break
    assert (busy.refresh().state, busy.refresh().attempts) == ("SUCCEEDED", 1)
    home.is_sound()


def test_a_real_trainer_without_memory_fails_its_job_and_one_without_room_is_tried_again(
    tmp_path: Path, digits: Path
) -> None:
    few = [(digit, file) for digit in "01" for file in islice((digits / digit).iterdir(), 4)]
    house = House(tmp_path)
    try:
        client = house.start(f"memory@trainer.started!{tmp_path / 'memory'};full@trainer.started")
        dataset = client.upload_dataset(few)
        with pytest.raises(graftml.JobFailed) as failed:
            client.fine_tune(dataset, "ants").wait(GUARD_S)
        assert failed.value.reason == "OUT_OF_MEMORY"
        assert failed.value.job.attempts == 1
        job = client.fine_tune(dataset, "ants")
        wait_until(lambda: job.refresh().attempts == 2)
        job.cancel()
        with pytest.raises(graftml.JobCancelled):
            job.wait(GUARD_S)
        house.is_sound()
    finally:
        house.close()
