import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from service.contract import (
    DEFAULT_BACKBONE,
    Auto,
    Heartbeat,
    ImageSource,
    JobSpec,
    ModelBased,
    Note,
    Progressed,
)
from service.domain import GateCheck, JobState
from service.errors import Reason
from service.ingest.reader import INDEX_FILE
from service.jobs.records import Payload, Published, StateChanged
from service.ops import cgroups
from service.storage.blobs import Blobs
from service.storage.version_rows import StoredVersion
from tests.fake_launcher import Script
from tests.figures import figure
from tests.keys import BIRDS
from tests.unit.ingest.packing import FILES, tar_gz_of
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import EPOCH, FINISHED, FOUND, GUARD_S, HANGS, House, MakeHouse, good
from tests.unit.loop_clock import LoopClock
from tests.unit.storage.conftest import TENANT, digest, write_result
from tests.unit.storage.test_datasets import IMAGES, upload


def _timeless(payload: Payload) -> Payload:
    if isinstance(payload, Progressed):
        return msgspec.structs.replace(payload, elapsed_s=0.0)
    return payload


async def test_a_job_goes_from_the_queue_to_a_served_version(
    make_house: MakeHouse, queue: Queue, folder: str, blobs: Blobs
) -> None:
    house = make_house(good(FOUND, Heartbeat(), EPOCH, Note("info", "x")))
    job_id = queue(server_path=folder, labels={"a": "b"}).job_id
    await house.supervisor.start()
    record = await house.ended(job_id)
    assert (record.state, record.version, record.attempts) == (JobState.SUCCEEDED, 1, 1)
    events = [e.payload for e in house.jobs.events(job_id, TENANT, 0)]
    assert [_timeless(payload) for payload in events] == [
        StateChanged(JobState.QUEUED),
        StateChanged(JobState.RUNNING),
        Progressed("preparing", 0.0),
        Progressed("reading", 0.0, "images", 0, 2),
        Progressed("reading", 0.5, "images", 1, 2),
        Progressed("reading", 1.0, "images", 2, 2),
        FOUND,
        EPOCH,
        Note("info", "x"),
        Progressed("publishing", 0.0),
        Published("birds", 1, figure(0.5, 2), calibrated=True),
        StateChanged(JobState.SUCCEEDED),
    ]
    files = house.models.resolve(BIRDS, None, None)
    assert blobs.are_there([files.head_digest]) == {files.head_digest}
    assert [stored.manifest.model for stored in house.warmed] == ["birds"]
    await house.supervisor.close(GUARD_S)
    assert house.metric("graft_jobs_ended_total", state="SUCCEEDED") == 1
    made = {"outcome": "published", "calibrated": "yes", "gate": "none"}
    assert house.metric("graft_versions_published_total", **made) == 1


async def test_the_spec_says_what_was_asked_and_what_the_server_chose(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path
) -> None:
    house = make_house(good(), trainer_threads=3, provider="cpu", max_job_s=1000)
    method = ModelBased(epochs=2)
    plain = queue(server_path=folder)
    full = queue(
        server_path=folder, backbone="resnet18", weights="random", method=method, seed=7,
        validation_fraction=0.3, time_budget_s=60.0, labels={"a": "b"}, device="cpu",
    )  # fmt: skip
    await house.supervisor.start()
    for job in (plain, full):
        assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED
    first, second = (trainer.spec for trainer in house.launcher.trainers)
    assert first == JobSpec(
        job_id=plain.job_id, model="birds",
        data=ImageSource(
            folder=folder,
            index_file=str(tmp_path / "data" / "work" / plain.job_id / "data" / INDEX_FILE),
        ),
        out_dir=str(tmp_path / "data" / "work" / plain.job_id / "out"), method=Auto(),
        backbone=DEFAULT_BACKBONE, weights_dir=str(tmp_path / "weights"), time_budget_s=900,
        device="cpu", threads=3, provider="cpu", precision="auto",
        checkpoint_dir=str(tmp_path / "data" / "work" / plain.job_id / "checkpoint"),
    )  # fmt: skip
    assert (second.backbone, second.weights, second.method) == ("resnet18", "random", method)
    assert (second.seed, second.validation_fraction, second.time_budget_s) == (7, 0.3, 60)
    assert second.labels == {"a": "b"}


