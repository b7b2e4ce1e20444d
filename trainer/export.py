"""Writes a torch backbone as the ONNX file that serves, and computes what torch makes of images."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.ops import failpoints
from trainer.backbone_file import OPSET, name_blocks
from trainer.backbones import Backbone

_BATCH = 8


class _All(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.backbone.all_features(images), dim=1)


def to_onnx(backbone: Backbone, path: Path) -> None:
    """Writes `images` uint8 [n, size, size, 3] -> `features` float32 [n, d], opset 17.

    Features are the last layer's, then those of the taps; how many of each stand in the
    metadata under `domain.BLOCKS`, a JSON list. The same weights always give the same bytes, so
    that jobs share a backbone.
    """
    blocks, example = blocks_of(backbone), _example(backbone)
    with warnings.catch_warnings(), torch.no_grad():
        # The newer exporter takes ten times as long for the same graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            # Else the exporter would put the backbone into training mode in the end.
            _All(backbone).eval(),
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features"],
            dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
        )
    name_blocks(path, blocks)
    failpoints.reach("trainer.exported")


def blocks_of(backbone: Backbone) -> list[int]:
    """Returns how many features each block has; leaves the backbone on the CPU, as it serves."""
    backbone = backbone.to("cpu", torch.float32).eval()
    with torch.inference_mode():
        return [part.shape[1] for part in backbone.all_features(_example(backbone))]


def _example(backbone: Backbone) -> torch.Tensor:
    return torch.zeros(2, backbone.size, backbone.size, 3, dtype=torch.uint8)


def torch_features(backbone: Backbone, pixels: Pixels) -> Floats:
    """Computes all features float32 [n, d] as torch does, on the CPU in full precision."""
    backbone = backbone.to("cpu", torch.float32).eval()
    with torch.inference_mode():
        parts = [
            torch.cat(
                backbone.all_features(torch.from_numpy(pixels[i : i + _BATCH])), dim=1
            ).numpy()
            for i in range(0, len(pixels), _BATCH)
        ]
    return np.concatenate(parts)
