"""How the supervisor stops, what it does at once, and what it does when things fail."""

import asyncio
import errno
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from service.contract import (
    EpochEnded,
    Failed,
    JobSpec,
    Progressed,
)
from service.domain import JobState
from service.errors import Exhausted, Reason, Unavailable
from service.jobs.store import JobRecord
from tests.fake_launcher import Script
from tests.unit.jobs.conftest import Claim, Queue
from tests.unit.jobs.house import EPOCH, FINISHED, GUARD_S, HANGS, MakeHouse, good
from tests.unit.storage.conftest import TENANT


async def test_closing_stops_trainers_and_puts_their_jobs_back(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS)
    job = queue(server_path=folder)
    await house.supervisor.start()
    trainer = await house.trainer()
    await house.supervisor.close(GUARD_S)
    record = house.jobs.get(job.job_id, TENANT)
    assert (record.state, record.attempts, record.crashes) == (JobState.QUEUED, 1, 0)
    assert trainer.stopped.is_set()
    assert len(house.launcher.trainers) == 1


async def test_a_trainer_that_was_just_being_started_is_stopped_too(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    go_on = asyncio.Event()
    house = make_house(Script(hangs=True, starts_after=go_on))
    job = queue(server_path=folder)
    await house.supervisor.start()
    await asyncio.wait_for(house.launcher.starting.wait(), GUARD_S)
    closing = asyncio.create_task(house.supervisor.close(GUARD_S))
    await asyncio.sleep(0)
    go_on.set()
    await closing
    assert house.launcher.trainers[0].stopped.is_set()
    assert house.jobs.get(job.job_id, TENANT).state is JobState.QUEUED


async def test_what_was_running_when_the_service_died_is_taken_up_again(
    make_house: MakeHouse, queue: Queue, folder: str, claim: Claim
) -> None:
    house = make_house(good())
    job = queue(server_path=folder)
    assert claim() is not None
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 2, 1)


async def test_no_more_jobs_run_at_once_than_there_are_slots(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, gpus=("0",), cpu_jobs=2, gpu_jobs=1)
    devices = ["cpu", "auto", "cpu", "cuda", "cpu"]
    jobs = {queue(server_path=folder, device=d).job_id: d for d in devices}
    await house.supervisor.start()
    # Two that were claimed in order may be prepared in any.
    trainers = sorted([await house.trainer() for _ in range(3)], key=lambda t: t.spec.job_id)
    assert [jobs[t.spec.job_id] for t in trainers] == ["cpu", "auto", "cpu"]
    assert [t.spec.device for t in trainers] == ["cpu", "auto", "cpu"]
    assert house.jobs.counts_by_state()["QUEUED"] == 2
    await asyncio.to_thread(house.jobs.request_cancel, trainers[1].spec.job_id, TENANT)
    assert (await house.trainer()).spec.device == "cuda"
    assert house.jobs.counts_by_state() == {
        "QUEUED": 1, "RUNNING": 3, "SUCCEEDED": 0, "FAILED": 0, "CANCELLED": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        ("cuda", {}),
        ("cuda", {"gpus": ("0",), "gpu_jobs": 0}),
        ("cpu", {"cpu_jobs": 0, "gpus": ("0",)}),
        ("auto", {"cpu_jobs": 0}),
    ],
)
async def test_a_job_for_a_device_that_nothing_trains_on_fails_at_once(
    make_house: MakeHouse, queue: Queue, folder: str, device: str, changes: dict[str, object]
) -> None:
    house = make_house(good(), **changes)
    job = queue(server_path=folder, device=device)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).error_reason is Reason.DEVICE_UNAVAILABLE
    assert house.launcher.trainers == []


