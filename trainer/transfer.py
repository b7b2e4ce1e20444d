"""The three ways to transfer, each from a job's data to what is to serve."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from service.inference.head import Floats, Head
from service.jobs.contract import (
    BACKBONE_FILE,
    NETWORK_TECHNIQUES,
    DomainAdaptation,
    FeatureBased,
    ModelBased,
    Progressed,
)
from trainer import outliers
from trainer.data import Data, Ints, Part, Source
from trainer.job import Job
from trainer.methods import domain_adaptation, feature_based
from trainer.methods.domain_adaptation import Target
from trainer.quantise import Served
from trainer.reporting import findings

Hyperparameters = dict[str, float | int | str | bool | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Transferred:
    """What a way to transfer gave, before it is checked."""

    served: Served
    source: Data
    """As given."""
    data: Data
    """The same, but where a target's classes are known: its images are the validation part."""
    measured: Head
    """What the validation part is measured with: the served head, or the same for the source."""
    method: str
    recipe: str = ""
    used: Hyperparameters
    device: str
    precision: str
    is_trained: bool
    """The backbone is the version's own."""
    target: Target | None = None
    target_features: Floats | None = None
    """Of the target's images, as served."""
    adaptation: findings.Adaptation | None = None
    validated_on: Literal["", "source", "target"] = ""


def transfer(job: Job, data: Data) -> Transferred:
    """By the method that the job asks for."""
    match job.spec.method:
        case FeatureBased() as method:
            return _feature_based(job, method, data)
        case ModelBased() as method:
            return _model_based(job, method, data)
        case DomainAdaptation() as method if method.technique in NETWORK_TECHNIQUES:
            return _adapted_network(job, method, data)
        case DomainAdaptation() as method:
            return _adapted_head(job, method, data)


def learned_from(found: Transferred, seed: int) -> tuple[Floats, Ints, Floats]:
    """Features of the kind of images that the model is for, their classes, and held-out ones.

    Of a target domain the classes are the model's own answers.
    """
    served = found.served
    if found.target_features is None:
        part = found.data.train
        if served.fitted is not None:
            return served.fitted.train, part.targets, served.validation
        # No more than what is learned from; of a trained backbone they are not known yet.
        places = part.spread(outliers.MAX_TRAIN)
        return served.features.of(part.at(places)), part.targets[places], served.validation
    features = found.target_features
    answers: Ints = served.head.probabilities(features).argmax(axis=1)
    order = np.random.default_rng([seed % 2**64, 0x7A6]).permutation(len(features))
    held = len(features) // 5 or len(features)
    kept = order[held:] if held < len(features) else order
    return features[kept], answers[kept], features[order[:held]]


def _feature_based(job: Job, method: FeatureBased, data: Data) -> Transferred:
    spec = job.spec
    if spec.device == "cuda":
        from trainer import compute

        compute.choose_device("cuda")
    fitted = feature_based.fit_head(method, data, job.frozen, spec.seed, job.send, spec.threads)
    served = Served(job.frozen_file, job.frozen, fitted.head, fitted.validation, fitted)
    return Transferred(
        served=served,
        source=data,
        data=data,
        measured=fitted.head,
        method="feature_based",
        used=fitted.hyperparameters,
        device=job.runtime.provider,
        precision=job.frozen.precision,
        is_trained=False,
    )


def _model_based(job: Job, method: ModelBased, data: Data) -> Transferred:
    from trainer.methods import model_based

    deadline = model_based.training_deadline(job.started, job.spec.time_budget_s)
    head, used, device, precision = model_based.train(
        job.spec, method, data, job.backbone, lambda: job.first_head(data), deadline, job.send
    )
    return Transferred(
        served=_exported(job, head, data),
        source=data,
        data=data,
        measured=head,
        method="model_based",
        recipe=method.recipe,
        used=used,
        device=device,
        precision=precision,
        is_trained=True,
    )


def _adapted_head(job: Job, method: DomainAdaptation, data: Data) -> Transferred:
    target = _target(job, method, data)
    train = job.frozen.of(data.train, "training images")
    found = domain_adaptation.adapt_head(method, data, train, target, job.spec.seed, job.send)
    source, measured = data, found.source_head
    if target.labelled is not None:
        data, measured = _measured_on(data, target.labelled, target), found.head
    validation = job.frozen.of(data.validation, "validation images")
    return Transferred(
        served=Served(job.frozen_file, job.frozen, found.head, validation),
        source=source,
        data=data,
        measured=measured,
        method="domain_adaptation",
        used=found.hyperparameters,
        device=job.runtime.provider,
        precision=job.frozen.precision,
        is_trained=False,
        target=target,
        target_features=target.features,
        adaptation=domain_adaptation.of_frozen(method, found, target),
        validated_on="source" if target.labelled is None else "target",
    )


def _adapted_network(job: Job, method: DomainAdaptation, data: Data) -> Transferred:
    from trainer.methods import model_based, network_adaptation

    target = _target(job, method, data)
    frozen = job.frozen.of(data.train, "training images")
    source_only = job.first_head(data)
    deadline = model_based.training_deadline(job.started, job.spec.time_budget_s)
    head, used, device, precision = network_adaptation.train(
        job.spec,
        method,
        data,
        target.images,
        job.backbone,
        lambda: source_only,
        deadline,
        job.send,
    )
    has_adapted = used["best_epoch"] != 0
    source = data
    if target.labelled is not None:
        data = _measured_on(data, target.labelled, target)
    served = _exported(job, head, data)
    adapted = served.features.of(target.images, "target images")
    trained = served.features.of(source.train, "training images")
    adaptation = domain_adaptation.of_network(
        method,
        head=head,
        has_adapted=has_adapted,
        source_only=source_only,
        target=target,
        train=(frozen, trained),
        adapted=adapted,
        seed=job.spec.seed,
    )
    return Transferred(
        served=served,
        source=source,
        data=data,
        measured=head,
        method="domain_adaptation",
        used=used,
        device=device,
        precision=precision,
        is_trained=True,
        target=target,
        target_features=adapted,
        adaptation=adaptation,
        validated_on="source" if target.labelled is None else "target",
    )


def _measured_on(data: Data, labelled: Part, target: Target) -> Data:
    # What the source holds back for a test says nothing of the target.
    return replace(
        data, validation=labelled, test=data.test.none(), names=data.names | target.images.names
    )


def _target(job: Job, method: DomainAdaptation, data: Data) -> Target:
    spec = job.spec
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


def _exported(job: Job, head: Head, data: Data) -> Served:
    from trainer import export

    job.stages.begin("exporting")
    job.send(Progressed("exporting", 0.0))
    file = job.out / BACKBONE_FILE
    export.to_onnx(job.backbone, file)
    features = job.features_of_file(file)
    return Served(file, features, head, features.of(data.validation, "validation images"))
