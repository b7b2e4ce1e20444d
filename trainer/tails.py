"""Parts a network into the stages that stay frozen and those that are tuned, its tail.

The frozen ones compute each view of an image once; and where the tuned network serves
beside the frozen one, both tails work on what one pass through the stages before them gives.
"""

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from trainer.backbones import Backbone


class Split(NamedTuple):
    """Holds a backbone in two parts, which are its own modules."""

    trunk: Backbone
    """From images to the maps that the tail takes, flattened: float32 [n, c * h * w]."""
    tail: nn.Module
    """From maps float32 [n, c, h, w] to the last layer's features float32 [n, d]."""
    shape: tuple[int, ...]
    """Of one image's maps."""


class _Flat(nn.Module):
    """Flattens to a size that an exported file can name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        return maps.reshape(-1, self.size)


class _Tracer(fx.Tracer):
    """Looks into modules that hold stages, and into no others."""

    def __init__(self, stages: set[nn.Module]) -> None:
        super().__init__()
        self._stages = stages

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return m in self._stages or self._stages.isdisjoint(m.modules())


def split(backbone: Backbone, stage: str) -> Split | None:
    """Parts a backbone before a stage, by its graph; leaves it in evaluation mode.

    None where that cannot be: its code cannot be read, or more than one tensor goes from what
    lies before the stage to what lies after it.
    """
    trunk = backbone.trunk
    stages = {module for modules in backbone.stages.values() for module in modules}
    trunk.eval()
    try:
        graph = _Tracer(stages).trace(trunk)
        parts = _parted(trunk, graph, backbone.stages[stage][0])
    except Exception:
        # Any code may stand in a network.
        return None
    if parts is None:
        return None
    before, tail = parts
    shape = _shape(before, backbone)
    size = math.prod(shape)
    flat = nn.Sequential(before, _Flat(size))
    flattened = Backbone(flat, {}, size, (0, 0, 0), (1, 1, 1), backbone.size)
    flattened.mean, flattened.std = backbone.mean, backbone.std
    return Split(flattened, tail, shape)


def _parted(
    trunk: nn.Module, graph: fx.Graph, first: nn.Module
) -> tuple[nn.Module, nn.Module] | None:
    at = next(
        node
        for node in graph.nodes
        if node.op == "call_module" and trunk.get_submodule(str(node.target)) is first
    )
    (cut,) = at.all_input_nodes
    before, waiting = set(), [cut]
    while waiting:
        node = waiting.pop()
        if node not in before:
            before.add(node)
            waiting += node.all_input_nodes
    module = fx.GraphModule(trunk, graph)
    # The module is not the graph's own: its nodes are found by name.
    names = {node.name for node in before}
    parts = split_module(module, trunk, lambda node: int(node.name not in names))
    made = dict(parts.named_children())
    calls = [node for node in parts.graph.nodes if node.op == "call_module"]
    if len(calls) != 2 or calls[1].all_input_nodes != [calls[0]]:
        return None
    return made[str(calls[0].target)], made[str(calls[1].target)]


def _shape(before: nn.Module, backbone: Backbone) -> tuple[int, ...]:
    image = torch.zeros(1, 3, backbone.size, backbone.size, device=backbone.mean.device)
    with torch.inference_mode():
        return tuple(before.eval()(image).shape[1:])


class Tailed(Backbone):
    """A frozen backbone with another tail beside its own; it computes, and is not trained.

    All its features are those of the frozen one, then the other tail's.
    """

    def __init__(self, frozen: Backbone, stage: str, tail: nn.Module) -> None:
        super().__init__(
            frozen.trunk, {}, frozen.feature_dim, (0, 0, 0), (1, 1, 1), frozen.size, frozen.taps,
            prefix_tokens=frozen.prefix_tokens,
        )  # fmt: skip
        self.mean, self.std = frozen.mean, frozen.std
        self.tail = tail
        self._first = frozen.stages[stage][0]

    def all_features(self, images: Tensor) -> list[Tensor]:
        """See `Backbone.all_features`."""
        maps: list[Tensor] = []
        caller = threading.get_ident()

        def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            # As there: another thread has a hook of its own.
            if threading.get_ident() == caller:
                maps.append(given[0])

        hook = self._first.register_forward_pre_hook(keep)
        try:
            features = super().all_features(images)
        finally:
            hook.remove()
        return [*features, self.tail(maps[0])]


def tailed(frozen: Backbone, stage: str, tail: nn.Module, *, with_taps: bool) -> Tailed:
    """Joins a frozen backbone and what a copy of it was tuned to: its tail, or all of it.

    Without `with_taps` no features of middle layers are computed.
    """
    # A whole network's tail begins with its first stage: the images are normalised by then.
    joined = Tailed(frozen, stage, tail.trunk if isinstance(tail, Backbone) else tail)
    if not with_taps:
        joined.taps = ()
    return joined
