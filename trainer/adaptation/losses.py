"""CDAN+E: what is added to the source's loss so that a network's features fit the target too.

Features are float32 [n, d] and logits float32 [n, classes], of a batch of either
domain. Knows no loop and no images.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_MULTILINEAR = 4096
"""Features times classes beyond which CDAN's product is taken at random."""
_HIDDEN = 256


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reversed_gradient(x: Tensor, weight: float) -> Tensor:
    """Returns `x` as it is; its gradient comes back times `-weight`.

    Ganin et al. 2016, Domain-Adversarial Training of Neural Networks.
    """
    reversed_x: Tensor = _Reversal.apply(x, weight)
    return reversed_x


def adversarial_weight(done: float) -> float:
    """Returns what the reversed gradient is multiplied by: 0 at the start, almost 1 at the end.

    Ganin et al. 2016: 2 / (1 + exp(-10 p)) - 1, where p is how much of training is
    done, 0 to 1. The classifier of domains knows nothing yet at first.
    """
    return 2 / (1 + math.exp(-10 * done)) - 1


class DomainClassifier(nn.Module):
    """Tells domains apart: float32 [n, d] to one logit each [n], above 0 for the source."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.layers(x)
        return logits.squeeze(1)


class Multilinear(nn.Module):
    """Features by probabilities, float32 [n, d] and [n, classes] to [n, `dim`].

    The outer product, or, where that is too wide, a random one of the same inner
    products in expectation (Long et al. 2018, section 3.2).
    """

    features: Tensor
    classes: Tensor

    def __init__(self, feature_dim: int, classes: int) -> None:
        super().__init__()
        self.is_random = feature_dim * classes > MAX_MULTILINEAR
        self.dim = min(feature_dim * classes, MAX_MULTILINEAR)
        if self.is_random:
            self.register_buffer("features", torch.randn(feature_dim, self.dim))
            self.register_buffer("classes", torch.randn(classes, self.dim))

    def forward(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """See the class."""
        if self.is_random:
            product = (features @ self.features) * (probabilities @ self.classes)
            return product / math.sqrt(self.dim)
        return (probabilities[:, :, None] * features[:, None, :]).flatten(1)


def cdan(
    classifier: nn.Module,
    multilinear: Multilinear,
    source: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    weight: float,
) -> Tensor:
    """Sets features and classes together against domains; `source` are features and logits.

    Long et al. 2018, Conditional Adversarial Domain Adaptation, with entropy
    conditioning (CDAN+E): sure images count more, 1 + exp(-entropy). Classes are
    not learned from it, features alone.
    """
    own, other = (logits.detach().softmax(dim=1) for _, logits in (source, target))
    features = torch.cat([source[0], target[0]])
    conditioned = multilinear(reversed_gradient(features, weight), torch.cat([own, other]))
    logits, n = classifier(conditioned), len(own)
    # Binary cross-entropy, the weighted mean over either domain, then of both.
    ours = (_sureness(own) * functional.softplus(-logits[:n])).sum()
    theirs = (_sureness(other) * functional.softplus(logits[n:])).sum()
    return (ours + theirs) / 2


def _sureness(probabilities: Tensor) -> Tensor:
    """Returns 1 + exp(-entropy) of each row, over their sum."""
    entropy = torch.special.entr(probabilities).sum(dim=1)
    weights = 1 + torch.exp(-entropy)
    return weights / weights.sum()
