"""A request whose weights are not available is refused before a job is made."""

import threading
from pathlib import Path

import pytest

from service.contract import (
    Auto,
    DomainAdaptation,
    ExportedBackbone,
    FeatureBased,
    Method,
    ModelBased,
)
from service.errors import Reason, WrongState
from service.jobs import weights
from service.jobs.weights import WeightsCheck


def none(_backbone: str) -> list[ExportedBackbone]:
    return []


def exported(backbone: str) -> list[ExportedBackbone]:
    return [ExportedBackbone("IMAGENET1K_V1", "d" * 64)]


class Network:
    """A host that can be reached or not, and how often that was looked at."""

    def __init__(self, *, is_there: bool) -> None:
        self.is_there, self.asked = is_there, list[str]()

    def __call__(self, host: str) -> bool:
        self.asked.append(host)
        return self.is_there


def refused(check: WeightsCheck, method: Method, forms: weights.Exports = none) -> bool:
    try:
        check.check("resnet18", "", method, forms)
    except WrongState:
        return True
    return False


def test_what_to_do_is_said(tmp_path: Path) -> None:
    check = WeightsCheck(tmp_path, is_reachable=Network(is_there=False))
    with pytest.raises(WrongState, match=r"resnet18-f37072fd\.pth.*efficientnet_lite0") as caught:
        check.check("resnet18", "", FeatureBased(), none)
    assert (caught.value.reason, caught.value.field) == (Reason.WEIGHTS_UNAVAILABLE, "backbone")


@pytest.mark.parametrize(
    ("method", "forms", "is_refused"),
    [
        (FeatureBased(), none, True),
        (ModelBased(), none, True),
        (FeatureBased(), exported, False),
        (DomainAdaptation(technique="coral"), exported, False),
        (DomainAdaptation(technique="cdan"), exported, True),
        (ModelBased(), exported, True),
        (Auto(), none, True),
        (Auto(), exported, False),
    ],
)
def test_an_exported_backbone_is_enough_where_it_is_not_trained(
    tmp_path: Path, method: Method, forms: weights.Exports, is_refused: bool
) -> None:
    check = WeightsCheck(tmp_path, is_reachable=Network(is_there=False))
    assert refused(check, method, forms) == is_refused
    (tmp_path / "resnet18-f37072fd.pth").touch()
    assert not refused(check, method, forms)


def test_the_network_is_looked_at_once_for_a_while(tmp_path: Path) -> None:
    there, away = Network(is_there=True), Network(is_there=False)
    for network in (there, away):
        check = WeightsCheck(tmp_path, is_reachable=network)
        assert [refused(check, FeatureBased()) for _ in range(3)] == [not network.is_there] * 3
        assert network.asked == ["download.pytorch.org"]


def test_behind_a_proxy_nothing_is_looked_at(tmp_path: Path) -> None:
    network = Network(is_there=False)
    check = WeightsCheck(tmp_path, may_connect=False, is_reachable=network)
    assert not refused(check, FeatureBased())
    assert not network.asked


def test_weights_that_come_with_a_package_need_no_network(tmp_path: Path) -> None:
    network = Network(is_there=False)
    check = WeightsCheck(tmp_path, is_reachable=network)
    check.check("efficientnet_lite0", "", ModelBased(), none)
    check.check("resnet18", "random", ModelBased(), none)
    assert not network.asked


def test_a_look_that_never_ends_counts_as_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def hang(*_: object) -> None:
        never.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr(weights, "_CONNECT_S", 0.01)
    monkeypatch.setattr(weights.socket, "create_connection", hang)
    assert not weights.reachable("graft.example")
    never.set()


@pytest.mark.parametrize("weights_there", ["timm/vit_tiny_patch16_224.dino.safetensors", ""])
def test_timms_weights_lie_in_the_folder_or_come_from_the_hub(
    tmp_path: Path, weights_there: str
) -> None:
    away = Network(is_there=False)
    check = WeightsCheck(tmp_path, is_reachable=away)
    if weights_there:
        (tmp_path / "timm").mkdir()
        (tmp_path / weights_there).touch()
    for name, is_there in (
        ("timm/vit_tiny_patch16_224", bool(weights_there)),
        ("timm/vit_tiny_patch16_224.dino", bool(weights_there)),
        ("timm/vit_tiny_patch16_224.other", False),
    ):
        if is_there:
            check.check(name, "", ModelBased(), none)
            continue
        tag = name.partition(".")[2] or "TAG"
        with pytest.raises(
            WrongState, match=rf"as timm/vit_tiny_patch16_224\.{tag}\.saf"
        ) as caught:
            check.check(name, "", ModelBased(), none)
        assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE
    assert away.asked == ["huggingface.co"]
    check.check("timm/vit_tiny_patch16_224", "random", ModelBased(), none)


def test_a_file_of_weights_must_lie_in_the_folder(tmp_path: Path) -> None:
    network = Network(is_there=True)
    check = WeightsCheck(tmp_path, is_reachable=network)
    with pytest.raises(WrongState, match=r"no file own\.pth") as caught:
        check.check("resnet18", "file:own.pth", FeatureBased(), exported)
    assert (caught.value.reason, caught.value.field) == (Reason.WEIGHTS_UNAVAILABLE, "weights")
    (tmp_path / "own.pth").touch()
    check.check("resnet18", "file:own.pth", FeatureBased(), none)
    check.check("resnet18", "file:own.pth@sha256:0123456789abcdef", FeatureBased(), none)
    assert not network.asked


def test_only_backbones_of_the_table_whose_default_weights_are_here_are_available(
    tmp_path: Path,
) -> None:
    (tmp_path / "timm").mkdir()
    for file in ("resnet34-b627a593.pth", "resnet50-11ad3fa6.pth", "timm/vit.dino.safetensors"):
        (tmp_path / file).touch()
    names = [pretrained.backbone for pretrained in weights.available(tmp_path, exported)]
    assert names == [*(f"efficientnet_lite{n}" for n in range(3)), "resnet34"]
