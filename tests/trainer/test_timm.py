"""Networks of timm's: which there are, what they are made of, and whole jobs on them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from service.backbones import Backbone as Row
from service.backbones import find
from service.contract import (
    BACKBONE_FILE,
    FeatureBased,
    ModelBased,
    PretrainedBackbone,
    RankSpec,
)
from service.engine.runtime import OnnxRuntime, Provider
from service.errors import InvalidInput, Reason
from tests.trainer.conftest import GUARD_S, MakeFolder, MakeSpec, Told, source_of
from trainer import backbones, export, ranking, tails, timm_networks, train
from trainer.backbone_file import BackboneFile

PROVIDERS = [
    "cpu",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
        ),
    ),
]


def load(name: str, folder: Path) -> backbones.Backbone:
    return backbones.load(f"timm/{name}", "random", 0, folder)


def test_every_pretrained_network_of_timms_has_a_name_here() -> None:
    names = timm.list_models(pretrained=True)
    assert len(names) > 1000
    assert [name for name in names if find(f"timm/{name}") is None] == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_tiny_patch16_225", r"no network 'vit_tiny_patch16_225'.*timm/vit_tiny_patch16_224\."),
        ("convnext_atto.in1k", r"no weights 'in1k'.*timm/convnext_atto\.d2_in1k"),
        ("zzz", "see timm.list_models"),
    ],
)
def test_a_name_that_timm_does_not_know_is_told_with_those_near_it(
    tmp_path: Path, name: str, says: str
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        load(name, tmp_path)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "backbone")


def test_timm_says_size_colours_licence_and_the_default_weights() -> None:
    row = find("timm/vit_tiny_patch16_224")
    assert row is not None
    settled = timm_networks.settled(row, "")
    assert settled.network == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert (settled.size, settled.mean, settled.std) == (224, (0.5,) * 3, (0.5,) * 3)
    assert settled.licence == "apache-2.0"
    row = find("timm/vit_small_patch16_dinov3")
    assert row is not None
    assert timm_networks.settled(row, "").licence == "dinov3-license"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ((3, 1056, 1056), "1056 by 1056 pixels with 3"),
        ((3, 28, 28), "28 by 28"),
        ((3, 224, 192), "192 by 224"),
        ((1, 64, 64), "with 1 colours"),
    ],
)
def test_images_that_are_not_decoded_are_refused(
    monkeypatch: pytest.MonkeyPatch, said: tuple[int, int, int], shown: str
) -> None:
    config = timm.get_pretrained_cfg("test_vit")
    config.input_size = said
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _name: config)
    row = Row(name="timm/test_vit", source="timm", network="test_vit", size=0)
    with pytest.raises(InvalidInput, match=shown) as caught:
        timm_networks.settled(row, "")
    assert "32 to 1024" in caught.value.message


def test_a_network_without_pretrained_weights_may_start_from_random_ones(tmp_path: Path) -> None:
    assert not timm.list_models("test_vit_relpos.*", pretrained=True)
    assert load("test_vit_relpos", tmp_path).stage_names[0] == "stem"
    with pytest.raises(InvalidInput, match="no weights for timm/test_vit_relpos: say random"):
        backbones.load("timm/test_vit_relpos", "", 0, tmp_path)


@pytest.mark.parametrize(
    ("name", "blocks", "stages", "tuned_from"),
    [
        # A class token, and the mean of the patches' tokens.
        ("test_vit", [64, 64], ("stem", *(f"block{n}" for n in range(1, 7)), "top"), "block6"),
        # The last layer is that mean already.
        ("test_vit2", [64], ("stem", *(f"block{n}" for n in range(1, 9)), "top"), "block7"),
        ("test_convnext", [64, 24, 32, 48], ("stem", *(f"stage{n}" for n in range(1, 5)), "top"),
         "stage4"),
        ("test_resnet", [96, 32, 48, 192], ("stem", *(f"layer{n}" for n in range(1, 5))), "layer4"),
        ("test_efficientnet", [256, 32, 128, 192],
         ("stem", *(f"stage{n}" for n in range(1, 6)), "top"), "stage4"),
        ("mobilenetv3_small_050", [1024, 72, 288, 288],
         ("stem", *(f"stage{n}" for n in range(1, 7)), "top"), "stage5"),
        # Colours last within: its stages are not images of features.
        ("test_mambaout", [256], ("stem", *(f"stage{n}" for n in range(1, 5)), "top"), "stage4"),
        # Of an unknown kind: the last layer, trained as a whole.
        ("dla46_c", [256], ("",), ""),
    ],
)  # fmt: skip
def test_what_a_network_is_made_of_follows_from_how_it_is_built(
    tmp_path: Path, name: str, blocks: list[int], stages: tuple[str, ...], tuned_from: str
) -> None:
    backbone = load(name, tmp_path)
    assert (backbone.stage_names, backbone.tuned_from) == (stages, tuned_from)
    # Each weight is in one stage, a class token too.
    held = [p for modules in backbone.stages.values() for m in modules for p in m.parameters()]
    assert sorted(map(id, held)) == sorted(map(id, backbone.parameters()))
    with torch.inference_mode():
        features = backbone.eval().all_features(
            torch.zeros(2, backbone.size, backbone.size, 3, dtype=torch.uint8)
        )
    assert [part.shape[1] for part in features] == blocks
    assert backbone.feature_dim == blocks[0]


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "deit_tiny_distilled_patch16_224"])
def test_the_tap_of_a_vit_is_the_mean_of_its_patches(tmp_path: Path, name: str) -> None:
    backbone = load(name, tmp_path).eval()
    trunk = backbone.trunk
    images = torch.randint(0, 256, (2, backbone.size, backbone.size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        last, tap = backbone.all_features(images)
        x = (images.permute(0, 3, 1, 2) - backbone.mean) / backbone.std
        tokens = trunk.forward_features(x)  # type: ignore[operator]
        prefix = trunk.num_prefix_tokens
        assert isinstance(prefix, int) and prefix > 0
        torch.testing.assert_close(tap, tokens[:, prefix:].mean(dim=1))
        assert not torch.allclose(tap, tokens.mean(dim=1))
        torch.testing.assert_close(last, trunk.forward_head(tokens, pre_logits=True))  # type: ignore[operator]


@pytest.mark.parametrize(
    "name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "dla46_c"]
)
def test_a_tuned_tail_serves_beside_the_frozen_network(tmp_path: Path, name: str) -> None:
    frozen, tuned = load(name, tmp_path).eval(), load(name, tmp_path).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.01)
    stage = frozen.tuned_from
    images = torch.randint(0, 256, (2, frozen.size, frozen.size, 3), dtype=torch.uint8)
    split = tails.split(frozen, stage) if stage else None
    # The code of a ViT cannot be read as a graph: it is tuned as a whole, as is what is unknown.
    assert (split is None) == (name in ("test_vit", "dla46_c"))
    with torch.inference_mode():
        if split is not None:
            maps = split.trunk(images).reshape(2, *split.shape)
            torch.testing.assert_close(split.tail(maps), frozen(images))
        if split is not None and (other := tails.split(tuned, stage)) is not None:
            joined = tails.tailed(frozen, stage, other.tail, with_taps=True).eval()
            wanted = other.tail(split.trunk(images).reshape(2, *split.shape))
        else:
            joined = tails.tailed(frozen, frozen.stage_names[0], tuned, with_taps=True).eval()
            wanted = tuned(images)
        found = joined.all_features(images)
        for part, own in zip(found, [*frozen.all_features(images), wanted], strict=True):
            torch.testing.assert_close(part, own)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_convnext", "mobilenetv3_small_050", "test_efficientnet"]
)
def test_the_classifier_is_of_the_last_layers_features(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(2)
    network: nn.Module = timm.create_model(name).eval()
    (tmp_path / "timm").mkdir()
    row = find(f"timm/{name}")
    assert row is not None
    settled = timm_networks.settled(row, "").network
    save_file(network.state_dict(), tmp_path / "timm" / f"{settled}.safetensors")
    backbone = backbones.load(f"timm/{name}", "", 0, tmp_path).eval()
    top = backbones.classifier(f"timm/{name}", "", tmp_path)
    assert top is not None
    images = torch.randint(0, 256, (2, backbone.size, backbone.size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = network((images.permute(0, 3, 1, 2) - backbone.mean) / backbone.std)
        found = backbone(images).numpy() @ top.weight.T + top.bias
    assert np.abs(found - logits.numpy()).max() < 1e-4 * np.abs(found).max()


def test_a_classifier_of_two_layers_is_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "deit_tiny_distilled_patch16_224.fb_in1k"
    (tmp_path / "timm").mkdir()
    state = timm.create_model(name).state_dict()
    save_file(state, tmp_path / "timm" / f"{name}.safetensors")
    assert backbones.classifier(f"timm/{name}", "", tmp_path) is None


Exported = tuple[Path, int, np.ndarray, np.ndarray]
"""A network's ONNX file, its last layer's width, images, and torch's features of them."""


