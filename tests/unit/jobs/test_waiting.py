"""What jobs do while the disk is full or the database held: they wait, and little is done."""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.contract import Failed, Progressed
from service.domain import JobKind, JobState
from service.errors import Reason, Unavailable
from service.jobs.store import JobRecord
from service.storage.blobs import BlobFolder
from service.storage.collector import Collector
from service.storage.database import Database
from tests.fake_launcher import Script
from tests.keys import BIRDS
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import GUARD_S, HANGS, House, MakeHouse, good
from tests.unit.jobs.test_supervisor_bounds import passing
from tests.unit.storage.conftest import TENANT

NO_ROOM = Script([Failed(Reason.STORAGE_FULL, "no room for features")], exit_code=3)


def put(house: House, change: Callable[[], None], then: Callable[..., object]) -> None:
    """Does it before a result is put."""
    real = house.models.put_result

    def instead(out_dir: Path) -> object:
        change()
        return then(real, out_dir)

    house.models.put_result = instead  # type: ignore[method-assign, assignment]


async def test_a_trainer_that_finds_no_room_is_started_again_when_there_is_some(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(NO_ROOM, NO_ROOM, good(), max_crashes=1)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 3, 0)


async def test_jobs_behind_one_that_waits_for_room_run_meanwhile(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, later = time.time(), [0.0]
    monkeypatch.setattr(time, "time", lambda: began + later[0])
    house = make_house(NO_ROOM, good(), retry_s=5.0)
    first, second = queue(server_path=folder), queue(server_path=folder)
    await house.supervisor.start()
    await house.ended(second.job_id)
    later[0] = 5.0
    house.supervisor.wake()
    assert (await house.ended(first.job_id)).state is JobState.SUCCEEDED
    started = [trainer.spec.job_id for trainer in house.launcher.trainers]
    assert started == [first.job_id, second.job_id, first.job_id]


async def test_no_job_begins_on_a_disk_without_room(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good(), min_free_bytes=100)
    asked, disk = asyncio.Event(), SimpleNamespace(f_flag=0, f_bavail=99, f_frsize=1)
    loop = asyncio.get_running_loop()

    def statvfs(_: Path) -> object:
        loop.call_soon_threadsafe(asked.set)
        return disk

    monkeypatch.setattr(os, "statvfs", statvfs)
    jobs = [queue(server_path=folder) for _ in range(3)]
    await house.supervisor.start()
    for _ in range(3):
        await asyncio.wait_for(asked.wait(), GUARD_S)
        asked.clear()
    assert house.jobs.counts_by_state()["QUEUED"] == 3
    disk.f_flag, disk.f_bavail = os.ST_RDONLY, 10**6
    for _ in range(3):
        await asyncio.wait_for(asked.wait(), GUARD_S)
        asked.clear()
    assert house.jobs.counts_by_state()["QUEUED"] == 3
    disk.f_flag = 0
    for job in jobs:
        record = await house.ended(job.job_id)
        assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ETIMEDOUT])
async def test_a_folder_that_is_read_only_or_does_not_answer_costs_few_attempts(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    house = make_house(good(), retry_s=5.0, room_timeout_s=0.5)

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(house.supervisor._attempts._specs, "spec", refused)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.STORAGE_BUSY)
    assert 2 <= record.attempts <= 5
    assert record.crashes == 0


async def test_a_job_that_is_deferred_during_a_look_for_due_ones_is_not_overlooked(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    supervisor, loop = house.supervisor, asyncio.get_running_loop()
    due_s, spec, looked = house.claims.due_s, supervisor._attempts._specs.spec, threading.Event()
    refused: list[int] = []

    def deferred_meanwhile() -> float | None:
        due = due_s()
        if (workers := list(supervisor._workers.values())) and not looked.is_set():
            looked.set()
            ended = asyncio.wait([worker.task for worker in workers if worker.task is not None])
            asyncio.run_coroutine_threadsafe(ended, loop).result(GUARD_S)
        return due

    def refused_once(*given: object, **named: object) -> object:
        if refused:
            return spec(*given, **named)  # type: ignore[arg-type]
        refused.append(1)
        loop.call_soon_threadsafe(supervisor.wake)
        looked.wait(GUARD_S)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(house.claims, "due_s", deferred_meanwhile)
    monkeypatch.setattr(supervisor._attempts._specs, "spec", refused_once)
    job = queue(server_path=folder)
    await supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts) == (JobState.SUCCEEDED, 2)


def test_a_job_is_deferred_for_as_long_again_as_it_has_waited(make_house: MakeHouse) -> None:
    deferred_s = make_house(retry_s=5.0).settings.deferred_s
    assert [deferred_s(waited_s) for waited_s in (0, 3, 1000)] == [0.1, 3, 60]


