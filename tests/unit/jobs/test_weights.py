"""A request whose weights are not available is refused before a job is made."""

import threading
from pathlib import Path

import pytest

from service.errors import InvalidInput, Reason, WrongState
from service.jobs import weights
from service.jobs.contract import (
    Auto,
    DomainAdaptation,
    ExportedBackbone,
    FeatureBased,
    Method,
    ModelBased,
)
from service.jobs.weights import WeightsCheck, check_name


def none(_backbone: str) -> list[ExportedBackbone]:
    return []


def exported(backbone: str) -> list[ExportedBackbone]:
    return [ExportedBackbone("IMAGENET1K_V1", f"/{backbone}.onnx", "d" * 64)]


class Network:
    """A host that can be reached or not, and how often that was looked at."""

    def __init__(self, *, is_there: bool) -> None:
        self.is_there, self.asked = is_there, 0

    def __call__(self, host: str) -> bool:
        assert host == weights.HOST
        self.asked += 1
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
        assert network.asked == 1


def test_behind_a_proxy_nothing_is_looked_at(tmp_path: Path) -> None:
    network = Network(is_there=False)
    check = WeightsCheck(tmp_path, may_connect=False, is_reachable=network)
    assert not refused(check, FeatureBased())
    assert network.asked == 0


def test_weights_that_come_with_a_package_need_no_network(tmp_path: Path) -> None:
    network = Network(is_there=False)
    check = WeightsCheck(tmp_path, is_reachable=network)
    check.check("efficientnet_lite0", "", ModelBased(), none)
    check.check("resnet18", "random", ModelBased(), none)
    assert network.asked == 0


def test_a_look_that_never_ends_counts_as_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def hang(*_: object) -> None:
        never.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr(weights, "_CONNECT_S", 0.01)
    monkeypatch.setattr(weights.socket, "create_connection", hang)
    assert not weights.reachable("graft.example")
    never.set()


@pytest.mark.parametrize(
    ("backbone", "name", "is_known"),
    [
        ("resnet18", "", True),
        ("resnet18", "random", True),
        ("resnet18", "IMAGENET1K_V1", True),
        ("resnet18", "IMAGENET1K_V2", False),
        ("resnet50", "IMAGENET1K_V2", True),
        ("efficientnet_lite0", "IMAGENET1K_V1", False),
    ],
)
def test_weights_are_called_by_names_that_they_have(
    backbone: str, name: str, is_known: bool
) -> None:
    if is_known:
        check_name(backbone, name)
        return
    with pytest.raises(InvalidInput, match="has no weights"):
        check_name(backbone, name)
