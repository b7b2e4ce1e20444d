"""Weights from files of the operator's, and from the Hugging Face Hub."""

import hashlib
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import nn

from service.errors import InvalidInput, Reason, WrongState
from tests.architecture.test_outside_data import Evil
from tests.trainer.conftest import GUARD_S
from trainer import backbones, download
from trainer.weights import Weights

VIT = "test_vit.r160_in1k"


@cache
def resnet(classes: int = 1000) -> dict[str, torch.Tensor]:
    from torchvision import models

    torch.manual_seed(4)
    state: dict[str, torch.Tensor] = models.resnet18(num_classes=classes).state_dict()
    return state


def written(path: Path, state: dict[str, torch.Tensor]) -> str:
    """Returns the beginning of the file's sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@pytest.mark.parametrize(("suffix", "classes"), [("pth", 1000), ("safetensors", 7)])
def test_a_file_fills_a_network_and_its_head_is_left_out(
    tmp_path: Path, suffix: str, classes: int
) -> None:
    state = resnet(classes)
    digest = written(tmp_path / f"own.{suffix}", state)
    backbone = backbones.load("resnet18", f"file:own.{suffix}", 0, tmp_path)
    own = backbone.trunk.state_dict()
    assert set(state) - set(own) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], state[name]) for name in own)
    asked = Weights("resnet18", f"file:own.{suffix}", 0, tmp_path)
    name = f"file:own.{suffix}@sha256:{digest}"
    assert (asked.name, asked.licence) == (name, "not known")
    assert backbones.classifier("resnet18", f"file:own.{suffix}", tmp_path) is None
    # As a manifest has it, no other file is taken.
    backbones.load("resnet18", name, 0, tmp_path)
    written(tmp_path / f"own.{suffix}", {**state, "bn1.weight": torch.zeros(64)})
    with pytest.raises(WrongState, match=f"not with {digest}"):
        backbones.load("resnet18", name, 0, tmp_path)
    assert asked.name != name


def test_a_file_may_wrap_its_tensors_as_training_scripts_do(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in resnet().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "own.pth")
    backbone = backbones.load("resnet18", "file:own.pth", 0, tmp_path)
    assert torch.equal(backbone.trunk.state_dict()["bn1.weight"], state["module.bn1.weight"])


def test_a_file_fits_networks_of_packages_and_of_timms(tmp_path: Path) -> None:
    for backbone, network in (
        ("efficientnet_lite0", "tf_efficientnet_lite0"),
        ("timm/test_vit", "test_vit"),
        ("timm/test_convnext.r160_in1k", "test_convnext"),
    ):
        state = timm.create_model(network, num_classes=5).state_dict()
        written(tmp_path / "own.safetensors", state)
        own = backbones.load(backbone, "file:own.safetensors", 0, tmp_path).trunk.state_dict()
        assert len(own) == len(state) - 2
        assert all(torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bn1.weight": None}, r"missing: bn1\.weight"),
        ({"bn1.weight": torch.zeros(65)}, r"shape: bn1\.weight \(\[65\] instead of \[64\]\)"),
        ({"layer1.2.conv1.weight": torch.zeros(3)}, r"unknown: layer1\.2\.conv1\.weight"),
        ({f"layer{n}.0.bn1.bias": None for n in range(1, 5)} | {"bn1.weight": None,
         "bn1.bias": None}, r"layer3\.0\.bn1\.bias and 1 more"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], says: str
) -> None:
    state = {name: tensor for name, tensor in (resnet() | change).items() if tensor is not None}
    written(tmp_path / "own.pth", state)
    with pytest.raises(InvalidInput, match=says) as caught:
        backbones.load("resnet18", "file:own.pth", 0, tmp_path)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "weights")


@pytest.mark.parametrize("name", ["own.pth", "own.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\3\4junk", b"{}", save({})])
def test_a_file_that_holds_no_tensors_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((WrongState, InvalidInput), match=r"holds no tensors|missing: conv1"):
        backbones.load("resnet18", f"file:{name}", 0, tmp_path)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    torch.save({"fc.weight": Evil(proof)}, tmp_path / "own.pth")
    with pytest.raises(WrongState, match="holds no tensors by name"):
        backbones.load("resnet18", "file:own.pth", 0, tmp_path)
    assert not proof.exists()


def test_a_file_that_is_not_there_is_told_with_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(WrongState, match=rf"no file own\.pth in .*{tmp_path}") as caught:
        backbones.load("resnet18", "file:own.pth", 0, tmp_path)
    assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE
    assert not Weights("resnet18", "file:own.pth", 0, tmp_path).is_available()


class Hub:
    """The Hugging Face Hub with one repository."""

    def __init__(self, repository: str, content: bytes) -> None:
        self.content = content
        self.etag = hashlib.sha256(content).hexdigest()
        self.size = len(content)
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                revision = self.path.removeprefix(f"/{repository}/resolve/").partition("/")[0]
                is_there = self.path == f"/{repository}/resolve/{revision}/model.safetensors"
                self.send_response(200 if is_there and revision in ("main", "c0ffee") else 404)
                self.send_header("ETag", f'"{hub.etag}"')
                self.send_header("X-Repo-Commit", "c0ffee")
                self.send_header("Content-Length", str(hub.size))
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                self.wfile.write(hub.content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(5)
    network: nn.Module = timm.create_model(VIT, pretrained=False)
    return network


@pytest.fixture
def hub(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub(f"timm/{VIT}", save(vit.state_dict()))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,))
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def test_timms_weights_are_downloaded_once_and_named_by_their_digest(
    tmp_path: Path, hub: Hub, vit: nn.Module
) -> None:
    asked = Weights("timm/test_vit", "", 0, tmp_path)
    assert (asked.name, asked.is_available()) == ("r160_in1k", False)
    assert backbones.classifier("timm/test_vit", "", tmp_path) is None
    assert not hub.asked
    backbone = backbones.load("timm/test_vit", "", 0, tmp_path)
    own, state = backbone.trunk.state_dict(), vit.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    path = tmp_path / "timm" / f"{VIT}.safetensors"
    assert path.read_bytes() == hub.content
    assert hub.asked == [
        f"HEAD /timm/{VIT}/resolve/main/model.safetensors",
        f"GET /timm/{VIT}/resolve/c0ffee/model.safetensors",
    ]
    for name, weights in ((VIT, ""), ("test_vit", "r160_in1k"), (VIT, f"{asked.name}")):
        again = Weights(f"timm/{name}", weights, 0, tmp_path)
        assert again.name == f"r160_in1k@sha256:{hub.etag[:16]}"
        assert again.licence == "apache-2.0"
    top = backbones.classifier("timm/test_vit", "", tmp_path)
    assert top is not None
    assert torch.equal(torch.from_numpy(top.weight), state["head.weight"])
    assert len(hub.asked) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"etag": "0" * 64}, "invalid hash value"),
        ({"etag": "0" * 40}, "tells no sha256"),
        ({"content": b"short"}, "invalid hash value"),
    ],
)
def test_a_download_that_is_not_what_the_hub_says_is_thrown_away(
    tmp_path: Path, hub: Hub, changes: dict[str, object], says: str
) -> None:
    for name, value in changes.items():
        setattr(hub, name, value)
    with pytest.raises(WrongState, match=says) as caught:
        backbones.load("timm/test_vit", "", 0, tmp_path)
    assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE
    assert not list((tmp_path / "timm").iterdir())


def test_weights_that_no_onnx_file_holds_are_refused_before_they_are_downloaded(
    tmp_path: Path, hub: Hub
) -> None:
    hub.size = download.MAX_HUB_BYTES
    with pytest.raises(InvalidInput, match="choose a smaller one"):
        backbones.load("timm/test_vit", "", 0, tmp_path)
    assert len(hub.asked) == 1


def test_weights_that_the_hub_does_not_have_name_the_file_and_where_it_belongs(
    tmp_path: Path, hub: Hub
) -> None:
    with pytest.raises(WrongState) as caught:
        backbones.load("timm/test_convnext", "", 0, tmp_path)
    assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE
    assert f"test_convnext.r160_in1k.safetensors are not in {tmp_path / 'timm'}" in str(
        caught.value
    )
    assert f"{hub.url}/timm/test_convnext.r160_in1k/resolve/main/model.safetensors" in str(
        caught.value
    )


def test_timms_weights_in_a_mirror_need_no_network_but_must_fit(
    tmp_path: Path, vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        pytest.fail("it was downloaded")

    monkeypatch.setattr(download, "_within_limit", never)
    path = tmp_path / "timm" / f"{VIT}.safetensors"
    state = vit.state_dict()
    written(path, state)
    own = backbones.load("timm/test_vit", "", 0, tmp_path).trunk.state_dict()
    assert torch.equal(own["cls_token"], state["cls_token"])
    written(path, {name: tensor for name, tensor in state.items() if name != "cls_token"})
    with pytest.raises(WrongState, match=rf"do not fit timm/test_vit.*cls_token.*delete {path}"):
        backbones.load("timm/test_vit", "", 0, tmp_path)


def test_a_download_that_takes_too_long_is_let_go_and_its_error_is_passed_on() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError):
        download.within(0.05, lambda: release.wait(GUARD_S))
    release.set()
    download.within(GUARD_S, lambda: None)

    def fail() -> None:
        raise WrongState(Reason.WEIGHTS_UNAVAILABLE, "no network")

    with pytest.raises(WrongState, match="no network"):
        download.within(GUARD_S, fail)
