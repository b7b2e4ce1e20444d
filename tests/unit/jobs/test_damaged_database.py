"""Jobs when the database is found damaged: they stop, and the next start takes them up."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.contract import Progressed
from service.domain import JobState
from service.errors import Damaged
from service.storage.database import Database
from tests.fake_launcher import Script
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import EPOCH, FINISHED, GUARD_S, HANGS, House, MakeHouse, good, writes
from tests.unit.storage.conftest import TENANT

Damage = Callable[..., None]


@pytest.fixture
def damage(database: Database, monkeypatch: pytest.MonkeyPatch) -> Damage:
    """From now on the database is one that was found damaged, or was restored."""

    def damage(is_damaged: bool = True) -> None:
        monkeypatch.setattr(database, "_is_damaged", is_damaged)

    return damage


async def outlives(house: House, until: asyncio.Event) -> None:
    """The supervisor stops when it is told to, having failed in nothing."""
    failed = asyncio.create_task(house.supervisor.wait_failed())
    await asyncio.wait_for(until.wait(), GUARD_S)
    await house.supervisor.close(GUARD_S)
    assert not failed.done()
    failed.cancel()
    assert all(trainer.stopped.is_set() for trainer in house.launcher.trainers)


async def goes_on(house: House, job_id: str) -> None:
    """With the database restored, the job ends well; nobody could note that it had not crashed."""
    await house.supervisor.start()
    record = await house.ended(job_id)
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 2, 1)


async def test_a_job_that_cannot_be_put_back_at_the_stop_is_taken_up_by_the_next_start(
    make_house: MakeHouse, queue: Queue, folder: str, damage: Damage
) -> None:
    job, house = queue(server_path=folder), make_house(HANGS)
    await house.supervisor.start()
    damage_found = (await house.trainer()).said_all
    damage()
    await outlives(house, damage_found)
    assert house.jobs.get(job.job_id, TENANT).state is JobState.RUNNING
    damage(False)
    await goes_on(make_house(good()), job.job_id)


@pytest.mark.parametrize("said_last", [EPOCH, FINISHED])
async def test_a_trainer_whose_words_cannot_be_kept_is_stopped_and_its_job_stays_under_way(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    damage: Damage,
    caplog: pytest.LogCaptureFixture,
    said_last: Any,
) -> None:
    def before(spec: Any) -> None:
        writes(spec)
        damage()

    script = Script([Progressed("training", 0.1), said_last], before_last=before, hangs=True)
    job, behind = queue(server_path=folder), queue(server_path=folder)
    house = make_house(script)
    await house.supervisor.start()
    trainer = await asyncio.wait_for(house.launcher.started.get(), GUARD_S)
    with caplog.at_level(logging.ERROR):
        await outlives(house, trainer.stopped)
    assert sum("what became of a job cannot be saved" in told for told in caplog.messages) == 1
    assert house.jobs.get(job.job_id, TENANT).state is JobState.RUNNING
    assert house.jobs.get(behind.job_id, TENANT).state is JobState.QUEUED
    assert (house.settings.work_dir / job.job_id).exists()
    damage(False)
    await goes_on(make_house(good()), job.job_id)


async def test_what_was_stored_and_cannot_be_published_is_left_to_the_next_start(
    make_house: MakeHouse, queue: Queue, folder: str, damage: Damage
) -> None:
    house, stored = make_house(good()), asyncio.Event()
    put, loop = house.models.put_result, asyncio.get_running_loop()

    def then_damage(out_dir: Path) -> object:
        found = put(out_dir)
        damage()
        loop.call_soon_threadsafe(stored.set)
        return found

    house.models.put_result = then_damage  # type: ignore[method-assign, assignment]
    job = queue(server_path=folder)
    await house.supervisor.start()
    await outlives(house, stored)
    assert house.jobs.get(job.job_id, TENANT).state is JobState.RUNNING
    house.models.put_result = put  # type: ignore[method-assign]
    damage(False)
    await goes_on(make_house(good()), job.job_id)


async def test_trainers_are_stopped_and_no_more_is_tried_once_no_job_can_be_claimed(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    damage: Damage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    house = make_house(HANGS, cpu_jobs=2)
    job = queue(server_path=folder)
    claim, refused = house.claims.claim, []

    # From the start, since the supervisor may be about to claim when the damage is done.
    def watched(*asked: Any) -> Any:
        try:
            return claim(*asked)
        except Damaged:
            refused.append(asked)
            raise

    monkeypatch.setattr(house.claims, "claim", watched)
    await house.supervisor.start()
    trainer = await house.trainer()
    damage()
    with caplog.at_level(logging.ERROR):
        house.supervisor.wake()
        await asyncio.wait_for(trainer.stopped.wait(), GUARD_S)
        house.supervisor.wake()
        await outlives(house, trainer.stopped)
    assert len(refused) == 1
    assert sum("jobs are stopped" in told for told in caplog.messages) == 1
    assert house.jobs.get(job.job_id, TENANT).state is JobState.RUNNING
