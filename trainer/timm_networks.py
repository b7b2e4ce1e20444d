"""Networks of timm's by name: what it says of them, and their weights.

timm brings more than a thousand networks; each says its size, colours and licence in its
`pretrained_cfg` (Wightman 2019, PyTorch Image Models).
"""

import copy
import difflib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import timm
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from torch import nn

from service.backbones import NO_LICENCE, TIMM
from service.backbones import Backbone as Row
from service.errors import InvalidInput, Reason, WrongState
from trainer.download import download_from_hub

if TYPE_CHECKING:
    from torch import Tensor

_SIZES = 32, 1024
"""Least and largest side of images that are decoded, pixels."""
_NEAR = 5
"""Most names that are told instead of one that there is none of."""


def settled(row: Row, tag: str) -> Row:
    """Completes a row by what timm says: the tag, and what the row leaves to it.

    `tag` names the weights, "" timm's default. Raises InvalidInput for what timm does not
    have, and for images that are not decoded.
    """
    architecture, _, own = row.network.partition(".")
    said = _config(architecture, tag or own)
    row = replace(
        row,
        network=f"{architecture}.{said.tag}" if said.tag and said.has_weights else architecture,
        licence=row.licence or _licence(said.license),
    )
    if row.size:
        return row
    channels, height, width = said.input_size
    low, high = _SIZES
    if channels != 3 or height != width or not low <= height <= high:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"{row.name} takes images of {width} by {height} pixels with {channels} colours, and "
            f"what is served takes square ones of {low} to {high} pixels with 3: choose another",
            field="backbone",
        )
    return replace(row, size=height, mean=tuple(said.mean), std=tuple(said.std))


def _config(architecture: str, tag: str) -> Any:
    tags = timm.list_models(f"{architecture}.*", pretrained=True)
    if timm.is_model(architecture):
        if not tag or f"{architecture}.{tag}" in tags:
            said = timm.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
            # Without one timm has defaults, which are those of most networks.
            return said or timm.models.PretrainedCfg()
        problem, near = f"{architecture} has no weights {tag!r}", tags
    else:
        problem = f"timm has no network {architecture!r}"
        wanted = f"{architecture}.{tag}" if tag else architecture
        near = difflib.get_close_matches(wanted, timm.list_models(pretrained=True), _NEAR)
        near = near or difflib.get_close_matches(architecture, timm.list_models(), _NEAR)
    hint = f"use {', '.join(TIMM + name for name in near)}" if near else "see timm.list_models()"
    raise InvalidInput(
        Reason.INVALID_FIELD,
        f"{problem} (timm {timm.__version__}): {hint}",
        field="backbone",
    )


def _licence(said: str | None) -> str:
    return NO_LICENCE if said in (None, "", "unknown") else str(said)


def download(row: Row, path: Path) -> None:
    """Puts the weights of a settled row at a path; raises as `download_from_hub`."""
    said = timm.get_pretrained_cfg(row.network)
    if said is None or not said.hf_hub_id:
        where = f" but at {said.url}" if said is not None and said.url else ""
        raise WrongState(
            Reason.WEIGHTS_UNAVAILABLE,
            f"timm has no weights of {row.name} on the Hugging Face Hub{where}: put them into the "
            f"folder of weights {path.parent.parent} and name them by weights 'file:NAME', or say "
            "'random'",
        )
    download_from_hub(said.hf_hub_id, path)


def published(row: Row, state: "dict[str, Tensor]") -> nn.Module:
    """Builds a settled row's network with its head, filled as timm does it.

    Raises RuntimeError where the tensors are of another network.
    """
    network: nn.Module = timm.create_model(
        row.network,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state, "custom_load": False},
    )
    return network


def renamed(network: nn.Module, state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Returns tensors by timm's names, where they have those that their authors gave them."""
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None or set(network.state_dict()) <= set(state):
        return state
    try:
        found: dict[str, Tensor] = rename(dict(state), network)
    except Exception:
        # It expects one of the forms that it knows, and may fail in any way at others.
        return state
    return found


N = TypeVar("N", bound=nn.Module)


def with_fixed_padding(network: N) -> N:
    """Copies a network so that its first run settles the padding of its "SAME" convolutions.

    One without such is returned as it is.
    """
    names = [name for name, each in network.named_modules() if isinstance(each, Conv2dSame)]
    if not names:
        return network
    fixed = copy.deepcopy(network)
    for name in names:
        old = fixed.get_submodule(name)
        assert isinstance(old, Conv2dSame)
        new = Conv2dSameExport(
            old.in_channels, old.out_channels, _two(old.kernel_size), _two(old.stride), 0,
            _two(old.dilation), old.groups, old.bias is not None,
        )  # fmt: skip
        new.weight, new.bias = old.weight, old.bias
        fixed.set_submodule(name, new)
    return fixed


def _two(sides: tuple[int, ...]) -> tuple[int, int]:
    height, width = sides
    return height, width
