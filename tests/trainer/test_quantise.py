"""int8: made once, shared, measured, and refused where it harms."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    ModelBased,
    Note,
)
from service.domain import DEFAULT_DECODING, Decision, Manifest
from service.engine import export as exporting
from service.engine import head as heads
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from tests.trainer.small_network import small_backbone
from trainer import export, quantise, train
from trainer.job import FROZEN_FILE


def run(spec: object, told: Told) -> Manifest:
    return train.run(spec, told.append)  # type: ignore[arg-type]


def test_a_frozen_backbone_in_int8_changes_few_answers_and_exports_what_it_serves(
    make_folder: MakeFolder, make_spec: MakeSpec
) -> None:
    spec = make_spec(make_folder(), precision="int8", decision=Decision(rule="balanced"))
    manifest = run(spec, Told())
    file = Path(spec.out_dir) / BACKBONE_FILE
    assert manifest.serving_precision == "int8"
    assert manifest.changed_by_int8 is not None
    assert manifest.changed_by_int8 <= quantise.MAX_CHANGED
    assert manifest.precision_note == ""

    # What is exported for use elsewhere gives the served answers.
    head = heads.load((Path(spec.out_dir) / HEAD_FILE).read_bytes())
    assert head.decision == spec.decision
    assert head.prior is not None
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    session = OnnxRuntime(Provider("cpu", ""), 2).load(file.read_bytes)
    assert session.precision == "int8"
    composed = file.with_name("composed.onnx")
    composed.write_bytes(exporting.compose(file.read_bytes(), head, {}, DEFAULT_DECODING))
    exported = OnnxRuntime(Provider("cpu", ""), 2).load(composed.read_bytes)
    np.testing.assert_allclose(
        exported.run(pixels), head.probabilities(session.run(pixels)), atol=1e-3
    )


@pytest.mark.usefixtures("small_network")
def test_int8_that_costs_accuracy_is_not_published(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sound = quantise.to_int8
    blind = small_backbone()
    with torch.no_grad():
        blind.stages["top"][0][0].weight.zero_()

    def ruinous(_: Path, images: np.ndarray, out: Path) -> None:
        # Of a network that answers the same whatever it is shown.
        file = out.with_name("blind.onnx")
        export.to_onnx(blind, file)
        sound(file, images, out)
        file.unlink()

    monkeypatch.setattr(quantise, "to_int8", ruinous)
    spec = make_spec(
        make_folder(per_class=8),
        precision="int8",
        method=ModelBased(epochs=1, batch_size=4, learning_rate=1e-3, precision="fp32"),
    )
    manifest = run(spec, told)
    assert manifest.headline is not None
    assert manifest.headline.accuracy == 1.0
    assert manifest.serving_precision == "fp32"
    assert manifest.changed_by_int8 is not None
    assert manifest.changed_by_int8 > quantise.MAX_CHANGED
    assert "int8 would change" in manifest.precision_note
    assert any("int8 would change" in note.text for note in told.of(Note))  # type: ignore[attr-defined]
    # The frozen one is what the head was first fitted on.
    left = {p.name for p in Path(spec.out_dir).glob("*.onnx")}
    assert left == {BACKBONE_FILE, FROZEN_FILE}


@pytest.mark.parametrize(
    ("changed", "images", "good"),
    [(0, 8, True), (1, 8, True), (2, 8, False), (6, 200, True), (7, 200, False)],
)
def test_int8_may_change_one_answer_or_three_in_a_hundred(
    changed: int, images: int, good: bool
) -> None:
    assert quantise.is_good_enough(changed, images) is good


def test_calibration_takes_images_of_every_class(make_folder: MakeFolder) -> None:
    from trainer import data

    loaded = data.load(make_folder(per_class=50), 2)
    order = np.argsort(loaded.train.targets, kind="stable")
    by_class = data.Part(
        tuple(loaded.train.locations[i] for i in order),
        tuple(loaded.train.digests[i] for i in order),
        loaded.train.targets[order],
    )
    chosen = quantise.calibration_images(by_class)
    blue = chosen[..., 2].mean(axis=(1, 2)) > chosen[..., 0].mean(axis=(1, 2))
    assert len(chosen) == 64
    assert blue.sum() == 32
