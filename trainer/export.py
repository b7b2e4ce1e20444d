"""From a torch backbone to the ONNX file that serves, and the proof that they agree."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from service.domain import Parity
from service.errors import GraftError, Reason
from service.inference.head import Floats, Head
from service.inference.preprocess import SIZE, Pixels

OPSET = 17
MAX_DIFFERENCE = 1e-3
"""Of a probability, between torch and what serves."""
PARITY_PICTURES = 32
_BATCH = 8


def to_onnx(backbone: nn.Module, path: Path) -> None:
    """Writes `pictures` uint8 [n, 224, 224, 3] -> `features` float32 [n, d], opset 17.

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
            input_names=["pictures"],
            output_names=["features"],
            dynamic_axes={"pictures": {0: "n"}, "features": {0: "n"}},
        )


def torch_features(backbone: nn.Module, pixels: Pixels) -> Floats:
    """Features float32 [n, d] as torch computes them, on the CPU in full precision."""
    backbone = backbone.to("cpu", torch.float32).eval()
    with torch.inference_mode():
        parts = [
            backbone(torch.from_numpy(pixels[i : i + _BATCH])).numpy()
            for i in range(0, len(pixels), _BATCH)
        ]
    return np.concatenate(parts)


def check_parity(
    head: Head, served_features: Floats, backbone: nn.Module, pixels: Pixels
) -> Parity:
    """Compares what serves with torch on real pictures.

    `served_features` belong to `pixels`, of which the first 32 are compared.
    Raises GraftError (PARITY_FAILED) when a probability differs by more than 1e-3.
    """
    pixels = pixels[:PARITY_PICTURES]
    served = head.probabilities(served_features[: len(pixels)])
    trained = head.probabilities(torch_features(backbone, pixels))
    difference = float(np.abs(served - trained).max())
    agreement = float((served.argmax(axis=1) == trained.argmax(axis=1)).mean())
    # Written so that NaN fails too.
    if not difference <= MAX_DIFFERENCE:
        raise GraftError(
            Reason.PARITY_FAILED,
            f"the exported model differs from PyTorch by {difference:.2g} in a probability (at "
            f"most {MAX_DIFFERENCE:g} is allowed; {agreement:.0%} of the best classes agree) on "
            f"{len(pixels)} validation pictures: it was not published",
        )
    return Parity(difference, agreement, len(pixels))
