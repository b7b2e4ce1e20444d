"""A supervisor with all that it works with, and what its fake trainers say."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.contract import (
    DEFAULT_BACKBONE,
    ClassCount,
    DataFound,
    EpochEnded,
    Finished,
    JobSpec,
    Progressed,
)
from service.domain import JobState, LeftOut, LeftOutFile, LeftOutReason, ModelKey, ReadSummary
from service.jobs import watcher as watcher_module
from service.jobs.attempt import Attempts
from service.jobs.claims import Claims
from service.jobs.records import StateChanged
from service.jobs.replicas import Replicas
from service.jobs.settings import Settings
from service.jobs.store import JobRecord, JobStore
from service.jobs.supervisor import Supervisor
from service.jobs.watcher import JobWatcher
from service.ops.metrics import Metrics
from service.storage.blobs import Blobs
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.version_rows import StoredVersion
from tests.fake_launcher import FakeLauncher, FakeTrainer, Script
from tests.unit.storage.conftest import TENANT, MakeDatasets, write_result

GUARD_S = 60.0
"""Ends a test that hangs."""

EPOCH = EpochEnded(
    epoch=1, epochs=3, train_loss=0.9, train_accuracy=0.5, validation_loss=0.8,
    validation_accuracy=0.6, images_per_second=100.0, eta_s=2.0, learning_rate=0.1,
)  # fmt: skip
SUMMARY = ReadSummary(
    seen=5,
    used=4,
    left_out=[LeftOut(LeftOutReason.WRONG_FORMAT, "cat", 1)],
    files=[LeftOutFile("cat/notes.txt", "cat", LeftOutReason.WRONG_FORMAT, "no image")],
)
FOUND = DataFound([ClassCount("cat", 1, 1), ClassCount("dog", 1, 1)], SUMMARY, "d" * 64)
FINISHED = Finished(0.5, 2)


def writes(spec: JobSpec) -> None:
    write_result(Path(spec.out_dir), spec.job_id, spec.model)


def good(*records: object) -> Script:
    return Script(records=[*records, FINISHED], before_last=writes)  # type: ignore[list-item]


HANGS = Script(records=[Progressed("training", 0.1)], hangs=True)


@dataclass
class House:
    """A supervisor with all that it works with."""

    jobs: JobStore
    claims: Claims
    models: ModelStore
    datasets: DatasetStore
    watch: JobWatcher
    metrics: Metrics
    settings: Settings
    launcher: FakeLauncher
    supervisor: Supervisor
    warmed: list[StoredVersion] = field(default_factory=list)

    async def ended(self, job_id: str, tenant: str = TENANT) -> JobRecord:
        async with asyncio.timeout(GUARD_S):
            async for _ in self.watch.follow(job_id, tenant, 0):
                pass
        return self.jobs.get(job_id, tenant)

    async def happened(self, job_id: str, *states: JobState) -> None:
        """Waits until the job has been in these states, in this order."""
        left = list(states)
        async with asyncio.timeout(GUARD_S):
            async for event in self.watch.follow(job_id, TENANT, 0):
                if isinstance(event.payload, StateChanged) and event.payload.state is left[0]:
                    del left[0]
                    if not left:
                        return

    async def trainer(self) -> FakeTrainer:
        """The next trainer that is started, when it has said what it has to say."""
        trainer = await asyncio.wait_for(self.launcher.started.get(), GUARD_S)
        await asyncio.wait_for(trainer.said_all.wait(), GUARD_S)
        return trainer

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


MakeHouse = Callable[..., House]


@pytest.fixture
async def make_house(
    jobs: JobStore,
    models: ModelStore,
    make_datasets: MakeDatasets,
    blobs: Blobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[MakeHouse]:
    houses: list[House] = []
    # What is not told at once is not found out a little later, either.
    monkeypatch.setattr(watcher_module, "POLL_S", 100 * GUARD_S)

    def make(*scripts: Script, on_published: object = None, **changes: object) -> House:
        settings = Settings(
            work_dir=tmp_path / "data" / "work",
            weights_dir=tmp_path / "weights",
            allowed_dirs_of=lambda _: (tmp_path,),
            default_backbone=DEFAULT_BACKBONE,
            cpu_jobs=1,
            gpu_jobs=1,
            max_job_s=1000,
            stop_grace_s=1,
            retry_s=0.01,
            beat_s=100 * GUARD_S,
        )
        settings = dataclasses.replace(settings, **changes)  # type: ignore[arg-type]
        # One of its own, as each process has: a supervisor that stops makes it refuse jobs.
        datasets = make_datasets()
        launcher, metrics = FakeLauncher(*scripts), Metrics({"version": "test"})
        warmed: list[StoredVersion] = []

        async def warm(_model: ModelKey, stored: StoredVersion) -> None:
            assert blobs.are_there([stored.head.digest])
            assert models.list_models(0, "", TENANT)[0] == [], "announced before it was warm"
            warmed.append(stored)

        claims = Claims(jobs)
        attempts = Attempts(
            claims=claims,
            models=models,
            datasets=datasets,
            blobs=blobs,
            launcher=launcher,
            metrics=metrics,
            settings=settings,
            on_published=on_published or warm,  # type: ignore[arg-type]
        )
        supervisor = Supervisor(
            jobs=jobs,
            claims=claims,
            replicas=Replicas(jobs),
            attempts=attempts,
            datasets=datasets,
            metrics=metrics,
            settings=settings,
        )
        house = House(
            jobs, claims, models, datasets, JobWatcher(jobs), metrics, settings,
            launcher, supervisor, warmed,
        )  # fmt: skip
        houses.append(house)
        return house

    yield make
    for house in houses:
        await house.supervisor.close(GUARD_S)


def class_folders(root: Path) -> Path:
    """Files in a folder per class."""
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        (root / label / "1.png").write_bytes(f"PIC{label}".encode())
    return root


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(class_folders(tmp_path / "pets"))
