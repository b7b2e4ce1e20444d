"""Real kernels on a backbone of one convolution."""

import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.domain import Precision, ProviderSetting
from service.engine import preprocess, providers, runtime
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import Provider, ProviderUnavailable, choose_provider
from service.engine.runtime import BackboneSession, OnnxGraph, OnnxRuntime, _half
from service.errors import Damaged, unloadable
from tests.unit.engine.conftest import image

CPU = Provider("cpu", "")
FEATURES = 4

needs_openvino = pytest.mark.skipif(
    bool(providers.openvino_problem()), reason="OpenVINO is not installed"
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uint8 [n, 224, 224, 3] -> float32 [n, 4]: a seeded convolution and a mean."""
    weight = np.random.default_rng(0).normal(size=(FEATURES, 3, 7, 7)).astype(np.float32) / 1000
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "weight"], ["convolved"], strides=[4, 4]),
        helper.make_node("Relu", ["convolved"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 224, 224, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path_factory.mktemp("backbone") / "b.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (5, 224, 224, 3), dtype=np.uint8)


def test_every_width_gives_the_same_features(backbone: Path, pixels: Pixels) -> None:
    session = OnnxRuntime(CPU, 4).load(backbone.read_bytes)
    wide = session.run(pixels)
    assert wide.shape == (5, FEATURES)
    for cores in (1, 2, 3):
        np.testing.assert_allclose(session.run(pixels, cores), wide, rtol=1e-4)


def test_runs_at_the_same_time_do_not_mix(backbone: Path, pixels: Pixels) -> None:
    session = OnnxRuntime(CPU, 2).load(backbone.read_bytes)
    expected = session.run(pixels)
    wrong: list[int] = []

    def run(n: int) -> None:
        for _ in range(20):
            if not np.allclose(session.run(pixels[n : n + 1], 1), expected[n], rtol=1e-4):
                wrong.append(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_narrow_graph_that_cannot_be_made_is_served_by_the_widest_and_tried_again_later(
    backbone: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now)
    is_there, reads = True, []

    def read() -> bytes:
        reads.append(1)
        if is_there:
            return backbone.read_bytes()
        raise unloadable("backbone", "is missing")

    session = OnnxRuntime(CPU, 2).load(read)
    is_there = False
    for _ in range(3):
        np.testing.assert_allclose(session.run(pixels, 1), session.run(pixels), rtol=1e-4)
    assert len(reads) == 2
    is_there = True
    now += 61
    session.run(pixels, 1)
    assert session._graph(1) is not session._graph(2)


def test_the_largest_batch_that_pays_is_within_the_bound(backbone: Path) -> None:
    session = OnnxRuntime(CPU, 1, max_batch=8).load(backbone.read_bytes)
    assert session.max_batch in (1, 2, 4, 8)
    assert session.infer_s > 0


class Timed:
    """A graph that costs what it is told, on a clock of its own."""

    size = 224
    feature_dim = FEATURES
    precision = "fp32"

    def __init__(self, image_s: float, run_s: float, disturbed_run: int = 0) -> None:
        self.now = 0.0
        self.runs = 0
        self._image_s, self._run_s = image_s, run_s
        self._disturbed_run = disturbed_run

    def run(self, images: Pixels) -> Floats:
        self.runs += 1
        self.now += self._run_s + self._image_s * len(images)
        if self.runs == self._disturbed_run:
            self.now += 0.005
        return np.zeros((len(images), FEATURES), np.float32)


def measured(graph: Timed, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> BackboneSession:
    session = BackboneSession(backbone.read_bytes, lambda _model, _cores: graph, 1, False)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.time, "monotonic", lambda: graph.now)
        session.measure(32)
    return session


@pytest.mark.parametrize("disturbed_run", range(1, 30))
def test_one_disturbed_run_does_not_end_the_search_for_the_largest_batch(
    backbone: Path, monkeypatch: pytest.MonkeyPatch, disturbed_run: int
) -> None:
    graph = Timed(0.000001, 0.00003, disturbed_run)
    assert measured(graph, backbone, monkeypatch).max_batch == 32


def test_larger_batches_of_a_graph_that_gains_nothing_by_them_are_not_taken(
    backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Timed(0.004, 0.0)
    assert measured(graph, backbone, monkeypatch).max_batch == 1
    assert graph.now < 0.1, "measured for too long"


@pytest.mark.parametrize(
    ("openvino_s", "cpu_s", "is_cpu_chosen"),
    [(0.0003, 0.00001, True), (0.0003, 0.0004, False), (0.002, 0.00001, False)],
)
def test_a_small_backbone_runs_on_the_cpu_provider_where_openvino_is_slower(
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
    openvino_s: float,
    cpu_s: float,
    is_cpu_chosen: bool,
) -> None:
    openvino, cpu = Timed(0.0, openvino_s), Timed(0.0, cpu_s)
    monkeypatch.setattr(runtime, "_openvino_graph", lambda *_: openvino)
    monkeypatch.setattr(runtime, "_cpu_graph", lambda *_: cpu)
    with monkeypatch.context() as patch:
        patch.setattr(runtime.time, "monotonic", lambda: openvino.now + cpu.now)
        session = OnnxRuntime(Provider("openvino", ""), 2, max_batch=4).load(backbone.read_bytes)
    before = cpu.runs
    session.run(np.zeros((1, 224, 224, 3), np.uint8))
    assert (cpu.runs > before) is is_cpu_chosen


@needs_openvino
@pytest.mark.parametrize(("precision", "tolerance"), [("exact", 1e-3), ("fast", 3e-2)])
def test_openvino_gives_the_features_of_the_cpu_provider(
    backbone: Path, pixels: Pixels, precision: Precision, tolerance: float
) -> None:
    session = OnnxRuntime(Provider("openvino", ""), 2, precision).load(backbone.read_bytes)
    assert session.feature_dim == FEATURES
    assert session.precision in (("fp32",) if precision == "exact" else ("fp32", "bf16", "fp16"))
    expected = OnnxRuntime(CPU, 1).load(backbone.read_bytes).run(pixels)
    for cores in (2, 1):
        np.testing.assert_allclose(session.run(pixels, cores), expected, rtol=tolerance)


@needs_openvino
def test_openvino_takes_an_image_as_the_decoder_gives_it(backbone: Path) -> None:
    decoded = preprocess.decode(image("red"))
    assert not decoded.flags.writeable
    session = OnnxRuntime(Provider("openvino", ""), 1).load(backbone.read_bytes)
    assert session.run(decoded[None]).shape == (1, FEATURES)


@needs_openvino
def test_openvinos_answer_is_not_overwritten_by_the_next_run(
    backbone: Path, pixels: Pixels
) -> None:
    session = OnnxRuntime(Provider("openvino", ""), 1).load(backbone.read_bytes)
    first = session.run(pixels[:1])
    kept = first.copy()
    session.run(255 - pixels[:1])
    np.testing.assert_array_equal(first, kept)


def test_batches_on_a_gpu_are_padded_to_few_sizes_and_cut_again(
    backbone: Path, pixels: Pixels
) -> None:
    session = ort.InferenceSession(str(backbone), providers=["CPUExecutionProvider"])
    bound = OnnxGraph(session, "CPUExecutionProvider", "fp32", True)
    expected = OnnxRuntime(CPU, 1).load(backbone.read_bytes).run(pixels)
    for count in (1, 3, 5):
        np.testing.assert_allclose(bound.run(pixels[:count]), expected[:count], rtol=1e-4)


def test_a_file_in_half_precision_takes_and_gives_the_same_types(
    backbone: Path, pixels: Pixels
) -> None:
    halved = _half(backbone.read_bytes())
    session = ort.InferenceSession(halved, providers=["CPUExecutionProvider"])
    features = OnnxGraph(session, "CPUExecutionProvider", "fp16", False).run(pixels)
    assert features.dtype == np.float32
    expected = OnnxRuntime(CPU, 1).load(backbone.read_bytes).run(pixels)
    np.testing.assert_allclose(features, expected, rtol=2e-2)


def test_a_file_that_is_no_model_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "b.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(Damaged):
        OnnxRuntime(CPU, 1).load(path.read_bytes)


def test_auto_takes_the_cpu_where_there_is_nothing_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: 0)
    monkeypatch.setattr(providers, "openvino_problem", lambda: "OpenVINO is not installed")
    chosen = choose_provider("auto")
    assert chosen.name == "cpu"
    assert "no NVIDIA GPU" in chosen.why
    assert "OpenVINO is not installed" in chosen.why


def test_auto_prefers_cuda_and_then_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "openvino_problem", lambda: "")
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: 1)
    monkeypatch.setattr(providers, "_gpu_problem", lambda name: "")
    assert choose_provider("auto").name == "cuda"
    monkeypatch.setattr(providers, "_gpu_problem", lambda name: "the driver is too old")
    chosen = choose_provider("auto")
    assert chosen.name == "openvino"
    assert "too old" in chosen.why


@pytest.mark.parametrize("setting", ["cuda", "tensorrt", "openvino"])
def test_a_provider_that_is_set_and_cannot_be_had_is_an_error(
    setting: ProviderSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: 0)
    monkeypatch.setattr(providers, "openvino_problem", lambda: "it is not installed")
    with pytest.raises(ProviderUnavailable, match=setting):
        choose_provider(setting)
