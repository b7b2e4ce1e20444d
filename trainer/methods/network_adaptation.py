"""Whole-network domain adaptation, experimental: trained until domains look alike to it.

The one method is CDAN+E (Long et al. 2018, Conditional Adversarial Domain Adaptation).
Adaptation on frozen features is the usual way: on the images at hand it was better, in a
tenth of the time. The loop is model-based transfer's; each batch has as many images of the
target as of the source. Both go through the network together: frozen BatchNorms make no
difference between together and apart, and where they learn, the one set of statistics that
serves must be the one that is trained with. No class of the target is read, and nothing is
chosen here: whether the network or source-only serves, `domain_adaptation` decides.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from service.contract import NETWORK_TECHNIQUES, DomainAdaptation, JobSpec
from service.engine.head import Head
from trainer import checkpoint, crops
from trainer.adaptation import losses
from trainer.backbones import Backbone
from trainer.data import Files, Part
from trainer.images import AsServed, Images
from trainer.methods import model_based
from trainer.methods.model_based import Objective, Outputs
from trainer.recipes import adaptation_settings
from trainer.records import Send

_OTHER_SEED = 0x7A26


def train(
    spec: JobSpec,
    method: DomainAdaptation,
    learned: Part,
    held_out: Part,
    classes: tuple[str, ...],
    target: Files,
    backbone: Backbone,
    linear_probe: Callable[[], Head],
    deadline: float | None,
    send: Send,
) -> model_based.Result:
    """Trains the backbone in place, as `model_based.train`, with images of the target domain."""
    assert method.technique in NETWORK_TECHNIQUES, method.technique
    recipe = adaptation_settings(method, is_pretrained=spec.weights != "random")
    drawn = crops.views(spec.augmentation, recipe.min_scale)
    folder = Path(spec.out_dir) if Path(spec.out_dir).is_dir() else None
    torch.manual_seed(spec.seed)
    seed, threads = spec.seed, spec.threads
    inputs = Images(learned, drawn, seed, threads, folder, 3, spec.device)
    others = Images(target, drawn, seed ^ _OTHER_SEED, threads, folder, 3, spec.device)
    work = model_based.Work(
        spec=spec,
        recipe=recipe,
        classes=classes,
        backbone=backbone,
        body=backbone,
        inputs=inputs,
        targets=learned.targets,
        judged=AsServed(held_out, threads, caches=3),
        judged_targets=held_out.targets,
        linear_probe=linear_probe,
        objective=Adaptation(recipe.label_smoothing, backbone.feature_dim, len(classes)),
        others=others,
        key=checkpoint.key(spec, method, recipe, learned, *target.digests),
    )
    try:
        result = model_based.run(work, deadline, send)
    finally:
        inputs.close()
        others.close()
    used = result.hyperparameters | asdict(drawn) | {"technique": method.technique}
    return result._replace(hyperparameters=used)


class Adaptation(Objective):
    """The source's cross-entropy and, in growing part, CDAN+E's."""

    def __init__(self, label_smoothing: float, feature_dim: int, classes: int) -> None:
        super().__init__(label_smoothing)
        self.multilinear = losses.Multilinear(feature_dim, classes)
        self.domains = losses.DomainClassifier(self.multilinear.dim)

    def forward(
        self, source: Outputs, targets: Tensor, other: Outputs | None, done: float
    ) -> Tensor:
        """See `Objective`; `other` must be given."""
        assert other is not None
        known = super().forward(source, targets, None, done)
        growing = losses.adversarial_weight(done)
        return known + losses.cdan(self.domains, self.multilinear, source, other, growing)
