import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from service import prepared
from service.backbones import DEFAULT_BACKBONE, find
from service.contract import Exported, ExportedBackbone, ExportSpec, Failed, Heartbeat
from service.errors import Reason
from service.jobs.default_export import DefaultExport
from service.jobs.settings import Settings
from service.storage.models import ModelStore
from tests.fake_launcher import FakeLauncher, Script
from tests.unit.jobs.conftest import request
from tests.unit.jobs.house import GUARD_S
from tests.unit.storage.conftest import TENANT, digest

ROW = find(DEFAULT_BACKBONE)
assert ROW is not None
NAME = ROW.weights_name("")
EXPORTED = [
    ExportedBackbone(NAME, digest(b"graph"), reference=digest(b"reference of it")),
    ExportedBackbone(f"{NAME}:int8", digest(b"int8")),
]


def writes(spec: ExportSpec) -> None:
    for content in (b"graph", b"int8"):
        (Path(spec.out_dir) / f"{digest(content)}.onnx").write_bytes(content)
    (Path(spec.out_dir) / "reference.safetensors").write_bytes(b"reference of it")


GOOD = Script(records=[Heartbeat(), Exported(EXPORTED)], before_last=writes)
HANGS = Script(records=[Heartbeat()], hangs=True)

Make = Callable[..., tuple[DefaultExport, FakeLauncher]]


@pytest.fixture
async def make(models: ModelStore, tmp_path: Path) -> AsyncIterator[Make]:
    made: list[DefaultExport] = []

    def make(script: Script, **changes: object) -> tuple[DefaultExport, FakeLauncher]:
        settings = Settings(
            work_dir=tmp_path / "work" / "jobs",
            weights_dir=tmp_path / "weights",
            allowed_dirs_of=lambda _: (),
            default_backbone=DEFAULT_BACKBONE,
            prepared=tmp_path / "prepared",
            cpu_jobs=1,
            gpu_jobs=0,
            max_job_s=1000,
            stop_grace_s=1,
        )
        launcher = FakeLauncher(script)
        made.append(
            DefaultExport(models, launcher, dataclasses.replace(settings, **changes))  # type: ignore[arg-type]
        )
        return made[-1], launcher

    yield make
    for each in made:
        await each.close()


async def over(export: DefaultExport) -> None:
    export.start()
    async with asyncio.timeout(GUARD_S):
        await export.wait(request(backbone=""))


async def test_what_was_exported_is_known_to_all_jobs_and_not_exported_again(
    make: Make, models: ModelStore, tmp_path: Path
) -> None:
    export, launcher = make(GOOD)
    await over(export)
    assert models.exported_backbones(DEFAULT_BACKBONE, TENANT) == EXPORTED
    (trainer,) = launcher.trainers
    assert trainer.stopped.is_set()
    assert not (tmp_path / "work" / "export").exists()
    export, launcher = make(GOOD)
    await over(export)
    assert launcher.trainers == []


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a virtual environment."""
    monkeypatch.setattr(prepared, "is_own_environment", lambda: True)


@pytest.mark.usefixtures("own")
async def test_what_the_environment_keeps_serves_other_data_folders_without_a_trainer(
    make: Make, models: ModelStore, tmp_path: Path
) -> None:
    keeper = make(GOOD)[0]
    await over(keeper)
    with models._database.transaction() as connection:
        connection.execute("DELETE FROM exported_backbones")
    export, launcher = make(HANGS)
    await over(export)
    assert launcher.trainers == []
    assert models.exported_backbones(DEFAULT_BACKBONE, TENANT) == EXPORTED


@pytest.mark.usefixtures("own")
async def test_what_the_environment_keeps_damaged_is_exported_anew(
    make: Make, models: ModelStore, tmp_path: Path
) -> None:
    writes(ExportSpec(backbone="", out_dir=str(tmp_path), weights_dir=""))
    prepared.keep(tmp_path / "prepared", DEFAULT_BACKBONE, Exported(EXPORTED), tmp_path)
    kept = prepared.find(tmp_path / "prepared", DEFAULT_BACKBONE)
    assert kept is not None
    damaged = kept[1] / f"{digest(b'int8')}.onnx"
    damaged.write_bytes(b"rotten")
    export, launcher = make(GOOD)
    await over(export)
    assert len(launcher.trainers) == 1
    assert models.exported_backbones(DEFAULT_BACKBONE, TENANT) == EXPORTED
    assert damaged.read_bytes() == b"int8"


@pytest.mark.usefixtures("own")
async def test_the_environment_keeps_nothing_of_a_precision_that_was_set(
    make: Make, tmp_path: Path
) -> None:
    await over(make(GOOD, precision="fp32")[0])
    assert prepared.find(tmp_path / "prepared", DEFAULT_BACKBONE) is None


async def test_nothing_is_exported_whose_weights_would_be_downloaded(make: Make) -> None:
    export, launcher = make(GOOD, default_backbone="resnet18")
    export.start()
    async with asyncio.timeout(GUARD_S):
        await export.wait(request(backbone="resnet18"))
    assert launcher.trainers == []


@pytest.mark.parametrize(
    "script",
    [
        Script(records=[Failed(Reason.PARITY_FAILED, "it differs")]),
        Script(exit_code=1, words=["torch is broken"]),
        Script(fails_to_start=True),
        Script(records=[Exported(EXPORTED)]),
    ],
    ids=["fails", "crashes", "does not start", "writes no file"],
)
async def test_an_export_that_fails_is_left_to_the_first_job(
    script: Script, make: Make, models: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    export, _ = make(script)
    await over(export)
    assert models.exported_backbones(DEFAULT_BACKBONE, TENANT) == []
    assert "its first job does it" in caplog.text


async def test_jobs_that_need_it_wait_for_one_that_is_under_way(make: Make) -> None:
    export, launcher = make(HANGS)
    export.start()
    async with asyncio.timeout(GUARD_S):
        trainer = await launcher.started.get()
        await trainer.said_all.wait()
        for other in ({"backbone": "resnet18"}, {"weights": "random"}):
            await export.wait(request(**other))
        waiting = asyncio.create_task(export.wait(request(backbone="")))
        await asyncio.sleep(0)
        assert not waiting.done()
        await export.close()
        await waiting
    assert trainer.stopped.is_set()
