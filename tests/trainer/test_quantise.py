"""int8: made once, of nobody's images, shared, measured, and withheld where it harms."""

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from service.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    REFERENCE_FILE,
    REPORT_HTML_FILE,
    Auto,
    DomainAdaptation,
    ExportedBackbone,
    JobSpec,
    Manifest,
    ModelBased,
    Note,
    form_name,
)
from service.domain import DEFAULT_DECODING, Decision
from service.engine import export as exporting
from service.engine import head as heads
from service.engine import providers
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, precision_of
from service.ingest.backbone_process import Asked, BackboneChecks
from service.quantisation import QuantisationCost
from tests.extractors import MEAN, SIZE, STD, extractor, write
from tests.trainer.conftest import MakeFolder, MakeSpec, Told, registered
from tests.trainer.small_network import HALF
from trainer import (
    backbone_file,
    backbones,
    calibration_images,
    quantisation_cost,
    quantise,
    train,
)
from trainer.job import FLOAT_FILE
from trainer.methods import auto
from trainer.quantisation_cost import Answers, Times
from trainer.weights import Weights


def spec_of(make: MakeSpec, folder: Path, file: Path, **changes: object) -> JobSpec:
    return make(folder, **{**registered(file), "precision": "int8", **changes})


def three_layers(*_: object) -> backbones.Backbone:
    """Makes a network with a layer between its first and its last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, middle, last = nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        trunk = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last, nn.ReLU(), pooled)
    return backbones.Backbone(trunk, {"": [first, middle, last]}, 16, HALF, HALF)


def test_calibration_images_are_the_same_every_time_and_unlike_each_other() -> None:
    np.random.seed(1)
    first = calibration_images.images(64, 8)
    np.random.seed(2)
    again = calibration_images.images(64, 8)
    assert (first == again).all()
    assert (calibration_images.images(64, 4) == first[:4]).all()
    assert (calibration_images.images(64, 8, seed=1) != first).any()
    # Dark and bright ones, flat ones and ones of much contrast, grey and coloured ones.
    many = calibration_images.images(64).astype(float)
    means, deviations = many.mean(axis=(1, 2, 3)), many.std(axis=(1, 2, 3))
    assert means.min() < 70
    assert means.max() > 180
    assert deviations.min() < 20
    assert deviations.max() > 70
    colours = np.abs(many - many.mean(axis=3, keepdims=True)).mean(axis=(1, 2, 3))
    assert colours.min() < 8
    assert colours.max() > 30


def test_a_frozen_backbones_first_and_last_layers_stay_in_float(
    default_forms: dict[str, Any], tmp_path: Path
) -> None:
    quantised = {form.weights: form.digest for form in default_forms["exported"]}
    (plain,) = (name for name in quantised if not name.endswith(":int8"))
    if (digest := quantised.get(form_name(plain, "int8"))) is not None:
        model = onnx.load(default_forms["files"][digest])
    else:  # on a CPU that has no units for it
        assert quantise.to_int8(
            Path(default_forms["files"][quantised[plain]]), tmp_path / "int8.onnx"
        )
        model = onnx.load(tmp_path / "int8.onnx")
    makers = {output: node for node in model.graph.node for output in node.output}
    in_int8 = [
        node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1] in makers
    ]
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    in_float = [name for name in convolutions if name not in in_int8]
    # Those that read maps of 112 by 112 pixels or more, and the last.
    assert [name.removeprefix("/backbone/trunk/") for name in in_float] == [
        "conv_stem/Conv",
        "blocks/blocks.0/blocks.0.0/conv_dw/Conv",
        "blocks/blocks.0/blocks.0.0/conv_pw/Conv",
        "blocks/blocks.1/blocks.1.0/conv_pw/Conv",
        "blocks/blocks.1/blocks.1.0/conv_dw/Conv",
        "conv_head/Conv",
    ]
    # Nor are features rounded.
    (last,) = [node for node in model.graph.node if "features" in node.output]
    assert {makers[name].op_type for name in last.input} == {"Flatten", "ReduceMean"}


def test_ranges_do_not_depend_on_a_tenants_images(
    make_folder: MakeFolder, make_spec: MakeSpec, registered_file: Path, told: Told, tmp_path: Path
) -> None:
    digests = []
    for place, classes in enumerate((("blue", "red"), ("green", "red"))):
        folder = make_folder(f"images{place}", per_class=20, classes=classes, seed=place)
        spec = spec_of(make_spec, folder, registered_file, out_dir=str(tmp_path / f"out{place}"))
        manifest = train.run(spec, told.append)
        assert manifest.serving_precision == "int8"
        assert precision_of((Path(spec.out_dir) / BACKBONE_FILE).read_bytes()) == "int8"
        digests.append(manifest.backbone_digest)
    assert digests[0] == digests[1]


def test_a_job_says_what_int8_costs_and_exports_what_it_serves(
    make_folder: MakeFolder, make_spec: MakeSpec, registered_file: Path, told: Told
) -> None:
    folder = make_folder(per_class=20)
    spec = spec_of(make_spec, folder, registered_file, decision=Decision(rule="balanced"))
    manifest = train.run(spec, told.append)
    cost = manifest.quantisation
    assert cost is not None
    assert (cost.images, cost.accuracy_difference, cost.changed_answers) == (40, 0.0, 0.0)
    assert cost.int8_ms > 0
    assert manifest.precision_note == quantisation_cost.words(cost)
    assert manifest.precision_note in {note.text for note in told.of(Note)}  # type: ignore[attr-defined]
    page = (Path(spec.out_dir) / REPORT_HTML_FILE).read_text()
    assert "int8 changes the accuracy by +0.0 points" in page

    file = Path(spec.out_dir) / BACKBONE_FILE
    head = heads.load((Path(spec.out_dir) / HEAD_FILE).read_bytes())
    assert head.decision == spec.decision
    assert head.prior is not None
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    session = OnnxRuntime(Provider("cpu", ""), 2).load(file.read_bytes)
    composed = file.with_name("composed.onnx")
    decoding = msgspec.structs.replace(DEFAULT_DECODING, size=SIZE)
    composed.write_bytes(exporting.compose(file.read_bytes(), head, {}, decoding))
    exported = OnnxRuntime(Provider("cpu", ""), 2).load(composed.read_bytes)
    np.testing.assert_allclose(
        exported.run(pixels), head.probabilities(session.run(pixels)), atol=1e-3
    )


@pytest.mark.parametrize("is_asked", [False, True])
def test_int8_that_is_shown_to_lose_is_served_only_where_the_request_names_it(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    registered_file: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    is_asked: bool,
) -> None:
    sound = quantise.to_int8

    def ruinous(backbone: Path, out: Path) -> bool:
        # Of a network that gives the same features whatever it is shown.
        model = onnx.load(backbone)
        for tensor in model.graph.initializer:
            if tensor.dims[:2] == [12, 12]:
                values = onnx.numpy_helper.to_array(tensor) * 0
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        blind = out.with_name("blind.onnx")
        onnx.save(model, blind)
        is_made = sound(blind, out)
        blind.unlink()
        return is_made

    monkeypatch.setattr(quantise, "to_int8", ruinous)
    folder = make_folder(per_class=20)
    spec = spec_of(make_spec, folder, registered_file, is_precision_asked=is_asked)
    manifest: Manifest = train.run(spec, told.append)
    assert manifest.quantisation is not None
    assert manifest.quantisation.accuracy_difference_high < 0
    assert manifest.headline is not None
    assert (manifest.headline.accuracy == 1.0) is not is_asked
    assert manifest.serving_precision == ("int8" if is_asked else "fp32")
    assert ("served in fp32" in manifest.precision_note) is not is_asked
    left = {path.name for path in Path(spec.out_dir).glob("*.onnx")}
    assert left == ({BACKBONE_FILE} if is_asked else set())


def test_a_backbone_without_a_layer_between_its_ends_is_served_in_float(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    file, asked = tmp_path / "kept.onnx", Asked(size=SIZE, mean=MEAN, std=STD)
    given = write(tmp_path / "given.onnx", extractor())
    BackboneChecks(os.environ).check(given, file, asked, lambda: None)
    manifest = train.run(spec_of(make_spec, make_folder(), file), told.append)
    assert (manifest.serving_precision, manifest.quantisation) == ("fp32", None)
    assert "no layer lies between" in manifest.precision_note
    assert manifest.precision_note in {note.text for note in told.of(Note)}  # type: ignore[attr-defined]


def answers(right: int, wrong: int, sure: float, *, groups: int = 0) -> Answers:
    count = right + wrong
    answered = np.repeat([0, 1], [right, wrong])
    rows = np.where(np.arange(2) == answered[:, None], sure, 1 - sure).astype(np.float32)
    of = np.arange(count) % groups if groups else np.arange(count)
    return Answers(rows, answered, np.zeros(count, np.int64), of)


def test_the_price_and_the_gain_are_told_in_words() -> None:
    times = Times(fp32_ms=12.4, int8_ms=6.2)
    cost = quantisation_cost.measured(answers(95, 5, 0.9), answers(93, 7, 0.8), times)
    assert cost is not None
    assert quantisation_cost.is_bearable(cost)
    assert quantisation_cost.words(cost) == (
        "int8 changes the accuracy by -2.0 points (95 % interval -7.0 to +1.8, on 100 images that "
        "were not learned from), the log loss by +0.105 nats and 2.0% of the answers; an image "
        "takes 6.2 ms of a core of the machine that trained, in fp32 12.4 ms (2.0 times as long)"
    )
    grouped = quantisation_cost.measured(
        answers(95, 5, 0.9, groups=50), answers(95, 5, 0.9, groups=50), times
    )
    assert grouped is not None
    assert "on 100 images in 50 groups that" in quantisation_cost.words(grouped)


def test_what_cannot_be_told_is_not_borne() -> None:
    none = answers(0, 0, 0.9)
    assert quantisation_cost.measured(none, none, Times(1.0, 1.0)) is None
    assert not quantisation_cost.is_bearable(None)
    assert quantisation_cost.words(None) == "there is no image to tell what int8 costs"
    lost = quantisation_cost.measured(answers(95, 5, 0.9), answers(60, 40, 0.9), Times(1.0, 1.0))
    assert isinstance(lost, QuantisationCost)
    assert not quantisation_cost.is_bearable(lost)


def test_both_forms_are_timed_in_turns() -> None:
    ran: list[str] = []

    class Session:
        size, feature_dim, nbytes, precision, max_batch, infer_s = 8, 1, 0, "fp32", 1, 0.0

        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, images: Pixels, cores: int = 0) -> np.ndarray:
            assert (images.shape, cores) == ((1, 8, 8, 3), 1)
            ran.append(self.name)
            return np.zeros((1, 1), np.float32)

    times = quantisation_cost.timed(Session("a"), Session("b"))  # type: ignore[arg-type]
    assert ran == ["a", "b"] * (len(ran) // 2)
    assert len(ran) >= 4
    assert 0 <= times.fp32_ms < float("inf")
    assert 0 <= times.int8_ms < float("inf")


@pytest.mark.parametrize(
    ("changes", "has_vnni", "taken"),
    [
        ({}, True, True),
        ({"method": Auto()}, True, True),
        ({"precision": "fp32"}, True, False),
        ({"method": ModelBased()}, True, False),
        ({"method": DomainAdaptation()}, True, False),
        ({"backbone": "resnet18"}, True, False),
        ({"weights": "random"}, True, False),
        ({}, False, False),
    ],
)
def test_int8_is_taken_unasked_only_where_it_was_shown_to_hold(
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    has_vnni: bool,
    taken: bool,
) -> None:
    monkeypatch.setattr(providers, "has_vnni", lambda: has_vnni)
    spec = make_spec(tmp_path, **{"backbone": "efficientnet_lite0", "precision": "auto"} | changes)
    weights = Weights(spec.backbone, spec.weights, spec.seed, tmp_path).name
    runtime = OnnxRuntime(Provider("cpu", ""), 1)
    assert backbone_file.takes_int8(spec, weights, runtime) is taken


def test_a_job_in_int8_unasked_works_in_it_from_the_start_and_shares_the_file(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "has_vnni", lambda: True)
    monkeypatch.setattr(backbones, "load", three_layers)
    monkeypatch.setattr(backbones, "classifier", lambda *_: None)
    folder = make_folder()
    spec = make_spec(folder, precision="auto")
    first = train.run(spec, told.append)
    assert (first.serving_precision, first.precision) == ("int8", "int8")
    assert first.quantisation is None
    assert "where nobody chose" in first.precision_note
    out = Path(spec.out_dir)
    assert precision_of((out / BACKBONE_FILE).read_bytes()) == "int8"

    # Where a network is trained, both are computed in floats; where it is not, int8 serves.
    given: list[auto.Given] = []

    def no(asked: auto.Given, _: object) -> str:
        given.append(asked)
        return "the frozen head serves"

    monkeypatch.setattr(auto, "hopeless", lambda _: "")
    monkeypatch.setattr(auto, "improve", no)
    monkeypatch.setattr(quantise, "to_int8", lambda *_: pytest.fail("it is there"))
    shared = ExportedBackbone(f"{first.weights}:int8", first.backbone_digest)
    plain = (out / FLOAT_FILE).read_bytes()
    floating = ExportedBackbone(
        first.weights, hashlib.sha256(plain).hexdigest(), reference=first.reference_digest
    )
    again = train.run(
        make_spec(
            folder,
            precision="auto",
            method=Auto(),
            out_dir=str(tmp_path / "again"),
            exported=[shared, floating],
            files={
                shared.digest: str(out / BACKBONE_FILE),
                floating.digest: str(out / FLOAT_FILE),
                floating.reference: str(out / REFERENCE_FILE),
            },
        ),
        told.append,
    )
    assert (again.serving_precision, again.backbone_digest) == ("int8", shared.digest)
    assert [each.session().precision for each in given] == ["fp32"]
    assert not list((tmp_path / "again").glob("*.onnx"))
