"""What training minimises, and what an epoch is judged by.

Here it is classification; adaptation to a domain overrides both. Knows no loop.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

Score = tuple[float, float]


class Outputs(NamedTuple):
    """Of one domain's images: features float32 [n, d], logits float32 [n, classes]."""

    features: Tensor
    logits: Tensor


class Judged(NamedTuple):
    """What a network does on images as served, in 32 bits as served."""

    loss: float
    """Mean cross-entropy on the validation part, nats."""
    accuracy: float
    other: Outputs | None
    """Of the target domain's images, on the CPU."""


class Objective(nn.Module):
    """Cross-entropy; the best epoch has the highest accuracy, then the least loss.

    May have parameters of its own, which are trained along and not exported.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(
        self,
        source: Outputs,
        targets: Tensor,
        other: Outputs | None,  # noqa: ARG002 - for those that adapt
        done: float,  # noqa: ARG002
    ) -> Tensor:
        """The loss of a batch; `done` is how much of training is, 0 to 1."""
        return functional.cross_entropy(
            source.logits, targets, label_smoothing=self.label_smoothing
        )

    def score_start(self, judged: Judged) -> Score:
        """The score of what training starts from; asked for before any other."""
        return self.score(judged)

    def score(self, judged: Judged) -> Score:
        """What is to be highest."""
        return judged.accuracy, -judged.loss
