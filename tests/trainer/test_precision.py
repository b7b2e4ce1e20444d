"""The precision of a version: settled by its job, written in its file, kept by every machine."""

from pathlib import Path
from typing import Any

import pytest

from service.contract import (
    BACKBONE_FILE,
    DEFAULT_BACKBONE,
    REFERENCE_FILE,
    Auto,
    ExportedBackbone,
    JobSpec,
    ModelBased,
    PretrainedBackbone,
)
from service.engine import providers, timing
from service.engine.runtime import precision_of
from service.errors import Reason, WrongState
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from trainer import export, train
from trainer.job import Job

needs_openvino = pytest.mark.skipif(
    bool(providers.openvino_problem()), reason="OpenVINO is not installed"
)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with matrix units; OpenVINO computes with what this one has."""
    monkeypatch.setattr(providers, "has_amx", lambda: True)
    # Else jobs on what holds in int8 take that.
    monkeypatch.setattr(providers, "has_vnni", lambda: False)


@needs_openvino
@pytest.mark.usefixtures("amx", "small_network")
@pytest.mark.parametrize("pays", [True, False])
def test_where_the_cpu_has_units_for_bf16_it_is_taken_if_it_is_measured_to_pay(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pays: bool,
) -> None:
    measured: list[bytes] = []

    def bf16_pays(model: bytes) -> bool:
        measured.append(model)
        return pays

    monkeypatch.setattr(timing, "bf16_pays", bf16_pays)
    expected = "bf16" if pays else "fp32"
    folder = make_folder()
    asked = {"precision": "auto", "provider": "openvino"}
    spec = make_spec(folder, **asked)
    manifest = train.run(spec, Told().append)
    file = Path(spec.out_dir) / BACKBONE_FILE
    assert manifest.serving_precision == manifest.precision == expected
    assert precision_of(file.read_bytes()) == expected
    assert len(measured) == 1
    # The next job works with the same file, which is not measured again if it is for bf16.
    name = manifest.weights + (":bf16" if pays else "")
    known = ExportedBackbone(name, manifest.backbone_digest, reference=manifest.reference_digest)
    files = {known.digest: str(file), known.reference: str(file.with_name(REFERENCE_FILE))}
    again = make_spec(
        folder, **asked, out_dir=str(tmp_path / "again"), exported=[known], files=files
    )
    manifest = train.run(again, Told().append)
    assert manifest.backbone_digest == known.digest
    assert len(measured) == 1 + (not pays)


@needs_openvino
@pytest.mark.usefixtures("amx", "small_network")
def test_a_form_in_bf16_is_made_of_the_one_in_fp32_without_a_network(
    make_folder: MakeFolder, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    spec = make_spec(folder)
    plain = train.run(spec, Told().append)
    file = Path(spec.out_dir) / BACKBONE_FILE
    known = ExportedBackbone(plain.weights, plain.backbone_digest, reference=plain.reference_digest)
    monkeypatch.setattr(export, "to_onnx", pytest.fail)
    other = make_spec(
        folder,
        precision="bf16",
        provider="openvino",
        out_dir=str(tmp_path / "bf16"),
        exported=[known],
        files={known.digest: str(file), known.reference: str(file.with_name(REFERENCE_FILE))},
    )
    manifest = train.run(other, Told().append)
    made = (Path(other.out_dir) / BACKBONE_FILE).read_bytes()
    assert manifest.serving_precision == "bf16"
    assert made.startswith(file.read_bytes())
    assert manifest.backbone_digest != known.digest


@needs_openvino
@pytest.mark.usefixtures("amx", "small_network")
def test_a_trained_network_is_made_for_the_precision_too(
    make_folder: MakeFolder, make_spec: MakeSpec
) -> None:
    spec = make_spec(
        make_folder(),
        method=ModelBased(epochs=1, batch_size=4, precision="fp32"),
        backbone="resnet18",
        precision="bf16",
        provider="openvino",
    )
    manifest = train.run(spec, Told().append)
    assert manifest.serving_precision == "bf16"
    assert precision_of((Path(spec.out_dir) / BACKBONE_FILE).read_bytes()) == "bf16"


@pytest.mark.parametrize(("asked", "needed"), [("bf16", "AMX"), ("fp16", "GPU")])
def test_a_precision_that_this_machine_does_not_compute_in_is_refused(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    needed: str,
) -> None:
    monkeypatch.setattr(providers, "has_amx", lambda: False)
    spec: JobSpec = make_spec(make_folder(), precision=asked, provider="cpu")
    with pytest.raises(WrongState, match=needed) as refused:
        train.run(spec, Told().append)
    assert refused.value.reason == Reason.DEVICE_UNAVAILABLE


@needs_openvino
def test_training_is_estimated_in_fp32_where_int8_serves_and_no_form_in_bf16_is_made_for_it(
    make_spec: MakeSpec,
    default_forms: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "has_amx", lambda: True)
    monkeypatch.setattr(providers, "has_vnni", lambda: True)
    monkeypatch.setattr(timing, "bf16_pays", pytest.fail)
    spec = make_spec(
        tmp_path, method=Auto(), backbone=DEFAULT_BACKBONE, weights="", precision="auto",
        provider="auto", **default_forms,
    )  # fmt: skip
    job = Job(spec, Told().append)
    job.start_from(PretrainedBackbone(backbone=spec.backbone, exported=spec.exported))
    assert job.floating is not job.frozen
    session = job.timed_session()
    assert (session.precision, session.made_for) == ("fp32", "fp32")
    assert not Path(spec.out_dir).exists()
