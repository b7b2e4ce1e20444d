"""Files that are to be backbones, run and rewritten in a process with limits."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, on_one_core
from service.errors import Exhausted, Expired, GraftError, InvalidInput, Reason
from service.ingest import backbone_check, backbone_process
from service.ingest.backbone_process import Asked, BackboneChecks, Checked
from service.ops import failpoints
from tests import processes
from tests.extractors import MEAN, SIZE, STD, convolution, extractor, pooling, weights, write

Check = Callable[..., Checked]


class Gone(Exception):  # noqa: N818
    """The caller has left."""


@pytest.fixture
def check(tmp_path: Path) -> Iterator[Check]:
    """Checks a model; its rewritten form lies in `kept.onnx` afterwards."""

    def run(
        model: onnx.ModelProto | None = None,
        fault: str = "",
        go_on: Callable[[], None] = lambda: None,
        options: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Checked:
        environment = {**os.environ, failpoints.VARIABLE: fault, "GRAFT_TOKEN": "secret"}
        checks = BackboneChecks(environment, **(options or {}))
        asked = Asked(**{"size": SIZE, "mean": MEAN, "std": STD, **changes})
        source = write(tmp_path / "given.onnx", model) if model else tmp_path / "given.onnx"
        return checks.check(source, tmp_path / "kept.onnx", asked, go_on)

    yield run
    assert children() == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Checks a model likewise, in this process."""
    monkeypatch.setattr(backbone_check, "_allow", lambda _: None)

    def run(model: onnx.ModelProto, **changes: Any) -> Checked:
        asked = Asked(**{"size": SIZE, "mean": MEAN, "std": STD, **changes})
        source = write(tmp_path / "given.onnx", model)
        return processes.check_here(source, tmp_path / "kept.onnx", asked)

    return run


