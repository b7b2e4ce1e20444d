"""What a trainer is told beyond the request, and what of a job's folder outlives an attempt."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from service.contract import (
    BASELINES,
    DomainAdaptation,
    Gate,
    ImageSource,
    Incumbent,
    JobSpec,
    PretrainedBackbone,
    Progressed,
)
from service.domain import Base, GateCheck, JobState, ModelKey, VersionSource
from service.errors import Reason, WrongState
from service.ingest import index as indexes
from service.ingest.reader import INDEX_FILE
from service.jobs.records import Published
from service.storage.database import Database
from service.storage.version_rows import NewVersion
from tests.fake_launcher import Script
from tests.figures import figure
from tests.keys import BIRDS, key
from tests.unit.ingest.packing import FILES, tar_gz_of, zip_of
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import FINISHED, HANGS, MakeHouse, class_folders, good
from tests.unit.storage.conftest import TENANT, write_result
from tests.unit.storage.test_datasets import IMAGES, upload

MISSED = GateCheck(
    name="accuracy", verdict="failed", passed=False, value=0.5, bound=0.9,
    detail="accuracy 0.5 is below 0.9",
)  # fmt: skip


def misses(spec: JobSpec) -> None:
    write_result(Path(spec.out_dir), spec.job_id, spec.model, gate_checks=[MISSED])


def cannot_tell(spec: JobSpec) -> None:
    check = msgspec.structs.replace(MISSED, verdict="undecided", passed=True, value=None)
    write_result(Path(spec.out_dir), spec.job_id, spec.model, gate_checks=[check], calibrated=False)


def leaves_a_checkpoint(spec: JobSpec) -> None:
    Path(spec.checkpoint_dir, "epoch-1").write_bytes(b"weights")
    Path(spec.out_dir, "half").write_bytes(b"")


CRASH = Script([Progressed("training", 0.2)], exit_code=1, before_last=leaves_a_checkpoint)


async def test_a_version_that_missed_its_gate_is_a_candidate_and_its_job_succeeds(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    missed = Script(records=[FINISHED], before_last=misses)
    promoted = Script(records=[FINISHED], before_last=cannot_tell)
    house = make_house(good(), missed, promoted)
    gate = Gate(min_accuracy=0.9, alias="prod")
    jobs = [queue(server_path=folder, gate=gate) for _ in range(3)]
    await house.supervisor.start()
    assert (await house.ended(jobs[1].job_id)).version == 2
    assert house.models.get_model(BIRDS).aliases["prod"] != 2
    assert house.models.get_version(BIRDS, 2, None).is_candidate
    published = [
        e.payload
        for e in house.jobs.events(jobs[1].job_id, TENANT, 0)
        if isinstance(e.payload, Published)
    ]
    assert published == [
        Published("birds", 2, figure(0.5, 2), [MISSED.detail], calibrated=True, gate="failed")
    ]
    assert published[0].is_candidate
    assert (await house.ended(jobs[2].job_id)).state is JobState.SUCCEEDED
    assert house.models.get_model(BIRDS).aliases == {"latest": 3, "prod": 3}
    await house.supervisor.close(5)
    for outcome, calibrated, gate in (
        ("published", "yes", "none"), ("candidate", "yes", "failed"),
        ("published", "no", "undecided"),
    ):  # fmt: skip
        made = {"outcome": outcome, "calibrated": calibrated, "gate": gate}
        assert house.metric("graft_versions_published_total", **made) == 1


async def test_a_version_whose_alias_moved_while_it_was_made_says_so_and_is_a_candidate(
    make_house: MakeHouse, queue: Queue, folder: str, database: Database, tmp_path: Path
) -> None:
    check = GateCheck(
        name="not_worse", verdict="passed", passed=True, value=0.0, bound=-0.03, detail="0 lost"
    )

    def late(spec: JobSpec) -> None:
        assert spec.incumbent is None
        write_result(Path(spec.out_dir), spec.job_id, spec.model, gate_checks=[check])
        other = house.models.put_result(write_result(tmp_path / "other", "job-other"))
        with database.transaction() as connection:
            house.models.publish(
                connection, NewVersion(model=BIRDS, job_id="job-other", stored=other)
            )

    house = make_house(Script(records=[FINISHED], before_last=late))
    job = queue(server_path=folder, gate=Gate(not_worse_than="latest"))
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).version == 2
    (published,) = (
        e.payload
        for e in house.jobs.events(job.job_id, TENANT, 0)
        if isinstance(e.payload, Published)
    )
    assert published.is_candidate
    assert "moved to version 1" in published.gate_failures[0]
    assert house.models.get_model(BIRDS).aliases == {"latest": 1}


async def test_the_trainer_is_told_of_the_gate_and_of_the_version_to_compare_with(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(good())
    gate = Gate(not_worse_than="latest", max_latency_ms=5.0)
    jobs = [queue(server_path=folder, gate=gate, baselines=list(BASELINES)) for _ in range(2)]
    other = queue(server_path=folder, gate=Gate(min_accuracy=0.1))
    await house.supervisor.start()
    for job in (*jobs, other):
        await house.ended(job.job_id)
    first, second, third = (trainer.spec for trainer in house.launcher.trainers)
    assert (first.gate, first.incumbent) == (gate, None)
    found = house.models.get_version(BIRDS, 1, None)
    assert second.incumbent == Incumbent(
        version=1,
        backbone_digest=found.backbone_digest,
        head_digest=found.head_digest,
        answers_digest=found.answers_digest,
    )
    assert second.baselines == list(BASELINES)
    assert third.incumbent is None


async def test_the_trainer_gets_the_answers_of_the_version_before_which_is_no_candidate(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    missed = Script(records=[FINISHED], before_last=misses)
    promoted = Script(records=[FINISHED], before_last=cannot_tell)
    house = make_house(good(), missed, promoted)
    jobs = [queue(server_path=folder) for _ in range(3)]
    await house.supervisor.start()
    for job in jobs:
        await house.ended(job.job_id)
    bases = (Base("birds", 3), Base("birds", 1), Base("bears", 9))
    grown = [queue(key("bears"), server_path=folder, base=base) for base in bases]
    for job in grown:
        await house.ended(job.job_id)

    def answers(version: int, model: ModelKey = BIRDS) -> str:
        return house.models.get_version(model, version, None).answers_digest

    told = [trainer.spec.previous_answers for trainer in house.launcher.trainers]
    # Version 2 is a candidate; of another model the base counts, of its own the newest.
    assert told[:3] == ["", answers(1), answers(1)]
    assert told[3:] == [answers(3), answers(1), answers(2, key("bears"))]


async def test_backbone_auto_is_left_to_the_trainer_among_those_available(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "resnet18-f37072fd.pth").write_bytes(b"")
    (weights / "resnet101.part").write_bytes(b"")
    house = make_house(good())
    jobs = [queue(server_path=folder), queue(server_path=folder, backbone="auto")]
    await house.supervisor.start()
    for job in jobs:
        await house.ended(job.job_id)
    plain, auto = (trainer.spec for trainer in house.launcher.trainers)
    assert plain.backbones == []
    assert (auto.backbone, auto.exported) == ("auto", [])
    known = house.models.exported_backbones("efficientnet_lite0", TENANT)
    assert len(known) == 1
    assert sorted(auto.backbones, key=lambda c: c.backbone) == [
        PretrainedBackbone(backbone="efficientnet_lite0", exported=known),
        PretrainedBackbone(backbone="efficientnet_lite1"),
        PretrainedBackbone(backbone="efficientnet_lite2"),
        PretrainedBackbone(backbone="resnet18"),
    ]


async def test_features_are_kept_where_the_operator_lets_them(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path
) -> None:
    house = make_house(good(), feature_cache=tmp_path / "f.sqlite", feature_cache_bytes=7)
    job = queue(server_path=folder)
    await house.supervisor.start()
    await house.ended(job.job_id)
    spec = house.launcher.trainers[0].spec
    assert (spec.feature_cache, spec.feature_cache_bytes) == (str(tmp_path / "f.sqlite"), 7)


async def test_a_second_attempt_finds_the_checkpoint_of_the_first_and_nothing_else(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    seen: list[list[str]] = []

    def look(spec: JobSpec) -> None:
        work = Path(spec.checkpoint_dir).parent
        seen.append(sorted(str(p.relative_to(work)) for p in work.rglob("*")))
        write_result(Path(spec.out_dir), spec.job_id, spec.model)

    house = make_house(CRASH, Script([FINISHED], before_last=look))
    job = queue(server_path=folder)
    await house.supervisor.start()
    assert (await house.ended(job.job_id)).attempts == 2
    read = ["data", "data/index.jsonl"]
    assert seen == [["checkpoint", "checkpoint/epoch-1", *read, "out"]]
    await house.supervisor.close(5)
    assert list(house.settings.work_dir.iterdir()) == []


async def test_a_checkpoint_outlives_the_service_and_what_belongs_to_no_job_is_swept(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    hangs = Script([Progressed("a", 0.1), Progressed("b", 0.1)], hangs=True,
                   before_last=leaves_a_checkpoint)  # fmt: skip
    first = make_house(hangs)
    job = queue(server_path=folder)
    await first.supervisor.start()
    await first.trainer()
    await first.supervisor.close(5)
    work = first.settings.work_dir
    assert sorted(str(p.relative_to(work)) for p in work.rglob("*")) == [
        job.job_id, f"{job.job_id}/checkpoint", f"{job.job_id}/checkpoint/epoch-1",
    ]  # fmt: skip
    (work / "job-of-nobody" / "checkpoint").mkdir(parents=True)
    second = make_house(HANGS)
    await second.supervisor.start()
    trainer = await second.trainer()
    second.supervisor.sweep()
    assert trainer.spec.checkpoint_dir == str(work / job.job_id / "checkpoint")
    assert (work / job.job_id / "checkpoint" / "epoch-1").read_bytes() == b"weights"
    assert [path.name for path in work.iterdir()] == [job.job_id]


async def test_a_job_that_is_cancelled_in_the_queue_leaves_no_checkpoint(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS)
    running = queue(server_path=folder)
    waiting = queue(server_path=folder)
    left = house.settings.work_dir / waiting.job_id / "checkpoint"
    left.mkdir(parents=True)
    await house.supervisor.start()
    await house.trainer()
    assert left.exists()
    await asyncio.to_thread(house.jobs.request_cancel, waiting.job_id, TENANT)
    await house.supervisor.close(5)
    house.supervisor.sweep()
    assert [path.name for path in house.settings.work_dir.iterdir()] == [running.job_id]


async def test_a_grown_job_is_told_of_all_that_its_base_was_trained_on(
    make_house: MakeHouse, queue: Queue, tmp_path: Path
) -> None:
    house = make_house(good())
    oldest = str(class_folders(tmp_path / "oldest"))
    (tmp_path / "pets.tgz").write_bytes(tar_gz_of(FILES))
    await house.supervisor.start()
    await house.ended(queue(server_path=oldest).job_id)
    base = {"base": Base("birds", 1), "base_sources": house.models.sources(BIRDS, 1)}
    await house.ended(queue(server_path=str(tmp_path / "pets.tgz"), **base).job_id)
    newest = str(class_folders(tmp_path / "newest"))
    sources = house.models.sources(BIRDS, 2)
    three = queue(
        server_path=newest, base=Base("birds", 2), base_sources=sources, base_digest="b" * 64
    )
    assert (await house.ended(three.job_id)).state is JobState.SUCCEEDED
    spec = house.launcher.trainers[2].spec
    (dataset,), _ = house.datasets.list(0, "", TENANT)
    unpacked = dataset.dataset_id
    assert sources == [VersionSource("source", "", oldest), VersionSource("source", unpacked)]
    work = house.settings.work_dir / three.job_id
    assert spec.base == Base("birds", 2)
    assert spec.data == ImageSource(folder=newest, index_file=str(work / "data" / INDEX_FILE))
    assert spec.base_digest == "b" * 64
    oldest_index = str(work / "base-0" / INDEX_FILE)
    assert spec.base_data == [
        ImageSource(folder=oldest, index_file=oldest_index, name="oldest"),
        house.datasets.source(unpacked, TENANT),
    ]


async def test_a_job_whose_bases_images_went_while_it_waited_fails_and_says_so(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path
) -> None:
    house = make_house(good())
    one = queue(server_path=str(class_folders(tmp_path / "gone")))
    await house.supervisor.start()
    await house.ended(one.job_id)
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    two = await asyncio.to_thread(
        queue,
        server_path=folder,
        base=Base("birds", 1),
        base_sources=house.models.sources(BIRDS, 1),
    )
    record = await house.ended(two.job_id)
    assert record.error_reason is Reason.BASE_DATA_GONE
    assert "version 1 of birds" in record.error_message


@pytest.mark.parametrize("kind", ["folder", "archive", "dataset", "labelled dataset"])
async def test_the_target_lies_where_the_trainer_finds_it(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path, kind: str
) -> None:
    house = make_house(HANGS)
    asked: dict[str, str] = {}
    if kind == "folder":
        asked["target_path"] = str(tmp_path / "target")
        (tmp_path / "target" / "deep").mkdir(parents=True)
        (tmp_path / "target" / "deep" / "a.png").write_bytes(b"PIC1")
    elif kind == "archive":
        asked["target_path"] = str(tmp_path / "target.zip")
        (tmp_path / "target.zip").write_bytes(zip_of({"deep/er/a.png": b"PIC1"}))
    elif kind == "dataset":
        sending = house.datasets.begin_upload("", "", tenant=TENANT, is_unlabelled=True)
        sending.add_image("", b"PIC", "", "")
        asked["target_dataset_id"] = sending.finish().dataset_id
    else:
        asked["target_dataset_id"] = upload(house.datasets, IMAGES).dataset_id
    queue(server_path=folder, method=DomainAdaptation(evaluate_on_target=True), **asked)
    await house.supervisor.start()
    spec = (await house.trainer()).spec
    if kind == "folder":
        assert spec.target.folder == asked["target_path"]
        (image,) = indexes.load(Path(spec.target.index_file)).images
        assert (image.name, image.label) == ("deep/a.png", "deep")
        return
    (dataset,), _ = house.datasets.list(0, "", TENANT)
    assert spec.target == house.datasets.source(dataset.dataset_id, TENANT)
    assert {spec.target.index, *spec.target.packs} <= spec.files.keys()
    assert dataset.is_unlabelled is (kind != "labelled dataset")
    with pytest.raises(WrongState, match="is used by"):
        house.datasets.delete(dataset.dataset_id, TENANT)
