"""What is kept beside an exported backbone, so that later jobs need no PyTorch."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from service.contract import BACKBONE_FILE, REFERENCE_FILE, ExportedBackbone, FeatureBased, Finished
from service.engine import head as heads
from service.errors import Damaged, GraftError, Reason
from tests.trainer.conftest import MakeFolder, MakeSpec, Told, made_without_torch
from trainer import backbones, export, reference
from trainer.reference import Classifier, Reference
from trainer.train import run


@pytest.fixture
def made() -> Reference:
    features = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    return Reference(
        backbone_digest="ab",
        probes=reference.probe_images(32),
        features=features,
        served=features * np.float32(1.001),
        torch="2.0",
        classifier=Classifier(np.eye(3, 5, dtype=np.float32), np.zeros(3, np.float32)),
    )


def test_probes_differ_from_each_other_and_fill_the_range() -> None:
    probes = reference.probe_images(64)
    assert probes.shape == (8, 64, 64, 3)
    assert len({image.tobytes() for image in probes}) == 8
    assert all(image.std() > 30 and np.ptp(image) > 200 for image in probes)


@pytest.mark.parametrize("has_classifier", [True, False])
def test_a_reference_is_read_as_it_was_written(
    made: Reference, has_classifier: bool, tmp_path: Path
) -> None:
    written = made if has_classifier else replace(made, classifier=None)
    reference.save(written, tmp_path / REFERENCE_FILE)
    read = reference.load(tmp_path / REFERENCE_FILE)
    assert (read.probes == made.probes).all() and (read.features == made.features).all()
    assert read.max_difference == pytest.approx(1e-3, rel=1e-3)
    assert (read.torch, read.name) == ("2.0", made.name)
    assert (read.classifier is not None) == has_classifier
    assert read.backbone_digest == "ab"
    if read.classifier is not None:
        assert read.classifier.sureness(made.features) == pytest.approx(
            made.classifier.sureness(made.features) if made.classifier else 0
        )


def test_a_file_that_is_no_reference_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / REFERENCE_FILE).write_bytes(b"no tensors")
    with pytest.raises(Damaged, match="reference cannot be read"):
        reference.load(tmp_path / REFERENCE_FILE)


def test_few_images_are_asked_of_the_pretrained_classifier_without_torch(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    default_forms: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (digest,) = (form.reference for form in default_forms["exported"] if form.reference)
    kept = reference.load(Path(default_forms["files"][digest]))
    assert kept.classifier is not None and kept.classifier.weight.shape == (1000, 1280)
    assert kept.features.shape[1] > 1280, "middle layers are there to choose"
    asked: list[int] = []
    sureness = Classifier.sureness

    def counted(self: Classifier, features: np.ndarray) -> float:
        asked.append(len(features))
        return sureness(self, features)

    monkeypatch.setattr(Classifier, "sureness", counted)
    spec = make_spec(make_folder(per_class=4), method=FeatureBased(l2=1e-2), **default_forms)
    first = run(spec, told.append)
    assert asked == [8]
    again = msgspec.structs.replace(spec, out_dir=str(tmp_path / "again"))
    manifest = made_without_torch(again, tmp_path)
    assert manifest.hyperparameters == first.hyperparameters
    assert not (tmp_path / "again" / BACKBONE_FILE).exists()


@pytest.mark.usefixtures("small_network")
def test_an_export_that_differs_from_pytorch_is_not_shared(tmp_path: Path) -> None:
    network, file = backbones.load("resnet18", "random", 7, tmp_path), tmp_path / "other.onnx"
    export.to_onnx(backbones.load("resnet18", "random", 8, tmp_path), file)
    with pytest.raises(GraftError, match="differs from PyTorch by") as caught:
        export.checked(network, file, None)
    assert caught.value.reason is Reason.PARITY_FAILED


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    ("is_named", "reason"),
    [(True, Reason.PARITY_FAILED), (False, Reason.MODEL_UNLOADABLE)],
    ids=["serves otherwise", "has another's reference"],
)
def test_a_known_backbone_that_differs_from_its_reference_is_not_published(
    is_named: bool,
    reason: Reason,
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    tmp_path: Path,
) -> None:
    out = tmp_path / "other"
    out.mkdir()
    file, of_it = out / BACKBONE_FILE, out / REFERENCE_FILE
    export.shared(backbones.load("resnet18", "random", 7, tmp_path), None, file, of_it)
    export.to_onnx(backbones.load("resnet18", "random", 8, tmp_path), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if is_named:
        reference.save(replace(reference.load(of_it), backbone_digest=digest), of_it)
    spec = make_spec(
        make_folder(per_class=5),
        method=FeatureBased(l2=1e-3),
        backbone="resnet18",
        weights="random",
        exported=[ExportedBackbone("random:0", digest, reference="of it")],
        files={digest: str(file), "of it": str(of_it)},
    )
    with pytest.raises(GraftError) as caught:
        run(spec, told.append)
    assert caught.value.reason is reason


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    "changes",
    [{"temperature": 9.0}, {"classes": ("red", "blue")}, {"bias": np.float32([1, -1])}],
    ids=["temperature", "classes", "bias"],
)
def test_a_head_whose_file_answers_otherwise_is_not_published(
    changes: dict[str, Any],
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = heads.save
    monkeypatch.setattr(heads, "save", lambda head, path: save(replace(head, **changes), path))
    spec = make_spec(make_folder(), method=FeatureBased(l2=1e-3), weights="random")
    with pytest.raises(GraftError, match="head's file answers otherwise") as caught:
        run(spec, told.append)
    assert caught.value.reason is Reason.PARITY_FAILED
    assert not told.of(Finished)