def children() -> list[psutil.Process]:
    """The checks that run now."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and any(
                "backbone_check" in word for word in child.cmdline()
            ):
                found.append(child)
    return found


def refusal(check: Check, model: onnx.ModelProto, **changes: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        check(model, **changes)
    assert caught.value.reason is Reason.BACKBONE_UNUSABLE
    return caught.value.message.removeprefix("the file cannot serve as a backbone: ")


def after(*nodes: onnx.NodeProto, more: Any = (), **options: Any) -> onnx.ModelProto:
    """The usual network with more nodes behind it, the last of which gives `last`."""
    given = [*convolution(), *pooling(), *nodes]
    return extractor(given, outputs=["last"], initializers=[weights(), *more], **options)


def constant(name: str, *numbers: int) -> TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def channels_last(tail: list[onnx.NodeProto], output: str) -> onnx.ModelProto:
    turn = helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2])
    nodes = [turn, *convolution("turned"), *tail]
    return extractor(nodes, outputs=[output], inputs={"x": (1, SIZE, SIZE, 3)})


TURNED_MAP = [helper.make_node("Transpose", ["map"], ["map_last"], perm=[0, 2, 3, 1])]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (extractor(), {}),
        (extractor(inputs={"pixel_values": (1, 3, SIZE, SIZE)}), {}),
        (extractor(opsets={"ai.onnx": 11}), {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}),
        (extractor(opsets={"": 23}), {"output": "map"}),
        (channels_last(pooling(), "embedding"), {"layout": "nhwc"}),
        (channels_last(TURNED_MAP, "map_last"), {"layout": "nhwc"}),
    ],
    ids=["pooled", "fixed batch", "opset 11", "map", "channels last", "map of channels last"],
)
def test_the_form_that_serves_takes_bytes_and_gives_the_same_features(
    here: Check, tmp_path: Path, model: onnx.ModelProto, changes: dict[str, Any]
) -> None:
    found = here(model, **changes)
    assert found.width == 12
    kept = tmp_path / "kept.onnx"
    session = OnnxRuntime(Provider("cpu", "for a test")).load(kept.read_bytes)
    assert (session.size, session.feature_dim, session.precision) == (SIZE, 12, "fp32")
    stored = onnx.load_from_string(kept.read_bytes())
    assert stored.opset_import[0].version == found.opset == model.opset_import[0].version
    assert {entry.key: entry.value for entry in stored.metadata_props} == {"graft.blocks": "[12]"}
    onnx.checker.check_model(stored, full_check=True)

    pixels = np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    asked = Asked(**{"size": SIZE, "mean": MEAN, "std": STD, **changes})
    floats = ((pixels / 255 - np.array(asked.mean)) / np.array(asked.std)).astype(np.float32)
    # As the convolution sees them, whatever the layout.
    meant = write(tmp_path / "meant.onnx", extractor())
    wanted = on_one_core(meant)(np.ascontiguousarray(floats.transpose(0, 3, 1, 2)))
    assert np.abs(session.run(pixels) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_a_batch_that_is_fixed_within_is_refused(here: Check) -> None:
    node = helper.make_node("Reshape", ["embedding", "shape"], ["last"])
    said = refusal(here, after(node, more=[constant("shape", 1, 12)]))
    assert said.startswith("it runs with one image and not with 3: its batch is fixed within")


@pytest.mark.parametrize(
    ("shape", "told"), [((1, -1), "[1, 36]"), ((-1, 4, 3), "[3, 4, 3]"), ((-1,), "[36]")]
)
def test_an_output_of_another_shape_is_refused(
    here: Check, shape: tuple[int, ...], told: str
) -> None:
    node = helper.make_node("Reshape", ["embedding", "shape"], ["last"])
    said = refusal(here, after(node, more=[constant("shape", *shape)]))
    assert said.startswith(f"its output is {told} for 3 images, and [n, d], or a map [n, d, h, w]")


def test_an_output_in_half_precision_is_refused(here: Check) -> None:
    node = helper.make_node("Cast", ["embedding"], ["last"], to=TensorProto.FLOAT16)
    assert refusal(here, after(node)).startswith("its output is float16, no float32")


def test_too_many_features_are_refused(here: Check) -> None:
    node = helper.make_node("Tile", ["embedding", "times"], ["last"])
    said = refusal(here, after(node, more=[constant("times", 1, 1366)]))
    assert said.startswith("it gives 16392 features an image, and 1 to 16384 are taken")


def test_features_that_are_no_numbers_are_refused(here: Check) -> None:
    nodes = [
        helper.make_node("Neg", ["embedding"], ["negative"]),
        helper.make_node("Log", ["negative"], ["last"]),
    ]
    assert refusal(here, after(*nodes)).startswith("some features are not finite numbers: ")


def test_features_that_say_nothing_of_the_image_are_refused(here: Check) -> None:
    node = helper.make_node("Mul", ["embedding", "zero"], ["last"])
    zero = numpy_helper.from_array(np.float32(0), "zero")
    said = refusal(here, after(node, more=[zero]))
    assert said.startswith("it gives the same features for different images")


def test_features_that_depend_on_the_batch_are_refused(here: Check) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["embedding"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["embedding", "mean"], ["last"]),
    ]
    said = refusal(here, after(*nodes))
    assert said.startswith("an image's features depend on the other images of its batch: ")


def test_what_cannot_be_loaded_or_run_is_refused_in_the_runtimes_words(here: Check) -> None:
    # Shapes that do not fit are found when it is loaded, or when it is run.
    other = numpy_helper.from_array(np.ones((5, 7), np.float32), "other")
    node = helper.make_node("MatMul", ["embedding", "other"], ["last"])
    said = refusal(here, after(node, more=[other]))
    assert said.startswith(("ONNX Runtime cannot load it (", "ONNX Runtime cannot run it ("))
    assert len(said) < 600 and said.isprintable()


def test_an_image_that_takes_too_much_memory_is_refused(check: Check) -> None:
    nodes = [
        helper.make_node("Tile", ["embedding", "times"], ["long"]),
        helper.make_node("ReduceMax", ["long"], ["most"], axes=[1], keepdims=1),
        helper.make_node("Add", ["embedding", "most"], ["last"]),
    ]
    said = refusal(check, after(*nodes, more=[constant("times", 1, 20_000_000)]))
    assert said.startswith("an image takes more than 512 MiB of memory on its way: ")


def test_a_small_file_that_becomes_large_when_it_is_loaded_is_refused(check: Check) -> None:
    value = numpy_helper.from_array(np.ones(1, np.float32), "one")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["long"], value=value),
        helper.make_node("ReduceMax", ["long"], ["most"], keepdims=0),
        helper.make_node("Add", ["embedding", "most"], ["last"]),
    ]
    said = refusal(check, after(*nodes, more=[constant("shape", 1_000_000_000)]))
    assert "of memory" in said and "choose a smaller network" in said


def test_what_takes_too_long_is_refused(check: Check) -> None:
    many = numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(64, 3, 16, 16)).astype(np.float32), "kernels"
    )
    nodes = [helper.make_node("Conv", ["pixel_values", "kernels"], ["map"]), *pooling()]
    model = extractor(nodes, initializers=[many], inputs={"pixel_values": (1, 3, 512, 512)})
    said = refusal(check, model, size=512, options={"cpu_s": 1})
    assert said.startswith("checking it took more than 1 s of processor time: choose a smaller")


def test_a_check_that_does_not_end_is_ended(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_process, "_CHECK_S", 0.0)
    with pytest.raises(Expired, match="the file was not checked within 0 s: try again"):
        check(extractor(), "hang@backbone.checking")


def test_a_file_that_breaks_the_process_is_refused(check: Check) -> None:
    def go_on() -> None:
        for child in children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGSEGV)

    with pytest.raises(InvalidInput, match="was ended by SIGSEGV: it breaks ONNX's parser or"):
        check(extractor(), "hang@backbone.checking", go_on)


def test_a_killed_check_had_no_memory(check: Check) -> None:
    with pytest.raises(Exhausted, match="ran out of memory: choose a smaller network, or give"):
        check(extractor(), "kill@backbone.checking")


def test_what_python_itself_asks_for_in_vain_is_the_files_fault(check: Check) -> None:
    said = refusal(check, extractor(), fault="memory@backbone.checking")
    assert said.startswith("it takes more than the 256 MiB of memory that a file of its size may")


def test_a_full_disk_is_told_as_one(check: Check, tmp_path: Path) -> None:
    (tmp_path / "kept.onnx").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        check(extractor())
    assert caught.value.errno == errno.ENOSPC


def test_a_fault_of_the_check_itself_is_told_with_its_last_words(check: Check) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 1.*is no ACTION@POINT"):
        check(extractor(), "nonsense")


def test_a_check_is_nicer_knows_no_secret_and_goes_before_the_server(check: Check) -> None:
    seen: list[tuple[int, bool, str]] = []

    def go_on() -> None:
        for child in children():
            score = Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip()
            if score == "1000":
                seen.append((child.nice(), "GRAFT_TOKEN" in child.environ(), score))
                raise Gone

    with pytest.raises(Gone):
        check(extractor(), "hang@backbone.checking", go_on, {"niceness": 7})
    assert seen == [(max(7, psutil.Process().nice()), False, "1000")]


def test_one_file_is_checked_at_a_time_and_who_waits_may_leave(tmp_path: Path) -> None:
    checks = BackboneChecks(os.environ)

    def go_on() -> None:
        assert children() == []
        raise Gone

    asked = Asked(size=SIZE, mean=MEAN, std=STD)
    given = write(tmp_path / "given.onnx")
    with checks._turn, pytest.raises(Gone):
        checks.check(given, tmp_path / "kept.onnx", asked, go_on)
    assert checks.check(given, tmp_path / "kept.onnx", asked, lambda: None).width == 12


def test_damaged_files_are_refused_or_taken_and_nothing_else(check: Check, tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(5), write(tmp_path / "given.onnx").read_bytes()
    # Beside the weights, in which no change is wrong.
    places = [n for n in range(len(whole)) if n < 200 or n > len(whole) - 400]
    reasons = []
    for _ in range(6):
        damaged = bytearray(whole)
        for place in rng.choice(places, 4):
            damaged[place] = rng.integers(256)
        (tmp_path / "given.onnx").write_bytes(damaged)
        try:
            check()
        except GraftError as error:
            reasons.append(error.reason)
    assert set(reasons) == {Reason.BACKBONE_UNUSABLE}
    assert len(reasons) >= 3
