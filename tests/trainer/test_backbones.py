"""Networks by name, where their weights come from, and what they become in ONNX."""

import hashlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from service.backbones import BACKBONES
from service.domain import ImageDecoding
from service.engine import preprocess
from service.engine.runtime import OnnxRuntime, Provider
from service.errors import InvalidInput, Reason, WrongState
from tests import photographs
from tests.trainer.conftest import GUARD_S
from trainer import backbones, download, export, liveness
from trainer.backbone_file import BackboneFile
from trainer.parts import parts


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def images(n: int = 3, size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "blocks", "stages"),
    [
        ("resnet18", [512, 64, 128, 256], ("stem", "layer1", "layer2", "layer3", "layer4")),
        # Of another size. The default's export is checked whenever it is prepared.
        (
            "efficientnet_lite2",
            [1280, 720, 1248, 1248],
            ("stem", *(f"stage{i}" for i in range(1, 8)), "top"),
        ),
    ],
)
def test_a_backbone_and_its_onnx_file_give_the_same_features(
    name: str, blocks: list[int], stages: tuple[str, ...], tmp_path: Path
) -> None:
    backbone = backbones.load(name, "random", 3, tmp_path)
    assert (backbone.feature_dim, backbone.stage_names) == (blocks[0], stages)
    export.to_onnx(backbone, tmp_path / "a.onnx")
    runtime = OnnxRuntime(Provider("cpu", ""), 2)
    session = runtime.load((tmp_path / "a.onnx").read_bytes)
    assert BackboneFile(tmp_path / "a.onnx", runtime).blocks == tuple(blocks)
    pixels = images(2, session.size)
    trained = export.torch_features(backbone, pixels)
    for n in (1, 2):
        served = session.run(pixels[:n])
        assert served.shape == (n, sum(blocks))
        assert np.abs(served - trained[:n]).max() < 1e-4 * np.abs(trained).max()


def test_the_padding_of_an_exported_backbone_is_numbers(tmp_path: Path) -> None:
    import onnx

    backbone = backbones.load("efficientnet_lite0", "random", 3, tmp_path)
    export.to_onnx(backbone, tmp_path / "a.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
    assert "Pad" in operators
    # Of what reckons it from the size of a map.
    assert not operators & {"Shape", "Ceil", "Gather"}
    # What was exported goes on as it was: images of any size.
    assert backbone(torch.zeros(1, 96, 96, 3, dtype=torch.uint8)).shape == (1, 1280)


def test_random_weights_follow_the_seed_and_export_to_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for seed in (1, 1, 2):
        path = tmp_path / "a.onnx"
        export.to_onnx(backbones.load("timm/test_resnet", "random", seed, tmp_path), path)
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_a_row_of_the_table_is_as_its_network_is_built(tmp_path: Path) -> None:
    for name, row in BACKBONES.items():
        backbone = backbones.load(name, "random", 0, tmp_path)
        made_of = parts(backbone.trunk)
        assert (*made_of.stages,) == backbone.stage_names == row.stages
        assert (made_of.taps, made_of.tuned_from) == (row.taps, row.tuned_from)
        held = [
            id(p) for modules in backbone.stages.values() for m in modules for p in m.parameters()
        ]
        assert sorted(held) == sorted(id(p) for p in backbone.parameters())


def test_the_files_of_weights_are_torchvisions() -> None:
    from torchvision import models

    rows = [row for row in BACKBONES.values() if row.source == "torchvision"]
    assert rows
    for row in rows:
        known = list(models.get_model_weights(row.network))
        assert [(w.name, w.url) for w in known] == [
            (name, f"https://download.pytorch.org/models/{file}")
            for name, file in row.weights.items()
        ]


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="resnet18"):
        backbones.load("vgg16", "", 0, tmp_path)
    with pytest.raises(InvalidInput, match="IMAGENET1K_V1"):
        backbones.load("resnet18", "IMAGENET99", 0, tmp_path)


@pytest.mark.usefixtures("no_network")
def test_weights_that_cannot_be_had_name_the_file_and_its_folder(tmp_path: Path) -> None:
    with pytest.raises(WrongState) as caught:
        backbones.load("resnet18", "", 0, tmp_path / "mirror")
    assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE
    assert "resnet18-f37072fd.pth" in caught.value.message
    assert str(tmp_path / "mirror") in caught.value.message
    assert not list((tmp_path / "mirror").iterdir())


