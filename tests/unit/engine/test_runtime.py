"""Real kernels on a backbone of one convolution."""

import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from service.domain import Precision, ProviderSetting
from service.engine import preprocess, providers, runtime
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.provider_table import Measured
from service.engine.providers import Provider, ProviderName, ProviderUnavailable, choose_provider
from service.engine.runtime import (
    BackboneSession,
    Graph,
    OnnxGraph,
    OnnxRuntime,
    _half,
    able,
    marked,
    precision_of,
)
from service.errors import Damaged, unloadable
from tests.unit.engine.conftest import FEATURES, image

CPU = Provider("cpu", "")
needs_openvino = pytest.mark.skipif(
    bool(providers.openvino_problem()), reason="OpenVINO is not installed"
)


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
    session = BackboneSession(backbone.read_bytes, lambda *_: graph, CPU, [1], {})
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


def test_a_session_changes_to_what_was_measured_to_be_quicker(
    backbone: Path, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, str]] = []

    def compile_graph(model: bytes, cores: int, name: ProviderName, *_: object) -> Graph:
        made.append((cores, name))
        return OnnxGraph(
            ort.InferenceSession(model, providers=["CPUExecutionProvider"]),
            "CPUExecutionProvider",
        )

    monkeypatch.setattr(runtime, "compiled", compile_graph)
    asked: list[str] = []
    known: dict[str, Measured] = {}
    both = OnnxRuntime(
        Provider("cpu", "", ("openvino",)),
        2,
        measured=known.get,
        on_unmeasured=lambda digest, _read: asked.append(digest),
    )
    session = both.load(backbone.read_bytes, "d1")
    expected = session.run(pixels)
    assert (asked, made) == (["d1"], [(2, "cpu")])
    found = Measured("fp32", [], {"openvino": 0.0}, {2: "cpu", 1: "openvino"}, 8, 0.5)
    both.adopt("d1", found)
    for cores in (1, 2, 1):
        np.testing.assert_allclose(session.run(pixels, cores), expected, rtol=1e-4)
    assert made == [(2, "cpu"), (1, "openvino")]
    assert (session.max_batch, session.infer_s) == (8, 0.5)
    known["d1"] = found
    again = OnnxRuntime(
        Provider("cpu", "", ("openvino",)), 2, is_narrow=True, measured=known.get
    ).load(backbone.read_bytes, "d1")
    assert (again.max_batch, made[-1]) == (8, (1, "openvino"))
    # Measured for two threads, and now there are four.
    more = OnnxRuntime(
        Provider("cpu", "", ("openvino",)),
        4,
        measured=known.get,
        on_unmeasured=lambda digest, _read: asked.append(digest),
    )
    more.load(backbone.read_bytes, "d1")
    assert asked == ["d1", "d1"]


def test_a_file_says_what_it_is_computed_in(backbone: Path) -> None:
    model = backbone.read_bytes()
    assert precision_of(model) == "fp32"
    for precision in ("bf16", "fp16"):
        other = marked(model, precision)
        assert precision_of(other) == precision
        (entry,) = onnx.load_from_string(other).metadata_props
        assert (entry.key, entry.value) == ("graft.precision", precision)
    assert precision_of(model + b"DequantizeLinear") == "int8"


def test_what_this_machine_does_not_compute_in_is_computed_in_fp32(
    backbone: Path, pixels: Pixels
) -> None:
    half = marked(backbone.read_bytes(), "fp16")
    on_cpu = OnnxRuntime(CPU, 1)
    assert not on_cpu.computes("fp16")
    session = on_cpu.load(lambda: half)
    assert (session.precision, session.made_for) == ("fp32", "fp16")
    expected = on_cpu.load(backbone.read_bytes).run(pixels)
    np.testing.assert_array_equal(session.run(pixels), expected)


