"""Measuring of providers, in this process and in one of its own."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from service.engine import providers, timing
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.provider_table import Measured, ProviderTable, Timing
from service.engine.providers import Provider, ProviderName
from service.engine.runtime import Graph
from service.engine.timing import Measurer
from service.ops.metrics import Metrics
from tests.unit.engine.conftest import GUARD_S

needs_openvino = pytest.mark.skipif(
    bool(providers.openvino_problem()), reason="OpenVINO is not installed"
)
CPU = Provider("cpu", "")
BOTH = Provider("cpu", "", ("openvino",))


@needs_openvino
def test_both_providers_are_timed_at_every_width_and_compared(
    backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BATCH_S", 1e9)
    found = timing.measure(backbone.read_bytes(), BOTH, 2, 4)
    assert found.precision == "fp32"
    assert {(each.provider, each.cores, each.batch) for each in found.timings} == {
        (name, cores, batch)
        for name in ("cpu", "openvino")
        for cores, batch in ((2, 1), (1, 1), (1, 2), (1, 4))
    }
    assert all(each.wall_s > 0 for each in found.timings)
    assert 0 <= found.differences["openvino"] < 1e-3
    assert found.providers.keys() == {1, 2}
    assert found.max_batch in (1, 2, 4)
    assert found.infer_s > 0


def test_no_batch_is_timed_beyond_one_that_no_worker_would_make(
    backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BATCH_S", 0.0)
    found = timing.measure(backbone.read_bytes(), CPU, 1, 32)
    assert [each.batch for each in found.timings] == [1]
    assert found.max_batch == 1


class Costing:
    """A graph whose run takes what it is told, by the clock and of the processor."""

    size, feature_dim = 8, 1

    def __init__(self, clocks: dict[str, float], wall_s: float, cpu_s: float) -> None:
        self._clocks, self._wall_s, self._cpu_s = clocks, wall_s, cpu_s

    def run(self, images: Pixels) -> Floats:
        self._clocks["wall"] += self._wall_s
        self._clocks["cpu"] += self._cpu_s
        return np.zeros((len(images), 1), np.float32)


def test_a_run_on_one_core_counts_by_the_processor_and_one_on_several_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = {"wall": 0.0, "cpu": 0.0}
    graphs: dict[ProviderName, Graph] = {
        "cpu": Costing(clocks, 0.010, 0.010), "openvino": Costing(clocks, 0.030, 0.007),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: clocks["wall"])
        patch.setattr(timing.time, "process_time", lambda: clocks["cpu"])
        one, two = (timing._timed(graphs, width, 1, 1) for width in (1, 2))
    assert [each.ratio for each in one] == pytest.approx([1.0, 0.7])
    assert [each.ratio for each in two] == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize(
    ("image_ms", "largest"),
    [
        pytest.param({1: 12.5, 2: 11.3, 4: 10.3}, 4, id="larger ones pay"),
        pytest.param({1: 10.0, 2: 10.2, 4: 11.0}, 2, id="one that costs hardly more"),
        pytest.param({1: 10.0, 2: 10.9, 4: 9.9}, 4, id="one that pays after one that does not"),
        pytest.param({1: 10.0, 2: 10.9}, 1, id="none pays"),
    ],
)
def test_the_largest_batch_is_one_whose_images_cost_little_more_than_the_best(
    image_ms: dict[int, float], largest: int
) -> None:
    own = [Timing("openvino", 1, n, 1.0, n * ms / 1000) for n, ms in image_ms.items()]
    others = [Timing("cpu", 1, 32, 1.0, 0.0), Timing("openvino", 2, 8, 0.0, 0.0)]
    found, image_s = timing.largest_batch([*own, *others], "openvino")
    assert (found, image_s) == (largest, pytest.approx(image_ms[largest] / 1000))


def test_a_provider_that_fails_is_left_out(
    backbone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = timing.compiled

    def compile_graph(model: bytes, cores: int, name: str, all_cores: int) -> object:
        if name == "openvino":
            raise RuntimeError("no such operator")
        return compiled(model, cores, "cpu", all_cores)

    monkeypatch.setattr(timing, "compiled", compile_graph)
    found = timing.measure(backbone.read_bytes(), BOTH, 1, 1)
    assert {each.provider for each in found.timings} == {"cpu"}
    assert (found.differences, found.providers) == ({}, {1: "cpu"})
    assert "openvino does not run" in caplog.text


def test_answers_are_compared_as_probabilities_some_of_them_sure() -> None:
    features = np.random.default_rng(0).gamma(1, 1, (200, 64)).astype(np.float32)
    answers = timing.probabilities(features)
    np.testing.assert_allclose(answers.sum(axis=1), 1, rtol=1e-5)
    assert answers.max(axis=1).max() > 0.9
    assert answers.max(axis=1).min() < 0.6
    np.testing.assert_allclose(timing.probabilities(features * 100), answers, atol=1e-5)


MakeMeasurer = Callable[..., Measurer]


class Heard:
    """What a measurer told, and when."""

    def __init__(self) -> None:
        self.found: dict[str, Measured] = {}
        self.all = threading.Semaphore(0)

    def __call__(self, digest: str, measured: Measured) -> None:
        self.found[digest] = measured
        self.all.release()


def measurer(table: ProviderTable, metrics: Metrics, heard: Heard) -> Measurer:
    return Measurer(CPU, 1, 1, table, metrics, {"PATH": ""}, heard)


def pending(metrics: Metrics) -> bool:
    return b"graft_measurements_pending 0.0" not in generate_latest(metrics.registry)


def test_measuring_happens_beside_and_once(backbone: Path, tmp_path: Path) -> None:
    table = ProviderTable(tmp_path / "providers.json", {})
    metrics, heard = Metrics({"version": "1"}), Heard()
    measuring = measurer(table, metrics, heard)
    try:
        for _ in range(2):
            measuring.measure("d1", backbone.read_bytes)
        measuring.measure("d2", backbone.read_bytes)
        assert heard.all.acquire(timeout=GUARD_S)
        assert heard.all.acquire(timeout=GUARD_S)
    finally:
        measuring.close()
    assert heard.found == table.backbones()
    assert list(heard.found) == ["d1", "d2"]
    assert not pending(metrics)
    told = generate_latest(metrics.registry).decode()
    assert 'graft_providers_chosen_total{cores="1",precision="fp32",provider="cpu"} 2.0' in told


def test_what_cannot_be_measured_is_told_and_holds_up_no_other(
    backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, heard = Metrics({"version": "1"}), Heard()
    measuring = measurer(ProviderTable(None, {}), metrics, heard)
    try:
        with caplog.at_level(logging.WARNING):
            measuring.measure("bad", lambda: b"no model")
            measuring.measure("good", backbone.read_bytes)
            assert heard.all.acquire(timeout=GUARD_S)
    finally:
        measuring.close()
    assert list(heard.found) == ["good"]
    assert "could not be measured, and serves on cpu" in caplog.text


def test_closing_ends_what_is_measured_and_forgets_what_waits(backbone: Path) -> None:
    metrics, heard = Metrics({"version": "1"}), Heard()
    measuring = measurer(ProviderTable(None, {}), metrics, heard)
    reading, may_go_on = threading.Event(), threading.Event()

    def read() -> bytes:
        reading.set()
        may_go_on.wait(GUARD_S)
        return backbone.read_bytes()

    measuring.measure("d1", read)
    assert reading.wait(GUARD_S)
    measuring.measure("d2", backbone.read_bytes)
    closing = threading.Thread(target=measuring.close)
    closing.start()
    while pending_of(metrics) > 1:
        closing.join(0.01)
    may_go_on.set()
    closing.join(GUARD_S)
    assert not closing.is_alive()
    assert heard.found == {}
    measuring.measure("d3", backbone.read_bytes)
    assert not pending(metrics)


def pending_of(metrics: Metrics) -> float:
    """Of the gauge."""
    found = metrics.registry.get_sample_value("graft_measurements_pending")
    assert found is not None
    return found
