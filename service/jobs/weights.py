"""Which backbones a job can start from without a download. Knows file names, reads no file."""

from collections.abc import Callable
from pathlib import Path

from service.jobs.contract import BACKBONES, ExportedBackbone, PretrainedBackbone

_INSTALLED = "efficientnet_lite0"
"""Its weights come with a package."""


def available(
    folder: Path, exported: Callable[[str], list[ExportedBackbone]]
) -> list[PretrainedBackbone]:
    """The backbones whose weights lie in `folder` or are installed, each with its exports."""
    return [
        PretrainedBackbone(backbone=backbone, exported=exported(backbone))
        for backbone in BACKBONES
        # As torchvision names its files: resnet18-f37072fd.pth.
        if backbone == _INSTALLED or any(folder.glob(f"{backbone}-*.pth"))
    ]