async def test_a_later_job_is_told_of_the_backbone_that_an_earlier_one_exported(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(good())
    jobs = [queue(server_path=folder), queue(server_path=folder)]
    await house.supervisor.start()
    for job in jobs:
        await house.ended(job.job_id)
    first, second = (trainer.spec.exported for trainer in house.launcher.trainers)
    assert first == []
    assert [known.digest for known in second] == [digest(b"backbone")]


async def test_the_jobs_folder_is_gone_after_it(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(good())
    house.settings.work_dir.mkdir(parents=True)
    (house.settings.work_dir / "left").mkdir()
    job = queue(server_path=folder)
    await house.supervisor.start()
    await house.ended(job.job_id)
    await house.supervisor.close(GUARD_S)
    assert list(house.settings.work_dir.iterdir()) == []
    waiting, cancelled = queue(server_path=folder), queue(server_path=folder)
    house.jobs.request_cancel(cancelled.job_id, TENANT)
    for each in (waiting, cancelled):
        (house.settings.work_dir / each.job_id).mkdir()
    house.supervisor.sweep()
    assert [path.name for path in house.settings.work_dir.iterdir()] == [waiting.job_id]


def assert_reads(spec: JobSpec, house: House, dataset_id: str) -> None:
    assert spec.data == house.datasets.source(dataset_id, TENANT)
    # What the trainer needs of it lies on its machine.
    assert {Path(spec.files[digest]).is_file() for digest in (spec.data.index, *spec.data.packs)}


async def test_data_comes_from_a_dataset(make_house: MakeHouse, queue: Queue) -> None:
    house = make_house(good())
    dataset = upload(house.datasets, IMAGES)
    job = queue(server_path="", dataset_id=dataset.dataset_id)
    await house.supervisor.start()
    await house.ended(job.job_id)
    assert_reads(house.launcher.trainers[0].spec, house, dataset.dataset_id)


async def test_data_comes_from_an_archive_that_becomes_a_dataset(
    make_house: MakeHouse, queue: Queue, tmp_path: Path
) -> None:
    house = make_house(good())
    (tmp_path / "pets.tgz").write_bytes(tar_gz_of(FILES))
    job = queue(server_path=str(tmp_path / "pets.tgz"))
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED
    (dataset,), _ = house.datasets.list(0, "", TENANT)
    assert_reads(house.launcher.trainers[0].spec, house, dataset.dataset_id)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc", Reason.PATH_NOT_ALLOWED),
        ("{}/nothing", Reason.PATH_NOT_FOUND),
        ("{}/bad.zip", Reason.ARCHIVE_UNREADABLE),
    ],
)
async def test_data_that_cannot_be_had_fails_the_job_without_a_trainer(
    make_house: MakeHouse, queue: Queue, tmp_path: Path, path: str, reason: Reason
) -> None:
    house = make_house(good())
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    job = queue(server_path=path.format(tmp_path))
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, reason)
    assert house.launcher.trainers == []


async def test_a_crash_is_tried_again(make_house: MakeHouse, queue: Queue, folder: str) -> None:
    house = make_house(Script([Progressed("training", 0.2)], exit_code=1), good())
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 2, 1)
    again = [
        e.payload
        for e in house.jobs.events(job.job_id, TENANT, 0)
        if isinstance(e.payload, StateChanged) and e.payload.reason
    ]
    assert [(a.state, a.reason) for a in again] == [(JobState.QUEUED, Reason.TRAINER_CRASHED)]


@pytest.mark.parametrize(
    ("script", "reason", "said"),
    [
        (Script(exit_code=1), Reason.TRAINER_CRASHED, "ended with code 1"),
        (Script(exit_code=3), Reason.TRAINER_CRASHED, "ended with code 3"),
        (Script(exit_code=0), Reason.TRAINER_CRASHED, "ended with code 0"),
        (Script(exit_code=4), Reason.TRAINER_CRASHED, "told to by somebody else"),
        (Script(exit_code=-11), Reason.TRAINER_CRASHED, "SIGSEGV"),
        (Script(exit_code=-9), Reason.OUT_OF_MEMORY, "memory"),
        (Script(fails_to_start=True), Reason.TRAINER_CRASHED, "could not be started"),
    ],
    ids=["code 1", "code 3", "code 0", "code 4", "segfault", "killed", "no start"],
)
async def test_a_job_that_crashes_three_times_fails_with_what_happened(
    make_house: MakeHouse, queue: Queue, folder: str, script: Script, reason: Reason, said: str
) -> None:
    house = make_house(script)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, reason)
    assert said in record.error_message
    assert (record.attempts, record.crashes) == (3, 3)


