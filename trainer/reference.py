"""The reference of an exported backbone: what PyTorch makes of it, for jobs without PyTorch.

Written when a backbone is exported, once its file was checked: probe images, PyTorch's features of
them, those of the file, and the classifier that it was pretrained with. A later job compares what
serves with PyTorch by it, under its own head, and asks that classifier how well it knows the job's
images. A safetensors file; of which backbone stands in its metadata. Never imports torch.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.special import softmax

from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.errors import unloadable
from trainer.arrays import Singles

_PROBES = 8
_SIDES = (2, 4, 8, 16, 32, 64)
"""Of the grids of random colours that a probe image is the sum of."""
_SPREAD = 60.0
"""Standard deviation of a probe's values, of 255."""
_ABOUT = "graft.reference"
_TINY = 1e-6


@dataclass(frozen=True, eq=False)
class Classifier:
    """What a backbone was pretrained with on top: float32 [classes, d] and [classes]."""

    weight: Singles
    bias: Singles

    def sureness(self, features: Floats) -> float:
        """Measures how well it knows images by last-layer features [n, d].

        Returns the mean of its highest probability.
        """
        logits = features @ self.weight.T + self.bias
        return float(softmax(logits, axis=1).max(axis=1).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What is known of a backbone's file beside what serves."""

    backbone_digest: str
    """sha256 of the ONNX file that it is of."""
    probes: Pixels
    features: Floats
    """PyTorch's, of the probes, float32 [n, d], in full precision on the CPU."""
    served: Floats
    """What ONNX Runtime's CPU provider made of them with that file, when it was exported."""
    torch: str
    """The version that computed them."""
    classifier: Classifier | None = None
    """None where there is none of one linear layer."""

    @property
    def max_difference(self) -> float:
        """Largest absolute difference of a feature of the file's, over the largest feature."""
        largest = max(np.abs(self.features).max(), _TINY)
        return float(np.abs(self.served - self.features).max() / largest)

    @property
    def name(self) -> str:
        """Tells its probes from other images."""
        return f"probes {hashlib.sha256(self.probes.tobytes()).hexdigest()[:16]}"


def probe_images(size: int) -> Pixels:
    """Draws images uint8 [n, size, size, 3], always the same but for rounding.

    Sums of random colours from coarse to fine, each octave as strong as photographs have it: their
    amplitude falls with the frequency (Field 1987, "Relations between the statistics of natural
    images and the response properties of cortical cells").
    """
    found = np.empty((_PROBES, size, size, 3), np.uint8)
    for number, image in enumerate(found):
        rng = np.random.default_rng(number)
        field = np.zeros((size, size, 3), np.float32)
        for side in _SIDES:
            grid = rng.standard_normal((side, side, 3)).astype(np.float32) / side
            for colour in range(3):
                plane = Image.fromarray(np.ascontiguousarray(grid[..., colour]))
                field[..., colour] += np.asarray(
                    plane.resize((size, size), Image.Resampling.BICUBIC)
                )
        field *= _SPREAD / field.std()
        image[:] = (field + 127.5).clip(0, 255).astype(np.uint8)
    return found


def save(reference: Reference, file: Path) -> None:
    """Writes a reference."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "probes": reference.probes,
        "features": reference.features,
        "served": reference.served,
    }
    if (top := reference.classifier) is not None:
        tensors |= {"classifier_weight": top.weight, "classifier_bias": top.bias}
    about = {
        "backbone_digest": reference.backbone_digest,
        "torch": reference.torch,
    }
    save_file(tensors, file, {_ABOUT: json.dumps(about)})


def load(file: Path) -> Reference:
    """Reads a reference; raises Damaged (MODEL_UNLOADABLE) for a file that is none."""
    try:
        with safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {})[_ABOUT])
            names = set(opened.keys())
            top = None
            if "classifier_weight" in names:
                top = Classifier(
                    opened.get_tensor("classifier_weight"), opened.get_tensor("classifier_bias")
                )
            return Reference(
                backbone_digest=about["backbone_digest"],
                probes=opened.get_tensor("probes"),
                features=opened.get_tensor("features"),
                served=opened.get_tensor("served"),
                torch=about["torch"],
                classifier=top,
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise unloadable("backbone's reference", f"cannot be read ({error})") from error
