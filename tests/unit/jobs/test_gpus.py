"""Each trainer sees one GPU, or none: that of its slot."""

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from msgspec.structs import replace

from service.contract import JobSpec, Note, Order, encode
from service.domain import PrecisionSetting
from service.engine import providers
from service.engine.providers import choose_provider, visible_gpus
from service.jobs.launchers import Gpus, ProcessLauncher, WarmLauncher
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import HANGS, MakeHouse
from tests.unit.jobs.test_launcher import spec
from tests.unit.storage.conftest import TENANT

SAY = """
import json, os, sys
asked = sys.stdin.readline() if sys.argv[1:] == ["wait"] else ""
seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
gpu = json.loads(asked)["gpu"] if asked else ""
print(json.dumps({"type": "note", "level": "info", "text": f"{seen}|{gpu}"}), flush=True)
"""


async def seen_by(launcher: ProcessLauncher | WarmLauncher, job: JobSpec, folder: Path) -> str:
    trainer = await launcher.start(job, folder)
    note = await trainer.next_record()
    await trainer.stop(1)
    assert isinstance(note, Note)
    return note.text


async def test_jobs_get_a_gpu_each_and_those_on_the_cpu_get_none(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, gpus=("0", "1", "2"), cpu_jobs=1, gpu_jobs=3)
    for device in ("cpu", "auto", "cuda", "auto"):
        queue(server_path=folder, device=device)
    await house.supervisor.start()
    specs = [(await house.trainer()).spec for _ in range(4)]
    assert [(s.device, s.gpu) for s in specs if s.device == "cpu"] == [("cpu", "")]
    assert sorted(s.gpu for s in specs) == ["", "0", "1", "2"]


async def test_a_gpu_is_lent_again_when_its_job_has_ended(
    make_house: MakeHouse, queue: Queue, folder: str
) -> None:
    house = make_house(HANGS, gpus=("0", "1"), gpu_jobs=1)
    jobs = [queue(server_path=folder, device="cuda") for _ in range(2)]
    await house.supervisor.start()
    assert (await house.trainer()).spec.gpu == "1"
    await asyncio.to_thread(house.jobs.request_cancel, jobs[0].job_id, TENANT)
    assert (await house.trainer()).spec.gpu == "1"


def test_the_first_gpu_on_which_the_service_computes_is_lent_last_and_one_alone_is_shared() -> None:
    gpus = Gpus(["a", "b", "c"])
    with gpus.lend() as first, gpus.lend() as second, gpus.lend() as third, gpus.lend() as fourth:
        assert [first, second, third, fourth] == ["b", "c", "a", "b"]
    with Gpus(["a"]).lend() as alone:
        assert alone == "a"
    with Gpus([]).lend() as none:
        assert none == ""


@pytest.mark.parametrize(
    ("set_to", "gpus", "expected"),
    [("auto", ("0",), "fp32"), ("auto", (), "auto"), ("int8", ("0",), "int8")],
)
async def test_a_job_on_the_cpu_beside_a_gpu_that_serves_makes_nothing_in_bf16(
    make_house: MakeHouse,
    queue: Queue,
    folder: str,
    set_to: PrecisionSetting,
    gpus: tuple[str, ...],
    expected: str,
) -> None:
    house = make_house(HANGS, gpus=gpus, precision=set_to)
    queue(server_path=folder, device="cpu")
    await house.supervisor.start()
    assert (await house.trainer()).spec.precision == expected


@pytest.mark.parametrize("gpu", ["", "1", "GPU-5f2a"])
async def test_a_trainer_sees_the_gpu_of_its_spec_alone(tmp_path: Path, gpu: str) -> None:
    job = replace(spec(tmp_path), gpu=gpu)
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "0,1,2"}
    cold = ProcessLauncher(environment, (sys.executable, "-c", SAY))
    assert await seen_by(cold, job, tmp_path) == f"{gpu}|"
    warm = WarmLauncher(environment, 1, (sys.executable, "-c", SAY, "wait"), cold)
    await warm.open()
    # While it waits it sees none; its order says which it may see then.
    assert await seen_by(warm, job, tmp_path) == f"|{gpu}"
    await warm.close()


@pytest.mark.parametrize("gpu", ["", "1"])
def test_a_trainer_that_waited_shows_cuda_the_gpu_of_its_order(tmp_path: Path, gpu: str) -> None:
    program = textwrap.dedent(
        """
        import os
        from pathlib import Path
        from trainer import __main__ as main, warm
        from trainer.records import Records
        warm.prepare = lambda: None
        def begin(_records):
            Path(os.environ["SHOWN"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
            os._exit(0)
        Records.keep_alive = begin
        raise SystemExit(main.main(["wait"]))
        """
    )
    order = Order(spec="spec.json", log=str(tmp_path / "log"), gpu=gpu)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "SHOWN": str(tmp_path / "shown")},
        cwd=Path(__file__).parents[3],
    ) as process:
        assert process.stdin is not None
        process.stdin.write(encode(order) + b"\n")
        process.stdin.flush()
        # Its end would end the trainer.
        assert process.wait(300) == 0
    assert (tmp_path / "shown").read_text() == gpu


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("0", "1")),
        ({"CUDA_VISIBLE_DEVICES": "3, GPU-5f2a"}, ("3", "GPU-5f2a")),
        ({"CUDA_VISIBLE_DEVICES": "3,2,no such,1"}, ("3", "2")),
    ],
)
def test_the_gpus_of_the_machine_are_those_that_cuda_shows(
    environment: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: 2)
    assert visible_gpus(environment) == expected


@pytest.mark.parametrize("setting", ["auto", "cuda", "tensorrt"])
def test_on_the_cpu_no_gpu_is_looked_for(
    setting: providers.ProviderSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: pytest.fail("it looks"))
    assert choose_provider(setting, on_cpu=True).name == "cpu"