async def test_a_job_whose_trainer_the_kernel_killed_for_memory_says_so_for_certain(
    make_house: MakeHouse, queue: Queue, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each attempt asks before its trainer starts and after its end; the second one somebody killed.
    counts = iter([4, 5, 5, 5])
    monkeypatch.setattr(cgroups, "kill_count", lambda: next(counts))
    house = make_house(Script(exit_code=-9), max_crashes=2)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    [again] = [
        e.payload
        for e in house.jobs.events(job.job_id, TENANT, 0)
        if isinstance(e.payload, StateChanged)
        and e.payload.state == JobState.QUEUED
        and e.payload.reason
    ]
    assert again.reason == record.error_reason == Reason.OUT_OF_MEMORY
    assert again.message.startswith("the system killed the trainer because memory ran out: use a")
    assert "smaller backbone or batch_size" in again.message
    assert "unless somebody killed it" in record.error_message
    assert record.attempts == 2


async def test_the_last_words_of_a_crash_are_logged_and_not_told_to_callers(
    make_house: MakeHouse, queue: Queue, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    house = make_house(Script(exit_code=1, words=["Traceback: secret"]))
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert "secret" in caplog.text
    assert "secret" not in record.error_message
    assert job.job_id in record.error_message


async def test_a_trainer_that_says_nothing_is_stopped(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, good(), heartbeat_timeout_s=0.05)
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.crashes) == (JobState.SUCCEEDED, 1)
    assert house.launcher.trainers[0].stopped.is_set()


async def test_a_job_that_takes_too_long_is_stopped_and_not_tried_again(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    clock = LoopClock()
    house = make_house(HANGS, max_job_s=1000, heartbeat_timeout_s=5000)
    job = queue(server_path=folder)
    await house.supervisor.start()
    await house.trainer()
    clock.skip(1000)
    record = await house.ended(job.job_id)
    assert (record.error_reason, record.attempts) == (Reason.TIME_BUDGET_EXCEEDED, 1)
    assert house.launcher.trainers[0].stopped.is_set()


async def test_a_running_job_that_is_cancelled_stops_its_trainer(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, good())
    job, other = queue(server_path=folder), queue(server_path=folder)
    await house.supervisor.start()
    trainer = await house.trainer()
    await asyncio.to_thread(house.jobs.request_cancel, job.job_id, TENANT)
    assert (await house.ended(job.job_id)).state is JobState.CANCELLED
    assert trainer.stopped.is_set()
    assert (await house.ended(other.job_id)).state is JobState.SUCCEEDED
    await house.supervisor.close(GUARD_S)
    assert house.metric("graft_jobs_ended_total", state="CANCELLED") == 1


async def test_a_cancel_that_comes_while_publishing_comes_too_late(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    warming, go_on = asyncio.Event(), asyncio.Event()

    async def warm(_model: str, _: StoredVersion) -> None:
        warming.set()
        await go_on.wait()

    house = make_house(good(), on_published=warm)
    job = queue(server_path=folder)
    await house.supervisor.start()
    await asyncio.wait_for(warming.wait(), GUARD_S)
    await asyncio.to_thread(house.jobs.request_cancel, job.job_id, TENANT)
    house.supervisor.wake()
    await asyncio.to_thread(house.claims.to_cancel, job.owner)
    go_on.set()
    record = await house.ended(job.job_id)
    assert (record.state, record.version, record.cancel_requested) == (
        JobState.SUCCEEDED, 1, False,
    )  # fmt: skip


async def test_a_candidate_is_not_warmed(make_house: MakeHouse, queue: Queue, folder: str) -> None:
    def fails_its_gate(spec: JobSpec) -> None:
        checks = [
            GateCheck(
                name="accuracy", verdict="failed", passed=False, value=0.5, bound=0.9, detail="low"
            )
        ]
        write_result(Path(spec.out_dir), spec.job_id, spec.model, gate_checks=checks)

    house = make_house(Script(records=[FINISHED], before_last=fails_its_gate))
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED
    await house.supervisor.close(GUARD_S)
    made = {"outcome": "candidate", "calibrated": "yes", "gate": "failed"}
    assert house.metric("graft_versions_published_total", **made) == 1
    assert house.warmed == []


async def test_a_version_that_cannot_be_warmed_is_published_all_the_same(
    make_house: MakeHouse, queue: Queue, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def warm(_model: str, _: StoredVersion) -> None:
        raise RuntimeError("no memory")

    house = make_house(good(), on_published=warm)
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).state is JobState.SUCCEEDED
    assert "could not be warmed" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda spec: None, "manifest.json is missing"),
        (
            lambda spec: write_result(
                Path(spec.out_dir), spec.job_id, spec.model, backbone_digest="0" * 64
            ),
            "the manifest says",
        ),
    ],
    ids=["nothing", "other backbone"],
)
async def test_a_result_that_is_not_whole_is_not_published(
    make_house: MakeHouse, queue: Queue, folder: str, spoil: Callable[[JobSpec], None], said: str
) -> None:
    house = make_house(Script([FINISHED], before_last=spoil))
    job = queue(server_path=folder)
    await house.supervisor.start()
    record = await house.ended(job.job_id)
    assert (record.state, record.error_reason) == (JobState.FAILED, Reason.TRAINING_FAILED)
    assert said in record.error_message
    assert house.models.list_models(0, "", TENANT) == ([], "")
    assert house.warmed == []