@pytest.fixture(
    scope="module",
    params=["test_vit", "test_convnext", "mobilenetv3_small_050", "dla46_c"],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exports each network once, for every provider."""
    file = tmp_path_factory.mktemp("exported") / "a.onnx"
    backbone = load(request.param, file.parent)
    export.to_onnx(backbone, file)
    shape = (2, backbone.size, backbone.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    features = export.torch_features(backbone, images)
    return file, backbone.feature_dim, images, features


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_serves_gives_torchs_features(exported: Exported, provider: str) -> None:
    path, width, images, trained = exported
    runtime = OnnxRuntime(Provider(provider, ""), 2)
    session = runtime.load(path.read_bytes)
    file = BackboneFile(path, runtime)
    assert (file.size, file.blocks[0]) == (images.shape[1], width)
    for n in (1, 2):
        served = session.run(images[:n])
        assert served.shape == (n, sum(file.blocks)) == (n, trained.shape[1])
        assert np.abs(served - trained[:n]).max() < 1e-4 * np.abs(trained).max()


def test_networks_of_timms_are_ranked_beside_others(
    make_folder: MakeFolder, told: Told, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "weights" / "timm").mkdir(parents=True)
    path = tmp_path / "weights" / "timm" / "test_vit.r160_in1k.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    named = {"timm/test_vit": "", "timm/test_convnext": "random", "timm/test_vitt": ""}
    ranked = ranking.rank(
        RankSpec(
            data=source_of(make_folder(per_class=6)),
            backbones=[PretrainedBackbone(backbone=b, weights=w) for b, w in named.items()],
            weights_dir=str(tmp_path / "weights"),
            time_budget_s=GUARD_S,
            provider="cpu",
            threads=1,
        ),
        told.append,
    )
    rows = {row.backbone: row for row in ranked.ranking}
    vit, convnext, unknown = (rows[name] for name in named)
    assert vit.weights.startswith("r160_in1k@sha256:")
    assert (vit.weights_licence, convnext.weights_licence) == ("apache-2.0", "")
    assert vit.log_me is not None and convnext.log_me is not None
    assert (vit.feature_dim, vit.problem, convnext.problem) == (64, "", "")
    assert "timm has no network 'test_vitt'" in unknown.problem


def test_a_network_of_timms_is_trained(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told
) -> None:
    backbone = "timm/test_vit"  # without a BatchNorm, and of no two parts
    method = ModelBased(epochs=1, batch_size=4, precision="fp32")
    spec = make_spec(make_folder(per_class=6), backbone=backbone, weights="random", method=method)
    manifest = train.run(spec, told.append)
    assert (manifest.backbone, manifest.weights) == (backbone, "random:0")
    assert manifest.weights_licence == ""
    assert manifest.decoding.size == 160
    assert manifest.parity.max_difference < 1e-3
    blocks = BackboneFile(Path(spec.out_dir) / BACKBONE_FILE, OnnxRuntime(Provider("cpu", ""), 1))
    assert manifest.feature_dim in (sum(blocks.blocks), blocks.blocks[0])


def test_a_job_names_the_file_and_the_licence_of_its_weights(
    make_folder: MakeFolder, make_spec: MakeSpec, told: Told, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "weights" / "timm").mkdir(parents=True)
    path = tmp_path / "weights" / "timm" / "test_vit.r160_in1k.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    folder = make_folder(per_class=6)
    spec = make_spec(folder, backbone="timm/test_vit", method=FeatureBased(l2=1e-3))
    manifest = train.run(spec, told.append)
    assert manifest.weights.startswith("r160_in1k@sha256:")
    assert manifest.weights_licence == "apache-2.0"
    page = (Path(spec.out_dir) / "report.html").read_text()
    assert "<dt>licence of the weights it started from</dt> <dd>apache-2.0</dd>" in page
    # Another file under the same name is another backbone.
    save_file(timm.create_model("test_vit").state_dict(), path)
    other = train.run(
        make_spec(
            folder,
            backbone="timm/test_vit",
            method=FeatureBased(l2=1e-3),
            out_dir=str(tmp_path / "other"),
        ),
        told.append,
    )
    assert other.weights != manifest.weights
    assert other.backbone_digest != manifest.backbone_digest
