"""The bench of a GPU ends with a clear message without one; its parts are tried on the CPU."""

import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import gpu
from service.engine import providers, timing
from service.engine.providers import ProviderUnavailable
from tests.trainer.small_network import small_backbone
from trainer import export


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    export.to_onnx(small_backbone(), tmp_path / "backbone.onnx")
    return (tmp_path / "backbone.onnx").read_bytes()


@pytest.mark.parametrize(
    ("gpus", "problem", "is_usable", "said"),
    [
        (0, "", False, "shows no NVIDIA GPU"),
        (1, "the driver is too old", False, "the driver is too old"),
        (1, "", False, "PyTorch .* finds no GPU"),
    ],
)
def test_without_a_gpu_that_can_be_used_it_says_why_and_measures_nothing(
    gpus: int,
    problem: str,
    is_usable: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def choose(_setting: str) -> None:
        if problem:
            raise ProviderUnavailable(problem)

    monkeypatch.setattr(providers, "_cuda_device_count", lambda: gpus)
    monkeypatch.setattr(gpu, "choose_provider", choose)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_usable)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(said, err)


def test_the_network_and_its_files_give_the_cpus_answers(model: bytes) -> None:
    network = small_backbone()
    pixels = timing.images(40, network.size)
    checks = gpu.correctness(model, network, pixels, "cpu")
    assert [check.is_right for check in checks] == [True, True, None]
    assert "of 40 answers agree" in checks[2].found
    # Another network than the file's is found out.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    assert [c.is_right for c in gpu.correctness(model, network, pixels, "cpu")][1] is False


def test_what_is_no_number_is_never_right() -> None:
    features = np.ones((2, 3), np.float32)
    assert gpu.differences("", features, features, 0.0).is_right
    assert gpu.differences("", features * math.nan, features, 1.0).is_right is False


def test_a_process_that_is_shown_none_sees_none_and_one_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu.sees("", "", [], 0).is_right
    monkeypatch.setattr(gpu, "_SEES", "raise SystemExit('no driver')")
    failed = gpu.sees("", "", ["0"], 0)
    assert failed.is_right is False
    assert failed.found == "ended with 1: no driver"


@pytest.mark.parametrize("threads", [1, 3])
def test_rates_are_of_runs_that_gave_features(model: bytes, threads: int) -> None:
    size = small_backbone().size
    assert gpu.rate(gpu.bare_runs(model, "cpu", 2, size), 0.01) > 0
    assert gpu.rate(gpu.our_runs(gpu.graph(model, "cpu"), 2, size), 0.01, threads) > 0


def test_the_table_has_the_ratio_of_each_round() -> None:
    rates: gpu.Rates = defaultdict(list)
    rates["training"] += [50.0, 80.0, 90.0]
    rates["bare training steps"] += [100.0, 100.0, 100.0]
    lines = gpu.table(rates)
    assert "| training | 80.0 (50.0 to 90.0) | 0.80 (0.50 to 0.90) |" in lines
    assert lines[-1].endswith("|  |")