@pytest.mark.usefixtures("no_network")
def test_a_mirror_is_used_without_network_when_its_hash_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    torch.manual_seed(9)
    network = models.resnet18(weights=None)
    unnamed = tmp_path / "weights"
    torch.save(network.state_dict(), unnamed)
    digest = hashlib.sha256(unnamed.read_bytes()).hexdigest()
    name = f"resnet18-{digest[:8]}.pth"
    unnamed.rename(tmp_path / name)
    # The published file cannot be had here; one that is named by its own hash stands in.
    row = replace(BACKBONES["resnet18"], weights={"IMAGENET1K_V1": name})
    monkeypatch.setitem(BACKBONES, "resnet18", row)
    loaded = backbones.load("resnet18", "", 0, tmp_path)
    own = dict(loaded.trunk.state_dict())
    assert torch.equal(own["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])


def test_a_download_that_never_ends_is_given_up_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ends = threading.Event(), threading.Event()

    def look_up(*_: object, **__: object) -> None:
        begun.set()
        ends.wait(GUARD_S)

    monkeypatch.setattr(download, "LIMIT_S", 0.01)
    # As the look-up of a name, which no timeout of a socket reaches.
    monkeypatch.setattr(torch.hub, "download_url_to_file", look_up)
    try:
        with pytest.raises(WrongState, match=r"did not end within 0.01 s.*put the file") as caught:
            backbones.load("resnet18", "", 0, tmp_path)
    finally:
        # Its thread may begin late, and must not call what the next test puts there.
        assert begun.wait(GUARD_S)
        ends.set()
    assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE


def test_a_trainer_is_not_taken_for_hanging_while_it_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def wait_for_network(*_: object, **__: object) -> None:
        seen.append(liveness._is_waiting())
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", wait_for_network)
    with pytest.raises(WrongState):
        backbones.load("resnet18", "", 0, tmp_path)
    assert seen == [True]
    assert not liveness._is_waiting()


def test_weights_that_were_downloaded_may_be_read_by_servers_of_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(url: str, path: str, **_: object) -> None:
        Path(path).touch(mode=0o600)

    monkeypatch.setattr(torch.hub, "download_url_to_file", write)
    download.download("https://example.invalid/w", tmp_path / "w", "00")
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("what", ["open", "stat"])
def test_weights_that_another_user_keeps_to_itself_are_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "resnet18-f37072fd.pth").touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, what, refuse)
    for use in (
        lambda: backbones.load("resnet18", "", 0, tmp_path),
        lambda: backbones.classifier("resnet18", "", tmp_path),
    ):
        with pytest.raises(WrongState, match=r"may not read.*chmod a\+rX") as caught:
            use()
        assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE


@pytest.mark.usefixtures("no_network")
def test_a_mirrored_file_with_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "resnet18-f37072fd.pth").write_bytes(b"something else")
    with pytest.raises(WrongState, match="not what its name says"):
        backbones.load("resnet18", "", 0, tmp_path)


def test_freezing_reaches_the_stages_before_the_named_one(tmp_path: Path) -> None:
    backbone = backbones.load("resnet18", "random", 0, tmp_path)
    frozen = {id(p) for m in backbone.frozen_modules("layer3") for p in m.parameters()}
    trunk = backbone.trunk
    assert id(trunk.conv1.weight) in frozen
    assert id(trunk.layer2[0].conv1.weight) in frozen
    assert id(trunk.layer3[0].conv1.weight) not in frozen
    with pytest.raises(InvalidInput, match="layer1"):
        backbone.frozen_modules("stage1")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_the_packages_weights_tell_ants_from_bees_as_they_did_in_imagenet(
    name: str, tmp_path: Path
) -> None:
    folder = photographs.folder("hymenoptera_data") / "val"
    backbone = backbones.load(name, "", 0, tmp_path)
    top = backbones.classifier(name, "", tmp_path)
    assert top is not None
    # By their places among ImageNet's thousand classes.
    classes = {"ants": 310, "bees": 309}
    rights, pairs = [], []
    for label, place in classes.items():
        photos = sorted((folder / label).iterdir())[:8]
        decoding = ImageDecoding(size=backbone.size)
        pixels = np.stack([preprocess.decode(photo.read_bytes(), decoding) for photo in photos])
        features = export.torch_features(backbone, pixels)[:, : backbone.feature_dim]
        logits = features @ top.weight.T + top.bias
        rights += list(logits.argmax(axis=1) == place)
        pairs += list(logits[:, place] == logits[:, list(classes.values())].max(axis=1))
    # 83 to 89 % and 97 to 99 % of all 153; by chance one of a thousand and a half.
    assert np.mean(rights) > 0.6
    assert np.mean(pairs) > 0.9


def test_the_pretrained_classifier_is_what_the_checkpoint_holds(tmp_path: Path) -> None:
    top = backbones.classifier("efficientnet_lite0", "", tmp_path)
    assert top is not None
    assert (top.weight.shape, top.bias.shape) == ((1000, 1280), (1000,))
    assert backbones.classifier("efficientnet_lite0", "random", tmp_path) is None
    # Not here, and not downloaded for this.
    assert backbones.classifier("resnet18", "", tmp_path) is None