def test_what_providers_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Provider("cpu", "", ("openvino",))
    for has_amx, bf16 in ((False, []), (True, ["openvino"])):
        monkeypatch.setattr(providers, "has_amx", lambda has_amx=has_amx: has_amx)
        assert able(both, "fp32") == ["cpu", "openvino"]
        assert (able(both, "bf16"), able(both, "fp16")) == (bf16, [])
        assert able(Provider("cuda", ""), "fp16") == ["cuda"]
    for has_vnni, int8 in ((False, ["cpu"]), (True, ["cpu", "openvino"])):
        monkeypatch.setattr(providers, "has_vnni", lambda has_vnni=has_vnni: has_vnni)
        assert able(both, "int8") == int8


@needs_openvino
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_openvino_gives_the_features_of_the_cpu_provider(
    backbone: Path, pixels: Pixels, precision: Precision, tolerance: float
) -> None:
    model = backbone.read_bytes()
    if precision != "fp32":
        model = marked(model, precision)
    session = OnnxRuntime(Provider("openvino", ""), 2).load(lambda: model)
    assert session.feature_dim == FEATURES
    assert session.precision == (precision if providers.has_amx() else "fp32")
    expected = OnnxRuntime(CPU, 1).load(backbone.read_bytes).run(pixels)
    for cores in (2, 1):
        np.testing.assert_allclose(session.run(pixels, cores), expected, rtol=tolerance)


@pytest.mark.parametrize("name", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_sums_of_int8_do_not_overflow(name: ProviderName, largest_sums: bytes) -> None:
    session = OnnxRuntime(Provider(name, ""), 1).load(lambda: largest_sums)
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    np.testing.assert_allclose(session.run(white), 255 * 127 * white.size, rtol=0.01)


@pytest.fixture(scope="module")
def largest_sums() -> bytes:
    """uint8 [n, 8, 8, 3] -> float32 [n, 4]: sums of all pixels, times 127, in int8."""
    constants = {
        "weight": np.full((FEATURES, 3, 8, 8), 127, np.int8),
        "one": np.float32(1),
        "step": np.float32(127 * 8 * 8 * 3),
        "u8": np.uint8(0),
        "s8": np.int8(0),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("QuantizeLinear", ["planes", "one", "u8"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "one", "u8"], ["pixels"]),
        helper.make_node("DequantizeLinear", ["weight", "one", "s8"], ["weights"]),
        helper.make_node("Conv", ["pixels", "weights"], ["sums"]),
        helper.make_node("QuantizeLinear", ["sums", "step", "u8"], ["rounded sums"]),
        helper.make_node("DequantizeLinear", ["rounded sums", "step", "u8"], ["convolved"]),
        helper.make_node("Flatten", ["convolved"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 8, 8, 3])],
        [helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized


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


def test_a_file_in_half_precision_takes_and_gives_the_same_types(
    backbone: Path, pixels: Pixels
) -> None:
    halved = _half(backbone.read_bytes())
    session = ort.InferenceSession(halved, providers=["CPUExecutionProvider"])
    features = OnnxGraph(session, "CPUExecutionProvider").run(pixels)
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


def test_auto_takes_cuda_or_measures_openvino_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "openvino_problem", lambda: "")
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: 1)
    monkeypatch.setattr(providers, "_gpu_problem", lambda name: "")
    assert choose_provider("auto").name == "cuda"
    monkeypatch.setattr(providers, "_gpu_problem", lambda name: "the driver is too old")
    chosen = choose_provider("auto")
    assert (chosen.name, chosen.others) == ("cpu", ("openvino",))
    assert "too old" in chosen.why


@pytest.mark.parametrize("setting", ["cuda", "tensorrt", "openvino"])
def test_a_provider_that_is_set_and_cannot_be_had_is_an_error(
    setting: ProviderSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_cuda_device_count", lambda: 0)
    monkeypatch.setattr(providers, "openvino_problem", lambda: "it is not installed")
    with pytest.raises(ProviderUnavailable, match=setting):
        choose_provider(setting)
