"""Rankings of backbones as jobs: their specs, their results, a slot of their own."""

import asyncio
from pathlib import Path

import pytest

from service.contract import (
    BackbonesRanked,
    Failed,
    ImageSource,
    PretrainedBackbone,
    Progressed,
    RankedBackbone,
    RankSpec,
)
from service.domain import JobState
from service.errors import Reason
from service.ingest.reader import INDEX_FILE
from tests.fake_launcher import Script
from tests.unit.jobs.conftest import Queue, to_rank
from tests.unit.jobs.house import FINISHED, GUARD_S, HANGS, House, MakeHouse
from tests.unit.storage.conftest import TENANT

RANKED = BackbonesRanked([RankedBackbone(backbone="resnet18", weights="W")], "the only one", 7)
RANKS = Script([Progressed("features", 0.5), RANKED])


def rank(house: House, folder: str, **asked: object) -> str:
    return house.jobs.create(to_rank(server_path=folder, **asked), "", b"")[0].job_id


async def test_a_ranking_ends_with_its_result(
    make_house: MakeHouse, folder: str, tmp_path: Path
) -> None:
    # What is not a result of a ranking is none.
    house = make_house(Script([FINISHED, RANKED]), trainer_threads=3, heartbeat_timeout_s=6)
    named = [PretrainedBackbone(backbone="resnet18", weights="random")]
    job_id = rank(house, folder, backbones=named, time_budget_s=5.0, seed=4)
    await house.supervisor.start()
    record = await house.ended(job_id)
    assert (record.state, record.version, record.ranking) == (JobState.SUCCEEDED, 0, RANKED)
    own = house.settings.work_dir / job_id
    assert house.launcher.trainers[0].spec == RankSpec(
        data=ImageSource(folder=folder, index_file=str(own / "data" / INDEX_FILE)), backbones=named,
        work_dir=str(own), weights_dir=str(tmp_path / "weights"), time_budget_s=5.0, seed=4,
        threads=3, precision="auto", heartbeat_s=1,
    )  # fmt: skip
    await house.supervisor.close(GUARD_S)
    assert house.metric("graft_job_duration_seconds_count", method="ranking") == 1


async def test_a_ranking_without_names_takes_what_is_available(
    make_house: MakeHouse, folder: str, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "resnet18-f37072fd.pth").write_bytes(b"")
    house = make_house(RANKS)
    job_id = rank(house, folder)
    await house.supervisor.start()
    await house.ended(job_id)
    spec = house.launcher.trainers[0].spec
    assert (spec.only_available, spec.time_budget_s) == (True, 60)
    assert "resnet18" in [each.backbone for each in spec.backbones]


async def test_a_ranking_does_not_wait_behind_a_training(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, RANKS)
    training = queue(server_path=folder)
    await house.supervisor.start()
    await house.trainer()
    job_id = await asyncio.to_thread(rank, house, folder)
    assert (await house.ended(job_id)).state is JobState.SUCCEEDED
    assert house.jobs.get(training.job_id, TENANT).state is JobState.RUNNING


async def test_a_ranking_is_tried_again_after_a_crash_and_not_after_a_failure(
    make_house: MakeHouse, folder: str
) -> None:
    failed = Script([Failed(Reason.DATASET_UNUSABLE, "one class only")], exit_code=3)
    house = make_house(Script(exit_code=-9), RANKS, failed)
    first, second = rank(house, folder), rank(house, folder)
    await house.supervisor.start()
    record = await house.ended(first)
    assert (record.state, record.attempts, record.crashes) == (JobState.SUCCEEDED, 2, 1)
    record = await house.ended(second)
    assert (record.error_reason, record.attempts) == (Reason.DATASET_UNUSABLE, 1)


async def test_a_ranking_that_is_cancelled_stops_its_trainer(
    make_house: MakeHouse, folder: str
) -> None:
    house = make_house(HANGS)
    job_id = rank(house, folder)
    await house.supervisor.start()
    trainer = await house.trainer()
    await asyncio.to_thread(house.jobs.request_cancel, job_id, TENANT)
    assert (await house.ended(job_id)).state is JobState.CANCELLED
    assert trainer.stopped.is_set()


@pytest.mark.parametrize("ranking_jobs", [0, 2])
async def test_so_many_rankings_run_at_once(
    make_house: MakeHouse, queue: Queue, folder: str, ranking_jobs: int
) -> None:
    house = make_house(HANGS, ranking_jobs=ranking_jobs, cpu_jobs=1)
    for _ in range(3):
        rank(house, folder)
    queue(server_path=folder)
    await house.supervisor.start()
    for _ in range(ranking_jobs + 1):
        await house.trainer()
    assert house.jobs.counts_by_state()["RUNNING"] == ranking_jobs + 1
