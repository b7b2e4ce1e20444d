"""What a network is made of, found by how it is built: its stages, and what of it are features."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from service.errors import InvalidInput, Reason

_TAPPED = 3
"""Last stages of an EfficientNet whose depthwise convolutions are features too."""


@dataclass(frozen=True)
class Parts:
    """What a network is made of, as far as its kind is known."""

    stages: dict[str, list[nn.Module]]
    """The modules of each stage, from the images' end to the features'; {} if not known."""
    taps: tuple[str, ...] = ()
    """As in the registry."""
    tuned_from: str = ""
    """The first stage that tuning trains; "" trains all."""
    prefix_tokens: int = 0
    """Tokens before those of patches, such as a class token."""


def parts(network: nn.Module) -> Parts:
    """Finds a network's stages, and what of them are features, by how it is built.

    Of EfficientNets and MobileNets the taps are the depthwise convolutions that end the last
    three stages, of other convolutional networks the stages before the last, and of
    transformers whose last layer is no mean of the patches' tokens that mean.
    """
    children = dict(network.named_children())
    inner = {
        name: dict(module.named_children())
        for name, module in children.items()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    }
    blocks = inner.get("blocks", {})
    if hasattr(network, "num_prefix_tokens") and blocks and "norm" in children:
        count = len(blocks)
        last = f"block{count - max(1, count // 4) + 1}"
        is_mean = getattr(network, "global_pool", "") not in ("token", "map")
        return Parts(
            _stages(network, "block", [f"blocks.{name}" for name in blocks]),
            () if is_mean else ("norm",),
            last,
            int(network.num_prefix_tokens),  # type: ignore[arg-type]
        )
    if "conv_stem" in children and blocks:
        names = [f"blocks.{name}" for name in blocks]
        return Parts(
            _stages(network, "stage", names),
            tuple(_depthwise(network, name) for name in names[-_TAPPED:]),
            f"stage{max(1, len(names) - 1)}",
        )
    for prefix, names in (
        ("stage", [f"stages.{name}" for name in inner.get("stages", {})]),
        ("layer", [f"layer{n}" for n in range(1, 5)]),
        ("stage", [f"s{n}" for n in range(1, 5)]),
    ):
        if names and all(name.partition(".")[0] in children for name in names):
            return Parts(
                _stages(network, prefix, names), tuple(names[:-1]), prefix + str(len(names))
            )
    return Parts({})


def _depthwise(network: nn.Module, stage: str) -> str:
    """Names what in a stage's last block gives its widest features, or the block itself.

    Of an inverted residual that is the norm after the depthwise convolution, of MobileNetV4's
    universal one that convolution in its middle, or what it is instead of it.
    """
    block = f"{stage}.{len(list(network.get_submodule(stage).children())) - 1}"
    module = network.get_submodule(block)
    for name in ("bn2", "dw_mid", "pw_exp"):
        if not isinstance(getattr(module, name, nn.Identity()), nn.Identity):
            return f"{block}.{name}"
    return block


def _stages(network: nn.Module, prefix: str, names: list[str]) -> dict[str, list[nn.Module]]:
    """Numbers the stages by `prefix`, between all that comes before them and after them."""
    children = list(network.named_children())
    tops = {name.partition(".")[0] for name in names}
    places = [place for place, (name, _) in enumerate(children) if name in tops]
    found = {
        "stem": [module for _, module in children[: places[0]]],
        **{f"{prefix}{n}": [network.get_submodule(name)] for n, name in enumerate(names, 1)},
        "top": [module for _, module in children[places[-1] + 1 :]],
    }
    # A class token and the like, which are not module's, are learned with the stem.
    if own := list(network.parameters(recurse=False)):
        found["stem"].append(nn.ParameterList(own))
    return {
        name: modules
        for name, modules in found.items()
        if any(True for module in modules for _ in module.parameters())
    }


def looked_at(network: nn.Module, size: int, taps: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Runs a network on an image of side `size`; returns how many features its last layer has, and
    the taps that can be averaged.

    Those are outputs [n, c, h, w], and tokens [n, t, c]. Raises InvalidInput where what comes
    out of the last layer are not features [n, d].
    """
    shapes: dict[str, torch.Size] = {}

    def look(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            shapes[name] = output.shape

    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _given, output, name=name: look(name, output)
        )
        for name in ("", *taps)
    ]
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    features = shapes.get("", ())
    if len(features) != 2:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            "the network gives no list of features of an image: choose another backbone",
            field="backbone",
        )
    fitting = [
        name
        for name in taps
        if len(shape := shapes.get(name, ())) == 3 or (len(shape) == 4 and shape[2] == shape[3])
    ]
    return features[1], tuple(fitting)
