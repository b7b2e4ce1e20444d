"""Whole-network domain adaptation: the network is trained on until domains look alike to it.

The loop is model-based transfer's; each batch has as many images of the target
as of the source. Both go through the network together: frozen BatchNorms make no
difference between together and apart, and where they learn, the one set of
statistics that serves must be the one that is trained with. No class of the
target is read: epochs are judged by a criterion that needs none.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from service.inference.head import Head
from service.jobs.contract import NETWORK_TECHNIQUES, DomainAdaptation, JobSpec, ModelBased
from trainer import checkpoint
from trainer.adaptation import losses
from trainer.adaptation.criterion import MARGIN, Neighbourhood
from trainer.backbones import Backbone
from trainer.data import Data, Files
from trainer.methods import loop
from trainer.methods.objective import Judged, Objective, Outputs, Score
from trainer.recipes import adaptation_settings
from trainer.records import Send

_WEIGHTS = {"dann": 1.0, "deep_coral": 1.0, "dan": 1.0, "cdan": 1.0, "deep_mcc": 1.0}
"""Of what is added to the source's cross-entropy; the papers' own where they name one."""


def train(
    spec: JobSpec,
    method: DomainAdaptation,
    data: Data,
    target: Files,
    backbone: Backbone,
    first_head: Callable[[], Head],
    deadline: float | None,
    send: Send,
) -> loop.Result:
    """Trains the backbone in place; returns the head, hyperparameters, device and precision.

    As `model_based.train`, with the images of the target domain. The head alone,
    fitted on the source, may be what it returns, unless `method.always_adapt`.
    """
    assert method.technique in NETWORK_TECHNIQUES, method.technique
    recipe = adaptation_settings(method, is_pretrained=spec.weights != "random")
    torch.manual_seed(spec.seed)
    shape = backbone.feature_dim, len(data.classes)
    objective = Adaptation(method.technique, recipe.label_smoothing, shape, len(target), spec.seed)
    work = loop.Work(
        spec=spec,
        method=ModelBased(),
        recipe=recipe,
        data=data,
        backbone=backbone,
        first_head=first_head,
        objective=objective,
        other=target,
        may_keep_start=not method.always_adapt,
        key=checkpoint.key(spec, method, data.digest, *target.digests),
    )
    head, used, device, precision = loop.run(work, deadline, send)
    weight = _WEIGHTS[method.technique]
    used |= {"technique": method.technique, "adaptation_weight": weight}
    return head, used, device, precision


class Adaptation(Objective):
    """The source's cross-entropy and, in growing part, what the technique adds."""

    start_features: Tensor
    """float32 [m, d] of the target's images before training: who is whose neighbour."""

    def __init__(
        self,
        technique: str,
        label_smoothing: float,
        shape: tuple[int, int],
        images: int,
        seed: int,
    ) -> None:
        super().__init__(label_smoothing)
        feature_dim, classes = shape
        self.technique = technique
        self._seed = seed
        self._neighbourhood: Neighbourhood | None = None
        # A buffer, so that a checkpoint has it: after a kill the start is gone.
        self.register_buffer("start_features", torch.zeros(images, feature_dim))
        if technique == "dann":
            self.domains = losses.DomainClassifier(feature_dim)
        elif technique == "cdan":
            self.multilinear = losses.Multilinear(feature_dim, classes)
            self.domains = losses.DomainClassifier(self.multilinear.dim)

    def forward(
        self, source: Outputs, targets: Tensor, other: Outputs | None, done: float
    ) -> Tensor:
        """See `Objective`; `other` must be given."""
        assert other is not None
        known = super().forward(source, targets, None, done)
        growing = losses.adversarial_weight(done)
        if self.technique == "dann":
            added = losses.dann(self.domains, source.features, other.features, growing)
        elif self.technique == "cdan":
            added = losses.cdan(self.domains, self.multilinear, source, other, growing)
        elif self.technique == "deep_coral":
            # In units of the source's logits: those of a fitted head are large, and their
            # covariances' squared distance would drown the classes.
            size = source.logits.detach().float().square().mean().sqrt().clamp_min(1e-6)
            added = growing * losses.deep_coral(source.logits / size, other.logits / size)
        elif self.technique == "dan":
            added = growing * losses.mk_mmd(source.features, other.features)
        else:
            added = losses.mcc(other.logits)
        return known + _WEIGHTS[self.technique] * added

    def score_start(self, judged: Judged) -> Score:
        """What is trained must look better than the head alone by a margin."""
        assert judged.other is not None
        self.start_features = judged.other.features.clone()
        agreement, accuracy = self.score(judged)
        return agreement + MARGIN, accuracy

    def score(self, judged: Judged) -> Score:
        """How well neighbours among the target's images agree; then the source's accuracy."""
        assert judged.other is not None
        if self._neighbourhood is None:
            start = self.start_features.double().cpu().numpy()
            self._neighbourhood = Neighbourhood(start, self._seed)
        logits = judged.other.logits.double().numpy()
        return self._neighbourhood.agreement(logits), judged.accuracy
