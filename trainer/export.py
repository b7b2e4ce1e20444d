"""Writes a torch backbone as the ONNX file that serves, and computes what torch makes of images.

A file that many jobs are to share is checked against its network there and then, and gets a
reference (`trainer.reference`), with which later jobs need no torch.
"""

import hashlib
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from service.contract import (
    BACKBONE_FILE,
    REFERENCE_FILE,
    Exported,
    ExportedBackbone,
    ExportSpec,
    form_name,
)
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import Internal, Reason, WrongState
from service.ops import failpoints
from service.ops.cpus import available_cores
from trainer import backbones, quantise, reference
from trainer.backbone_file import OPSET, holds_in_int8, name_blocks
from trainer.backbones import Backbone
from trainer.reference import Classifier, Reference
from trainer.weights import Weights

_BATCH = 8
_MAX_DIFFERENCE = 1e-3
"""Of a feature, over the largest: what rounding makes is a thousandth of it."""


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
    backbone = _with_fixed_padding(backbone)
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


def run(spec: ExportSpec) -> Exported:
    """Exports a pretrained backbone whose weights are here, and in int8 where heads take that.

    Raises WrongState (WEIGHTS_UNAVAILABLE) where they are not, and as `shared`.
    """
    folder, out = Path(spec.weights_dir), Path(spec.out_dir)
    asked = Weights(spec.backbone, "", 0, folder)
    if not asked.is_available():
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"the weights {asked.name} of {spec.backbone} are not in {folder}, and nothing is "
            "downloaded unasked: its first job does it",
        )
    torch.set_num_threads(spec.threads or available_cores())
    network = backbones.load(spec.backbone, "", 0, folder)
    top = backbones.classifier(spec.backbone, "", folder)
    made = out / BACKBONE_FILE
    found = shared(network, top, made, out / REFERENCE_FILE)
    digest = _sha256(out / REFERENCE_FILE)
    forms = [ExportedBackbone(asked.name, found.backbone_digest, reference=digest)]
    if holds_in_int8(spec.backbone, asked.name, spec.precision):
        quantised = out / "int8.onnx"
        if quantise.to_int8(made, quantised):
            forms.append(ExportedBackbone(form_name(asked.name, "int8"), _sha256(quantised)))
            quantised.rename(out / f"{forms[-1].digest}.onnx")
    made.rename(out / f"{found.backbone_digest}.onnx")
    return Exported(forms)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shared(
    backbone: Backbone, classifier: Classifier | None, file: Path, reference_file: Path
) -> Reference:
    """Exports a backbone that jobs share, checks the file and writes its reference.

    Returns the reference; errors as `checked`.
    """
    to_onnx(backbone, file)
    found = checked(backbone, file, classifier)
    reference.save(found, reference_file)
    return found


def checked(backbone: Backbone, file: Path, classifier: Classifier | None) -> Reference:
    """Compares an exported file with its network on probe images, each feature with its own.

    Returns what later jobs know it by; raises Internal (PARITY_FAILED) where they differ.
    """
    content = file.read_bytes()
    probes = reference.probe_images(backbone.size)
    session = OnnxRuntime(Provider("cpu", "for the check")).load(lambda: content)
    found = Reference(
        backbone_digest=hashlib.sha256(content).hexdigest(),
        probes=probes,
        features=torch_features(backbone, probes),
        served=session.run(probes),
        torch=torch.__version__,
        classifier=classifier,
    )
    # Written so that NaN fails too.
    if not found.max_difference <= _MAX_DIFFERENCE:
        raise Internal(
            Reason.PARITY_FAILED,
            f"the exported backbone differs from PyTorch by {found.max_difference:.2g} of its "
            f"largest feature (at most {_MAX_DIFFERENCE:g} is allowed): it was not kept",
        )
    return found


def blocks_of(backbone: Backbone) -> list[int]:
    """Returns how many features each block has; leaves the backbone on the CPU, as it serves."""
    backbone = backbone.to("cpu", torch.float32).eval()
    with torch.inference_mode():
        return [part.shape[1] for part in backbone.all_features(_example(backbone))]


def _with_fixed_padding(backbone: Backbone) -> Backbone:
    """Returns the same function with "SAME" padding as numbers, for images of the one size.

    Traced, the padding is reckoned from each map's size in every run, and no runtime joins such a
    Pad with its convolution: efficientnet_lite0 then takes a third longer on ONNX Runtime's CPU
    provider.
    """
    if "timm" not in sys.modules:  # whose layers alone do this
        return backbone
    from trainer import timm_networks

    fixed = timm_networks.with_fixed_padding(backbone)
    if fixed is not backbone:
        blocks_of(fixed)  # the first run settles the padding
    return fixed


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