async def test_figures_of_an_epoch_are_shown_while_the_job_runs(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    no_held_out = msgspec.structs.replace(EPOCH, validation_loss=None, validation_accuracy=None)
    house = make_house(Script([EPOCH, no_held_out, Progressed("training", 0.4)], hangs=True))
    job = queue(server_path=folder)
    await house.supervisor.start()
    await house.trainer()
    labels = {"job_id": job.job_id, "model": "birds"}
    assert house.metric("graft_training_validation_accuracy", **labels) == 0.6
    assert house.metric("graft_training_epochs_planned", **labels) == 3
    await asyncio.to_thread(house.jobs.request_cancel, job.job_id, TENANT)
    await house.ended(job.job_id)
    await house.supervisor.close(GUARD_S)
    assert house.metric("graft_training_epoch", **labels) is None
    count = house.metric("graft_job_duration_seconds_count", method="auto")
    assert count == 1


async def test_progress_is_kept_in_steps(make_house: MakeHouse, queue: Queue, folder: str) -> None:
    fine = [Progressed("training", n / 5000) for n in range(5001)]
    house = make_house(good(*fine, Progressed("exporting", 0.0)))
    job = queue(server_path=folder)
    await house.supervisor.start()
    await house.ended(job.job_id)
    kept = [
        e.payload
        for e in house.jobs.events(job.job_id, TENANT, 0)
        if isinstance(e.payload, Progressed)
    ]
    of_training = [p.fraction for p in kept if p.stage == "training"]
    assert (of_training[0], of_training[-1]) == (0.0, 1.0)
    assert len(of_training) <= 102
    assert [p.stage for p in kept][-2:] == ["exporting", "publishing"]


async def test_an_outcome_that_found_the_disk_full_is_saved_when_there_is_room(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(Script([Failed(Reason.TRAINING_FAILED, "no")], exit_code=3))
    fail, tries = house.claims.fail, []

    def full_twice(*asked: object) -> JobRecord:
        tries.append(asked)
        if len(tries) <= 2:
            raise Exhausted(Reason.STORAGE_FULL, "full")
        return fail(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(house.claims, "fail", full_twice)
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).error_reason is Reason.TRAINING_FAILED
    assert len(tries) == 3


async def test_a_full_disk_keeps_jobs_waiting_and_the_service_alive(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    claim, tries = house.claims.claim, []

    def full_once(*asked: Any) -> JobRecord | None:
        tries.append(asked)
        if len(tries) == 1:
            raise Exhausted(Reason.STORAGE_FULL, "full")
        return claim(*asked)

    monkeypatch.setattr(house.claims, "claim", full_once)
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED


async def test_an_unexpected_error_fails_its_job_alone(
    make_house: MakeHouse, queue: Queue, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(_: JobSpec) -> None:
        raise KeyError("a bug")

    house = make_house(Script([FINISHED], before_last=bug), good())
    job, other = queue(server_path=folder), queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert record.error_reason is Reason.INTERNAL
    assert "a bug" not in record.error_message
    assert "a bug" in caplog.text
    assert (await house.ended(other.job_id)).state is JobState.SUCCEEDED


async def test_a_supervisor_that_can_go_no_further_says_so(
    make_house: MakeHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house()

    def broken(_: str) -> set[str]:
        raise RuntimeError("the database is broken")

    monkeypatch.setattr(house.claims, "to_cancel", broken)
    await house.supervisor.start()
    with pytest.raises(RuntimeError, match="the database is broken"):
        await asyncio.wait_for(house.supervisor.wait_failed(), GUARD_S)


async def test_an_outcome_that_cannot_be_saved_stops_the_supervisor(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(Script([Failed(Reason.TRAINING_FAILED, "no")]))

    def broken(*_: object) -> JobRecord:
        raise RuntimeError("the database is broken")

    monkeypatch.setattr(house.claims, "fail", broken)
    queue(server_path=folder)
    await house.supervisor.start()
    with pytest.raises(RuntimeError, match="the database is broken"):
        await asyncio.wait_for(house.supervisor.wait_failed(), GUARD_S)


async def test_the_event_loop_is_never_held_up_by_the_database(
    make_house: MakeHouse, queue: Queue, folder: str, database: object
) -> None:
    house = make_house(good())
    await house.supervisor.start()
    job = queue(server_path=folder)
    with database.transaction():  # type: ignore[attr-defined]
        house.supervisor.wake()
        # Whatever the supervisor wants to write, this thread holds the only pen.
        for _ in range(200):
            await asyncio.sleep(0)
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED


def passing(times: int, reason: Reason, do: Callable[..., Any]) -> Callable[..., Any]:
    """Does it after it was refused so often."""
    left = [times]

    def refuse(*asked: object, **named: object) -> object:
        if left[0]:
            left[0] -= 1
            kind = Exhausted if reason is Reason.STORAGE_FULL else Unavailable
            raise kind(reason, "not now")
        return do(*asked, **named)

    return refuse


@pytest.mark.parametrize("reason", [Reason.STORAGE_FULL, Reason.STORAGE_BUSY])
@pytest.mark.parametrize("step", ["put_result", "append", "succeed"])
async def test_what_was_trained_waits_for_the_disk_or_the_database(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    reason: Reason,
    step: str,
) -> None:
    house = make_house(good(EPOCH))
    owner = house.models if step == "put_result" else house.claims
    monkeypatch.setattr(owner, step, passing(2, reason, getattr(owner, step)))
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts) == (JobState.SUCCEEDED, 1)
    kinds = [type(event.payload) for event in house.jobs.events(job.job_id, TENANT, 0)]
    assert kinds.count(EpochEnded) == 1


async def test_a_version_that_finds_no_room_for_long_fails_its_job(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good(), good(), room_timeout_s=0.05)
    put = house.models.put_result
    monkeypatch.setattr(house.models, "put_result", passing(10**9, Reason.STORAGE_FULL, put))
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.STORAGE_FULL)


async def test_an_attempt_that_finds_the_database_held_counts_for_nothing(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good(), max_crashes=1)
    found = house.models.exported_backbones
    monkeypatch.setattr(house.models, "exported_backbones", passing(2, Reason.STORAGE_BUSY, found))
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 3, 0)


async def test_a_trainer_that_finds_no_room_for_its_folder_for_long_fails_its_job(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good(), max_crashes=1, room_timeout_s=0.05)

    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(house.launcher, "start", full)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.error_reason, record.crashes) == (Reason.STORAGE_FULL, 0)
    assert record.attempts > 1


async def test_what_an_earlier_process_left_is_taken_up_when_the_disk_has_room(
    make_house: MakeHouse, queue: Queue, folder: str, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = make_house(good())
    job = queue(server_path=folder)
    assert claim() is not None
    replicas = house.supervisor._replicas
    for step in ("register", "reap"):
        refused = passing(2, Reason.STORAGE_FULL, getattr(replicas, step))
        monkeypatch.setattr(replicas, step, refused)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED


async def test_a_replica_that_was_given_up_stops_and_goes_on_under_a_new_id(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, good(), beat_s=0.01)
    job = queue(server_path=folder)
    await house.supervisor.start()
    trainer = await house.trainer()
    with house.jobs.database.transaction() as connection:
        connection.execute("DELETE FROM replicas")
    record = await house.ended(job.job_id)
    assert trainer.stopped.is_set()
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 2, 1)


async def test_a_worker_that_lost_its_job_stops_its_trainer_and_writes_nothing(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS)
    job = queue(server_path=folder)
    await house.supervisor.start()
    trainer = await house.trainer()
    # As another replica would that took it over.
    with house.jobs.database.transaction() as connection:
        connection.execute("UPDATE jobs SET owner = 'another', attempts = attempts + 1")
    before = house.jobs.events(job.job_id, TENANT, 0)
    await asyncio.to_thread(house.jobs.request_cancel, job.job_id, TENANT)
    await house.supervisor.close(GUARD_S)
    assert trainer.stopped.is_set()
    assert house.jobs.events(job.job_id, TENANT, 0) == before
    assert house.jobs.get(job.job_id, TENANT).owner == "another"
