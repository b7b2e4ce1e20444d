"""The ways to transfer, each from a job's data to what is to serve."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from service.inference.head import Floats, Head
from service.jobs.contract import (
    BACKBONE_FILE,
    NETWORK_TECHNIQUES,
    Auto,
    DomainAdaptation,
    FeatureBased,
    ModelBased,
    Progressed,
)
from trainer import folds, outliers
from trainer.data import Bools, Ints, Source
from trainer.divided import Divided
from trainer.job import Job
from trainer.measuring import Measured
from trainer.methods import domain_adaptation, feature_based
from trainer.methods.domain_adaptation import Target
from trainer.methods.feature_based import FittedHead
from trainer.quantise import Served
from trainer.reporting import findings

if TYPE_CHECKING:
    from trainer.backbones import Backbone

Doubles = npt.NDArray[np.float64]
Hyperparameters = dict[str, float | int | str | bool | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Transferred:
    """What a way to transfer gave, before it is checked and measured."""

    served: Served
    divided: Divided
    """The data; of a domain adaptation, the source's."""
    held: Bools
    """Training images [n] that were held out and not learned from."""
    method: str
    recipe: str = ""
    used: Hyperparameters
    device: str
    precision: str
    is_trained: bool
    """The backbone is the version's own."""
    network: "Backbone | None" = None
    """What was trained, where it is another than the job's backbone."""
    out_of_fold: Doubles | None = None
    """Probabilities [n, classes] of the training images by what did not learn from them, where
    they are not those of the fitted head."""
    target: Target | None = None
    target_features: Floats | None = None
    """Of the target's images, as served."""
    adapted: list[Measured] = field(default_factory=list)
    """What a domain adaptation is measured on."""
    adaptation: findings.Adaptation | None = None
    decisions: list[str] = field(default_factory=list)
    """What was decided on the way and why, for people."""

    @property
    def learned_groups(self) -> Ints:
        """Group numbers of the images that were learned from."""
        return self.divided.train[~self.held]


def transfer(job: Job, divided: Divided) -> Transferred:
    """By the method that the job asks for."""
    match job.spec.method:
        case Auto():
            return _auto(job, divided)
        case FeatureBased() as method:
            return _feature_based(job, method, divided)
        case ModelBased() as method:
            return _model_based(job, method, divided)
        case DomainAdaptation() as method if method.technique in NETWORK_TECHNIQUES:
            return _adapted_network(job, method, divided)
        case DomainAdaptation() as method:
            return _adapted_head(job, method, divided)


def learned_from(found: Transferred, seed: int) -> tuple[Floats, Ints, Floats]:
    """Features of the kind of images that the model is for, their classes, and held-out ones.

    Of a target domain the classes are the model's own answers.
    """
    served, data = found.served, found.divided.data
    if found.target_features is None:
        part = data.train.take(~found.held)
        held = data.train.take(found.held)
        if not len(held):
            held = data.validation
        none = np.empty((0, served.head.feature_dim), np.float32)
        asked = served.features.of(held, "held-out images") if len(held) else none
        if served.fitted is not None:
            return served.fitted.train, part.targets, asked
        # No more than what is learned from; of a trained backbone they are not known yet.
        places = part.spread(outliers.MAX_TRAIN)
        return served.features.of(part.at(places)), part.targets[places], asked
    features = found.target_features
    answers: Ints = served.head.probabilities(features).argmax(axis=1)
    order = np.random.default_rng([seed % 2**64, 0x7A6]).permutation(len(features))
    aside = len(features) // 5 or len(features)
    kept = order[aside:] if aside < len(features) else order
    return features[kept], answers[kept], features[order[:aside]]


def _feature_based(job: Job, method: FeatureBased, divided: Divided) -> Transferred:
    spec, data = job.spec, divided.data
    if spec.device == "cuda":
        from trainer import compute

        compute.choose_device("cuda")
    fitted = feature_based.fit_head(
        method, data.train, divided.folds, data.classes, job.frozen, spec.seed, job.send,
        spec.threads,
    )  # fmt: skip
    return Transferred(
        served=Served(job.frozen_file, job.frozen, fitted.head, fitted),
        divided=divided,
        held=np.zeros(len(data.train), np.bool_),
        method="feature_based",
        used=fitted.hyperparameters,
        device=job.runtime.provider,
        precision=job.frozen.precision,
        is_trained=False,
    )


def _held_out(job: Job, divided: Divided) -> Bools:
    """Marks what a network is measured on; nothing where validation images came with the data."""
    if len(divided.data.validation):
        return np.zeros(len(divided.data.train), np.bool_)
    return divided.held_out(job.spec.validation_fraction)


def _first_head(job: Job, divided: Divided, learned: Bools) -> FittedHead:
    part = divided.data.train.take(learned)
    dealt = folds.deal(part.targets, divided.train[learned], divided.sides[learned])
    return job.first_head(part, dealt, divided.data.classes)


def _model_based(job: Job, method: ModelBased, divided: Divided) -> Transferred:
    from trainer.methods import model_based

    data, held = divided.data, _held_out(job, divided)
    deadline = model_based.training_deadline(job.started, job.spec.time_budget_s)
    head, used, device, precision = model_based.train(
        job.spec,
        method,
        data.train.take(~held),
        data.train.take(held) if held.any() else data.validation,
        data.classes,
        job.backbone,
        lambda: _first_head(job, divided, ~held).head,
        deadline,
        job.send,
        digest=data.digest,
    )
    return Transferred(
        served=_exported(job, head),
        divided=divided,
        held=held,
        method="model_based",
        recipe=method.recipe,
        used=used,
        device=device,
        precision=precision,
        is_trained=True,
    )


def _auto(job: Job, divided: Divided) -> Transferred:
    from trainer.methods import auto

    frozen = _feature_based(job, FeatureBased(), divided)
    raise NotImplementedError(auto, frozen)


def _target(job: Job, method: DomainAdaptation, divided: Divided) -> Target:
    spec, data = job.spec, divided.data
    return domain_adaptation.load_target(
        method,
        Source(Path(spec.target_dir), spec.target_index),
        data.classes,
        job.frozen,
        data.train.digests,
        spec.threads,
        job.send,
        data.train.decoding,
    )


def _adapted_head(job: Job, method: DomainAdaptation, divided: Divided) -> Transferred:
    raise NotImplementedError


def _adapted_network(job: Job, method: DomainAdaptation, divided: Divided) -> Transferred:
    raise NotImplementedError


def _exported(job: Job, head: Head) -> Served:
    from trainer import export

    job.stages.begin("exporting")
    job.send(Progressed("exporting", 0.0))
    file = job.out / BACKBONE_FILE
    export.to_onnx(job.backbone, file)
    return Served(file, job.features_of_file(file), head)
