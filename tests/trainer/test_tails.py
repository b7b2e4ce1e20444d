"""Networks in two parts, and two tails on one trunk."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from service.engine.head import Head
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from tests.trainer.small_network import small_backbone
from trainer import backbones, export, tails
from trainer.backbone_file import BackboneFile
from trainer.backbones import Backbone


def images(n: int = 3, size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "stage", "shape"),
    [
        # Before the last stage, and after the first.
        ("resnet18", "layer4", (256, 14, 14)),
        ("timm/test_efficientnet", "top", (64, 5, 5)),
        ("timm/test_resnet", "layer1", (32, 40, 40)),
    ],
)
def test_both_parts_one_after_the_other_are_the_whole(
    name: str, stage: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    backbone = backbones.load(name, "random", 3, tmp_path).eval()
    split = tails.split(backbone, stage)
    assert split is not None
    assert split.shape == shape
    pixels = images(size=backbone.size)
    export.to_onnx(split.trunk, tmp_path / "trunk.onnx")
    served = (
        OnnxRuntime(Provider("cpu", ""), 1).load((tmp_path / "trunk.onnx").read_bytes).run(pixels)
    )
    with torch.inference_mode():
        whole = backbone(torch.from_numpy(pixels))
        maps = split.trunk(torch.from_numpy(pixels))
        parts = split.tail(maps.reshape(-1, *shape))
        from_kept = split.tail(torch.from_numpy(served.astype(np.float16)).float().view(-1, *shape))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    # As it is learned from: by what serves, kept in half precision.
    scale = float(whole.abs().max())
    torch.testing.assert_close(from_kept, whole, rtol=1e-2, atol=5e-3 * scale)
    # What is trained is the network itself.
    own = {id(p) for p in backbone.parameters()}
    tail = {id(p) for p in split.tail.parameters()}
    before = {id(p) for module in backbone.frozen_modules(stage) for p in module.parameters()}
    assert tail == own - before


class Skipping(nn.Module):
    """Adds what its first stage gives to what its last one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.top = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.stem(x)
        return (self.top(self.middle(first)) + first).mean(dim=(2, 3))


class Asking(nn.Module):
    """Computes by what its images are, which no graph can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.top = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (self.top(x) if x.sum() > 0 else x).mean(dim=(2, 3))


@pytest.mark.parametrize(("kind", "stage"), [(Skipping, "top"), (Asking, "top"), (Asking, "no")])
def test_a_network_that_has_no_two_parts_is_not_parted(kind: type[nn.Module], stage: str) -> None:
    trunk = kind()
    stages = {name: [module] for name, module in trunk.named_children()}
    half = (0.5, 0.5, 0.5)
    assert tails.split(Backbone(trunk, stages, 3, half, half), stage) is None


def test_what_skips_into_the_frozen_part_alone_is_parted() -> None:
    trunk = Skipping()
    half = (0.5, 0.5, 0.5)
    backbone = Backbone(trunk, {"stem": [trunk.stem], "middle": [trunk.middle]}, 3, half, half)
    split = tails.split(backbone, "middle")
    # Both branches begin with the same maps.
    assert split is not None
    x = torch.from_numpy(images())
    maps = split.trunk(x).view(-1, *split.shape)
    torch.testing.assert_close(split.tail(maps), backbone(x))


def changed(tail: nn.Module) -> nn.Module:
    """Tunes, as far as a test needs it."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return tail


@pytest.mark.parametrize(
    ("name", "weights", "stage", "with_taps", "dims"),
    [
        ("efficientnet_lite0", "", "stage6", True, [1280, 672, 1152, 1152, 1280]),
        ("timm/test_resnet", "random", "layer4", False, [96, 96]),
    ],
)
def test_two_tails_on_one_trunk_are_one_file_with_torchs_answers(
    name: str, weights: str, stage: str, with_taps: bool, dims: list[int], tmp_path: Path
) -> None:
    frozen, tuned = (backbones.load(name, weights, 0, tmp_path).eval() for _ in range(2))
    split = tails.split(tuned, stage)
    assert split is not None
    joined = tails.tailed(frozen, stage, changed(split.tail), with_taps=with_taps)
    file = tmp_path / "both.onnx"
    export.to_onnx(joined, file)
    pixels = images(2, frozen.size)
    runtime = OnnxRuntime(Provider("cpu", ""), 1)
    served = runtime.load(file.read_bytes).run(pixels)
    assert BackboneFile(file, runtime).blocks == tuple(dims) == tuple(export.blocks_of(joined))
    with torch.inference_mode():
        first, last = (network(torch.from_numpy(pixels)).numpy() for network in (frozen, tuned))
    np.testing.assert_allclose(served[:, : dims[0]], first, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(served[:, -dims[-1] :], last, rtol=1e-3, atol=1e-3)
    assert np.abs(first - last).max() > 0.1
    np.testing.assert_allclose(export.torch_features(joined, pixels), served, rtol=1e-3, atol=1e-3)
    # The frozen stages are there once.
    alone = tmp_path / "alone.onnx"
    frozen.taps = ()
    export.to_onnx(frozen, alone)
    convolutions = [
        sum(node.op_type == "Conv" for node in onnx.load(path).graph.node) for path in (alone, file)
    ]
    assert convolutions[0] < convolutions[1] < 1.5 * convolutions[0]
    head = Head(np.zeros((2, sum(dims)), np.float32), np.zeros(2, np.float32), ("a", "b"))
    assert head.probabilities(served).shape == (2, 2)


def test_a_whole_network_may_serve_beside_the_frozen_one(tmp_path: Path) -> None:
    frozen, tuned = small_backbone().eval(), small_backbone().eval()
    changed(tuned)
    joined = tails.tailed(frozen, "stem", tuned, with_taps=False)
    pixels = images(2)
    export.to_onnx(joined, tmp_path / "both.onnx")
    served = (
        OnnxRuntime(Provider("cpu", ""), 1).load((tmp_path / "both.onnx").read_bytes).run(pixels)
    )
    with torch.inference_mode():
        each = [network(torch.from_numpy(pixels)).numpy() for network in (frozen, tuned)]
    np.testing.assert_allclose(served, np.concatenate(each, axis=1), rtol=1e-4, atol=1e-5)


def test_images_of_several_threads_are_not_mixed_up() -> None:
    frozen, tuned = small_backbone(taps=("0",)).eval(), small_backbone(taps=("0",)).eval()
    split = tails.split(tuned, "top")
    assert split is not None
    joined = tails.tailed(frozen, "top", split.tail, with_taps=True)
    pixels = [images(n) for n in range(1, 9)]
    alone = [export.torch_features(joined, some) for some in pixels]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda some: export.torch_features(joined, some), pixels)
            for found, wanted in zip(together, alone, strict=True):
                np.testing.assert_array_equal(found, wanted)
