"""What `graft-server doctor` says."""

import dataclasses

import pytest

from service import doctor
from service.__main__ import main
from service.config import Config
from service.engine.provider_table import Measured, ProviderTable, Timing, machine_key
from service.ops import cpus

MEASURED = Measured(
    "fp32",
    [Timing("cpu", 1, 1, 0.01, 0.0104), Timing("openvino", 1, 4, 0.03, 0.0304)],
    {"openvino": 0.0002},
    {1: "openvino", 2: "cpu"},
    4,
    0.0076,
)


@pytest.fixture
def config(tmp_path: object) -> Config:
    return Config(data_dir=tmp_path, provider="cpu")  # type: ignore[arg-type]


def test_it_says_what_computes_and_what_was_measured(config: Config) -> None:
    lines, is_well = doctor.report(config)
    assert is_well
    assert cpus.describe().model in lines[0]
    assert lines[-1].startswith("measured    nothing yet")
    new = dataclasses.replace(config, data_dir=config.data_dir / "new")
    told = doctor.report(new)[0][-2]
    assert told.endswith("/new: not there yet: a server makes it at its start")
    ProviderTable(config.provider_table, machine_key()).put("d" * 64, MEASURED)
    assert doctor.report(config)[0][-1] == (
        "measured    dddddddddddd fp32: openvino for runs on 1 core, cpu for runs on 2 cores "
        "(an image on one core: cpu 10.4 ms, openvino 7.6 ms; answers of openvino differ by 0.0002)"
    )
    ProviderTable(config.provider_table, {"processor": "another"}).put("d" * 64, MEASURED)
    assert "another machine" in doctor.report(config)[0][-1]


def test_a_provider_that_cannot_be_had_ends_it_with_an_error(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.providers._cuda_device_count", lambda: 0)
    flags = ["--data-dir", str(config.data_dir), "--provider", "cuda"]
    assert main(["doctor", *flags]) == 1
    assert "no NVIDIA GPU was found" in capsys.readouterr().out
    assert main(["doctor", *flags[:2], "--provider", "cpu"]) == 0