async def test_publishing_is_told_once_and_files_are_copied_once(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    copied: list[None] = []
    put(house, lambda: copied.append(None), lambda real, out_dir: real(out_dir))
    succeed = passing(3, Reason.STORAGE_BUSY, house.claims.succeed)
    monkeypatch.setattr(house.claims, "succeed", succeed)
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED
    told = [event.payload for event in house.jobs.events(job.job_id, TENANT, 0)]
    assert told.count(Progressed("publishing", 0.0)) == 1
    assert len(copied) == len(house.warmed) == 1


async def test_a_job_that_waits_to_publish_can_be_cancelled(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    tried, loop = asyncio.Event(), asyncio.get_running_loop()

    def held(*_: object) -> None:
        loop.call_soon_threadsafe(tried.set)
        raise Unavailable(Reason.STORAGE_BUSY, "held")

    monkeypatch.setattr(house.claims, "succeed", held)
    job = queue(server_path=folder)
    await house.supervisor.start()
    await asyncio.wait_for(tried.wait(), GUARD_S)
    await asyncio.to_thread(house.jobs.request_cancel, job.job_id, TENANT)
    assert (await house.ended(job.job_id)).state is JobState.CANCELLED


@pytest.mark.parametrize("reason", [Reason.STORAGE_FULL, Reason.STORAGE_BUSY])
async def test_a_version_that_cannot_be_published_for_long_fails_its_job(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    reason: Reason,
) -> None:
    house = make_house(good(), room_timeout_s=0.05)
    monkeypatch.setattr(house.claims, "succeed", passing(10**9, reason, house.claims.succeed))
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, reason)


async def test_a_result_whose_files_were_collected_before_it_was_published_is_put_again(
    make_house: MakeHouse, queue: Queue, folder: str, database: Database, store: BlobFolder
) -> None:
    house = make_house(good())
    puts = []

    def collected(real: Callable[[Path], object], out_dir: Path) -> object:
        stored = real(out_dir)
        puts.append(stored)
        if len(puts) == 1:
            Collector(database, store, grace_s=0).run()
        return stored

    put(house, lambda: None, collected)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts, len(puts)) == (JobState.SUCCEEDED, 1, 2)
    Collector(database, store, grace_s=0).run()
    version = house.models.get_version(BIRDS, 1, None)
    assert house.models.report(version, html=False)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
async def test_a_leftover_that_cannot_be_deleted_ends_nothing(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    house = make_house(Script(exit_code=1), good())
    job = queue(server_path=folder)
    own = house.settings.work_dir / job.job_id
    own.mkdir(parents=True)
    (own / "spec.json").write_bytes(b"")
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "spec.json":
            raise OSError(number, os.strerror(number))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED


@pytest.mark.parametrize("reason", [Reason.STORAGE_FULL, Reason.STORAGE_BUSY])
async def test_stops_that_can_save_nothing_count_for_nothing(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    reason: Reason,
) -> None:
    job = queue(server_path=folder)
    for _ in range(3):
        house = make_house(HANGS, max_crashes=1)
        with monkeypatch.context() as held:
            await house.supervisor.start()
            await house.trainer()
            held.setattr(house.claims, "requeue", passing(10**9, reason, house.claims.requeue))
            await house.supervisor.close(GUARD_S)
        assert house.jobs.get(job.job_id, TENANT).state is JobState.RUNNING
    house = make_house(good(), max_crashes=1)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.crashes) == (JobState.SUCCEEDED, 0)


async def test_the_end_of_a_supervisor_that_failed_is_no_drain(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(HANGS)
    job = queue(server_path=folder)
    await house.supervisor.start()
    await house.trainer()

    def broken(*_: object) -> object:
        raise RuntimeError("the database is broken")

    monkeypatch.setattr(house.claims, "to_cancel", broken)
    monkeypatch.setattr(house.claims, "requeue", broken)
    house.supervisor.wake()
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(house.supervisor.wait_failed(), GUARD_S)
    await house.supervisor.close(GUARD_S)
    await (house := make_house(good())).supervisor.start()
    assert (await house.ended(job.job_id)).crashes == 1


def hold_claim(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> tuple[asyncio.Event, threading.Event]:
    """Has the supervisor's claim wait; says when it does, and lets it go on."""
    claim, claiming, go_on = house.claims.claim, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(owner: str, kind: JobKind, devices: list[str]) -> JobRecord | None:
        if "cuda" not in devices and kind is JobKind.FINE_TUNE:  # those are refused here
            loop.call_soon_threadsafe(claiming.set)
            go_on.wait(2 * GUARD_S)
        return claim(owner, kind, devices)

    monkeypatch.setattr(house.claims, "claim", slow)
    return claiming, go_on


async def test_closing_takes_no_longer_than_its_grace_though_the_database_is_held(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    claiming, go_on = hold_claim(house, monkeypatch)
    queue(server_path=folder)
    await house.supervisor.start()
    await asyncio.wait_for(claiming.wait(), GUARD_S)
    try:
        # Though the claim still waits.
        await asyncio.wait_for(house.supervisor.close(0.2), GUARD_S)
    finally:
        go_on.set()


async def test_a_job_that_was_just_being_claimed_at_the_close_is_put_back(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    claiming, go_on = hold_claim(house, monkeypatch)
    job = queue(server_path=folder)
    await house.supervisor.start()
    await asyncio.wait_for(claiming.wait(), GUARD_S)
    closing = asyncio.create_task(house.supervisor.close(GUARD_S))
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert house.jobs.get(job.job_id, TENANT).state is JobState.QUEUED
    assert house.launcher.trainers == []
