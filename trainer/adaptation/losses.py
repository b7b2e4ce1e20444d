"""What is added to the source's loss so that a network's features fit the target too.

Each takes features float32 [n, d] or logits float32 [n, classes] of a batch of
either domain and gives a scalar. Knows no loop and no images.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_MULTILINEAR = 4096
"""Features times classes beyond which CDAN's product is taken at random."""
_HIDDEN = 256
_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
MCC_TEMPERATURE = 2.5


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reversed_gradient(x: Tensor, weight: float) -> Tensor:
    """`x` as it is; its gradient comes back times `-weight`.

    Ganin et al. 2016, Domain-Adversarial Training of Neural Networks.
    """
    reversed_x: Tensor = _Reversal.apply(x, weight)
    return reversed_x


def adversarial_weight(done: float) -> float:
    """From 0 at the start to almost 1: what the reversed gradient is multiplied by.

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


def domain_loss(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of domain logits [n] and [m]; the mean over either, then of both.

    Weights [n] and [m] sum to 1; without them all count the same.
    """
    ours = functional.softplus(-source)
    theirs = functional.softplus(target)
    first = ours.mean() if source_weight is None else (source_weight * ours).sum()
    second = theirs.mean() if target_weight is None else (target_weight * theirs).sum()
    return (first + second) / 2


def dann(classifier: nn.Module, source: Tensor, target: Tensor, weight: float) -> Tensor:
    """Domain-adversarial: the classifier learns to tell features apart, they to evade it.

    Ganin et al. 2016, Domain-Adversarial Training of Neural Networks.
    """
    both = reversed_gradient(torch.cat([source, target]), weight)
    logits = classifier(both)
    return domain_loss(logits[: len(source)], logits[len(source) :])


def deep_coral(source: Tensor, target: Tensor) -> Tensor:
    """Square Frobenius distance of both covariances over 4 d².

    Sun and Saenko 2016, Deep CORAL: Correlation Alignment for Deep Domain
    Adaptation. They take the last layer's outputs.
    """
    dim = source.shape[1]
    return ((_covariance(source) - _covariance(target)) ** 2).sum() / (4 * dim**2)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=0)
    return centred.T @ centred / max(len(x) - 1, 1)


def mk_mmd(source: Tensor, target: Tensor) -> Tensor:
    """Square maximum mean discrepancy under a mean of Gaussian kernels.

    Long et al. 2015, Learning Transferable Features with Deep Adaptation
    Networks. Kernels have bandwidths a quarter to four times the batch's mean square
    distance and count the same, where the paper weighs them by a quadratic
    programme; all pairs are taken, where it takes a linear number. The mean over
    pairs of one domain leaves out an image with itself (unbiased), so that it may
    be below 0.
    """
    n, m = len(source), len(target)
    both = torch.cat([source, target])
    # Not torch.cdist: its root has no gradient at 0, which is on the diagonal.
    squares = (both**2).sum(dim=1)
    distances = (squares[:, None] + squares[None] - 2 * both @ both.T).clamp_min(0)
    typical = distances.detach().sum() / ((n + m) * (n + m - 1))
    kernel = torch.stack(
        [torch.exp(-distances / (typical * width + 1e-12)) for width in _BANDWIDTHS]
    ).mean(dim=0)
    ours, theirs, across = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    return _off_diagonal_mean(ours) + _off_diagonal_mean(theirs) - 2 * across.mean()


def _off_diagonal_mean(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.diagonal().sum()) / max(n * (n - 1), 1)


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
    """Domain-adversarial on features and classes together; `source` are features and logits.

    Long et al. 2018, Conditional Adversarial Domain Adaptation, with entropy
    conditioning (CDAN+E): sure images count more, 1 + exp(-entropy). Classes are
    not learned from it, features alone.
    """
    own, other = (logits.detach().softmax(dim=1) for _, logits in (source, target))
    features = torch.cat([source[0], target[0]])
    conditioned = multilinear(reversed_gradient(features, weight), torch.cat([own, other]))
    logits, n = classifier(conditioned), len(own)
    return domain_loss(logits[:n], logits[n:], _sureness(own), _sureness(other))


def mcc(logits: Tensor, temperature: float = MCC_TEMPERATURE) -> Tensor:
    """Minimum class confusion: how much target images are between two classes.

    Jin et al. 2020, Minimum Class Confusion for Versatile Domain Adaptation.
    """
    count, classes = logits.shape
    probabilities = (logits / temperature).softmax(dim=1)
    # The weights rank images; they are nothing to be learned.
    weights = _sureness(probabilities.detach()) * count
    confusion = (probabilities * weights[:, None]).T @ probabilities
    confusion = confusion / confusion.sum(dim=1, keepdim=True)
    return (confusion.sum() - confusion.diagonal().sum()) / classes


def _sureness(probabilities: Tensor) -> Tensor:
    """1 + exp(-entropy) of each row, over their sum."""
    entropy = torch.special.entr(probabilities).sum(dim=1)
    weights = 1 + torch.exp(-entropy)
    return weights / weights.sum()
