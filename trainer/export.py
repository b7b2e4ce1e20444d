"""Writes a torch backbone as the ONNX file that serves, and computes what torch makes of images."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from service import faults
from service.inference.head import Floats
from service.inference.preprocess import SIZE, Pixels
from trainer.backbone_file import OPSET

_BATCH = 8


def to_onnx(backbone: nn.Module, path: Path) -> None:
    """Writes `images` uint8 [n, 224, 224, 3] -> `features` float32 [n, d], opset 17.

    The same weights always give the same bytes, so that jobs share a backbone.
    """
    backbone = backbone.to("cpu", torch.float32).eval()
    example = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        # The newer exporter takes ten times as long for the same graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            backbone,
            (example,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features"],
            dynamic_axes={"images": {0: "n"}, "features": {0: "n"}},
        )
    faults.reach("trainer.exported")


def torch_features(backbone: nn.Module, pixels: Pixels) -> Floats:
    """Computes features float32 [n, d] as torch does, on the CPU in full precision."""
    backbone = backbone.to("cpu", torch.float32).eval()
    with torch.inference_mode():
        parts = [
            backbone(torch.from_numpy(pixels[i : i + _BATCH])).numpy()
            for i in range(0, len(pixels), _BATCH)
        ]
    return np.concatenate(parts)
