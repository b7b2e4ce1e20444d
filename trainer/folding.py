"""A network whose BatchNorms are part of the convolutions before them.

A BatchNorm in evaluation mode scales and shifts each channel, whatever lies in the batch;
the convolution can do both. What is left out are two passes over every activation,
there and back: a tenth of a training step. Parameters are the network's own, so
training the folded one trains it. Knows nothing of what is trained, or why.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


class _Folded(nn.Module):
    """A convolution with a BatchNorm after it whose statistics stay, in one."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.convolution = convolution
        self.scale, self.shift = norm.weight, norm.bias
        self.after = getattr(norm, "act", nn.Identity())
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        self.register_buffer("mean", mean.clone())
        self.register_buffer("inverse", torch.rsqrt(variance + norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        own = self.convolution
        scale = self.scale * self.inverse
        weight = own.weight * scale.view(-1, 1, 1, 1)
        shift = self.shift - self.mean * scale
        y: Tensor = self.after(
            functional.conv2d(x, weight, shift, own.stride, own.padding, own.dilation, own.groups)
        )
        return y


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaves = (nn.BatchNorm2d, nn.Conv2d)
        return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)


def folded(network: nn.Module) -> nn.Module | None:
    """Returns the network in another shape, for training alone; None where it cannot be read.

    Every BatchNorm must be in evaluation mode. Folds those right behind a convolution
    without a bias that nothing else looks at.
    """
    try:
        graph = fx.GraphModule(network, _Tracer().trace(network))
    except Exception:
        # Any code may stand in a network, and unfolded it trains too.
        return None
    modules = dict(graph.named_modules())
    count = 0
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d) or not _is_plain(norm):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = modules[str(before.target)]
        if type(convolution) is not nn.Conv2d or convolution.padding_mode != "zeros":
            continue
        if convolution.bias is not None:
            continue
        name = f"folded{count}"
        graph.add_submodule(name, _Folded(convolution, norm))
        before.target = name
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
        count += 1
    graph.recompile()
    return graph if count else None


def _is_plain(norm: nn.BatchNorm2d) -> bool:
    """Allows no subclass but timm's with an activation, whose `drop` does nothing here."""
    is_known = type(norm) is nn.BatchNorm2d or (
        type(norm).__name__ == "BatchNormAct2d" and isinstance(norm.drop, nn.Identity)
    )
    return is_known and norm.running_mean is not None and norm.affine
