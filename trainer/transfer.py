"""The ways to transfer, each from a job's data to what is to serve."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from service.contract import (
    BACKBONE_FILE,
    NETWORK_TECHNIQUES,
    Auto,
    DomainAdaptation,
    FeatureBased,
    ModelBased,
    Note,
    Progressed,
)
from service.engine.head import Floats, Head
from trainer import folds, framing, outliers
from trainer import groups as groups_of
from trainer.arrays import Bools, Ints
from trainer.backbone_file import settle
from trainer.data import Source
from trainer.divided import Divided, looks_of, unlearned
from trainer.job import Job
from trainer.looks import copied
from trainer.measuring import Measured, cross_validated, deciding
from trainer.methods import domain_adaptation, feature_based
from trainer.methods.domain_adaptation import Target
from trainer.methods.feature_based import Choice, FittedHead
from trainer.quantise import Served
from trainer.reporting import findings

if TYPE_CHECKING:
    from trainer.backbones import Backbone

Hyperparameters = dict[str, float | int | str | bool | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Transferred:
    """The result of a way to transfer, before it is checked and measured."""

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
    out_of_fold: npt.NDArray[np.floating] | None = None
    """Probabilities [n, classes] of the training images by what did not learn from them, where
    they are not those of the fitted head."""
    rounds: int = 0
    """Of that cross-validation."""
    target: Target | None = None
    target_features: Floats | None = None
    """Of the target's images, as served."""
    target_groups: Ints | None = None
    """Group numbers of the target's images."""
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
    """By the method that the job asks for; the head decides as the job asks."""
    found = _transfer(job, divided)
    learned = divided.data.train.targets[~found.held]
    head = deciding(found.served.head, learned, job.spec.decision)
    return replace(found, served=replace(found.served, head=head))


def _transfer(job: Job, divided: Divided) -> Transferred:
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


def outliers_of(found: Transferred, seed: int, false_alarms: float) -> outliers.Fitted | None:
    """Fits what tells outliers to the kind of images that the model is for; None for too few.

    Of a target domain the classes are the model's own answers, which learned from no label.
    """
    served, divided = found.served, found.divided
    width = served.features.blocks[0]

    def images(features: Floats, answers: Floats | None = None) -> outliers.Images:
        said = served.head.log_probabilities(features) if answers is None else answers
        return outliers.Images(features[:, :width], said)

    if found.target_features is None:
        train = divided.data.train
        held = train.take(found.held)
        if not len(held):
            held = divided.data.validation
        part = train.take(~found.held)
        places = outliers.sample(part.targets, seed)
        out_of_fold = found.out_of_fold
        if served.fitted is not None:
            out_of_fold = served.fitted.out_of_fold
        if out_of_fold is None:
            out_of_fold = np.full((len(part), len(served.head.classes)), np.nan, np.float32)
        learned = images(
            served.features.all_of(part.at(places.tolist())),
            outliers.logarithms(out_of_fold[places]),
        )
        targets, dealt = part.targets[places], divided.folds[~found.held][places]
        asked = images(served.features.all_of(held, "held-out images")) if len(held) else None
    else:
        every = images(found.target_features)
        assert found.target_groups is not None
        answers: Ints = every.log_probabilities.argmax(axis=1)
        order = np.random.default_rng([seed % 2**64, 0x7A6]).permutation(len(every))
        aside = len(every) // 5 or len(every)
        kept = order[aside:] if aside < len(every) else order
        kept = kept[outliers.sample(answers[kept], seed)]
        learned, asked = every.at(kept), every.at(order[:aside])
        targets, dealt = answers[kept], folds.deal(answers[kept], found.target_groups[kept])
    return outliers.fit(
        learned,
        targets,
        dealt,
        learned.at(np.empty(0, np.int64)) if asked is None else asked,
        false_alarms=false_alarms,
        is_trained=found.is_trained,
    )


def _feature_based(job: Job, method: FeatureBased, divided: Divided) -> Transferred:
    spec, data = job.spec, divided.data
    # Of a registered backbone nothing is PyTorch's.
    if spec.device == "cuda" and not job.is_registered:
        from trainer import compute

        compute.choose_device("cuda")
    further = job.framings
    if job.compared is not None and not job.compared.is_sure(data.train.digests, divided.folds):
        further = framing.BOTH
    choice = Choice(framings=further, sureness=job.sureness)
    fitted = feature_based.fit_head(
        method, data.train, divided.folds, data.classes, job.frozen, spec.seed, job.send,
        spec.threads, choice, spec.augmentation,
    )  # fmt: skip
    decoding = msgspec.structs.replace(data.train.decoding, framing=fitted.framing)
    divided = replace(divided, data=data.decoded(decoding))
    return Transferred(
        served=Served(job.frozen_file, job.frozen, fitted.head, fitted, note=job.precision_note),
        divided=divided,
        held=np.zeros(len(data.train), np.bool_),
        method="feature_based",
        used=fitted.hyperparameters,
        device=job.runtime.provider,
        precision=job.frozen.precision,
        is_trained=False,
    )


def _held_out(job: Job, divided: Divided) -> Bools:
    """Marks what a network is measured on; nothing where validation images came for that."""
    if unlearned(divided.validation, divided.train).any():
        return np.zeros(len(divided.data.train), np.bool_)
    return divided.held_out(job.spec.validation_fraction)


def _model_based(job: Job, method: ModelBased, divided: Divided) -> Transferred:
    from trainer.methods import model_based

    data, held = divided.data, _held_out(job, divided)
    head, used, device, precision = model_based.train(
        job.spec,
        method,
        data.train.take(~held),
        data.train.take(held) if held.any() else data.validation,
        data.classes,
        job.backbone,
        lambda: job.linear_probe(*divided.dealt(~held)),
        job.training_deadline,
        job.send,
    )
    return Transferred(
        served=_exported(job, head, job.backbone),
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
    divided = frozen.divided
    fitted, data = frozen.served.fitted, divided.data

    def given(fitted: FittedHead) -> auto.Given:
        unanswered = np.full((len(data.train), len(data.classes)), np.nan, np.float32)
        return auto.Given(
            spec=job.spec,
            classes=data.classes,
            learned=data.train,
            groups=divided.train,
            features=fitted.train,
            head=fitted.head,
            answers=unanswered if fitted.out_of_fold is None else fitted.out_of_fold,
            order=divided.sides,
            budget_s=job.training_budget_s,
            session=job.timed_session,
            pretrained=lambda: job.backbone,
        )

    assert fitted is not None
    refused = ""
    if job.floating is not job.frozen and not (refused := auto.refusal(given(fitted))):
        # The two that would be averaged are computed in the same floats.
        fitted = feature_based.fit_head(
            fitted.method, data.train, divided.folds, data.classes, job.floating, job.spec.seed,
            job.send_without_epochs, job.spec.threads, replace(fitted.choice, framings=()),
            job.spec.augmentation,
        )  # fmt: skip
    found = refused or auto.improve(given(fitted), job.send)
    if isinstance(found, str):
        job.send(Note("info", found))
        return replace(frozen, decisions=[found])
    job.set_frozen_aside()
    return Transferred(
        served=_exported(job, found.head, found.backbone),
        divided=divided,
        held=frozen.held,
        method="model_based",
        recipe="auto",
        used=found.hyperparameters,
        device=found.device,
        precision=found.precision,
        is_trained=True,
        network=found.backbone,
        out_of_fold=found.answers,
        rounds=auto.FOLDS,
        decisions=[found.why],
    )


def _target(
    job: Job, method: DomainAdaptation, divided: Divided, source_only: Head
) -> tuple[Target, Ints]:
    """Reads the target; returns it with the groups of its images, int64 [m].

    For those source-only's answers stand for classes, of which none is read. Nothing is
    measured on images of which the source has a copy.
    """
    spec, train = job.spec, divided.data.train
    assert spec.target is not None, "a domain adaptation has a target"
    target = domain_adaptation.load_target(
        method,
        Source.of(spec.target, spec.files),
        divided.data.classes,
        job.frozen,
        spec.threads,
        job.send,
        train.decoding,
        spec.grouping,
    )
    images = target.images
    looks, known = looks_of(images), set(train.digests)
    groups = groups_of.find(
        target.features,
        looks,
        source_only.probabilities(target.features).argmax(axis=1),
        images.given_groups or [""] * len(images),
    ).of
    is_learned = np.array([digest in known for digest in images.digests], dtype=np.bool_)
    is_learned |= copied(target.features, looks, job.frozen.of(train), looks_of(train))
    return domain_adaptation.without_learned(target, is_learned, job.send), groups


def _adapted_head(job: Job, method: DomainAdaptation, divided: Divided) -> Transferred:
    spec, data = job.spec, divided.data
    source_only = _source_only(job, divided)
    target, groups = _target(job, method, divided, source_only.head)
    found = domain_adaptation.adapt_head(
        method,
        (source_only.train, data.train.targets),
        source_only.head,
        target,
        groups,
        spec.seed,
        spec.threads,
        job.send,
    )
    return Transferred(
        served=Served(job.frozen_file, job.frozen, found.head),
        divided=divided,
        held=np.zeros(len(data.train), np.bool_),
        method="domain_adaptation",
        used=source_only.hyperparameters | found.hyperparameters,
        device=job.runtime.provider,
        precision=job.frozen.precision,
        is_trained=False,
        target=target,
        target_features=target.features,
        target_groups=groups,
        adapted=found.measured or _of_source(divided, source_only),
        adaptation=found.adaptation,
    )


def _adapted_network(job: Job, method: DomainAdaptation, divided: Divided) -> Transferred:
    from trainer.methods import network_adaptation

    spec, data = job.spec, divided.data
    source_only = _source_only(job, divided)
    target, groups = _target(job, method, divided, source_only.head)
    held = domain_adaptation.held_out(target, groups, spec.validation_fraction, spec.seed)
    # Not the job's own, which stands for the frozen file where that serves in the end.
    backbone = job.pretrained()
    trained = network_adaptation.train(
        spec,
        method,
        data.train,
        data.validation,
        data.classes,
        target.images.at(np.flatnonzero(~held).tolist()),
        backbone,
        lambda: job.linear_probe(data.train, divided.folds, data.classes),
        job.training_deadline,
        job.send,
    )
    served = _exported(job, trained.head, backbone)
    features = served.features.of(target.images, "target images")
    found = domain_adaptation.judge_network(
        method,
        (source_only.train, data.train.targets),
        source_only.head,
        target,
        groups,
        held,
        (trained.head, features),
        spec.seed,
        job.send,
    )
    if found.has_adapted:
        served = replace(served, head=found.head)
    else:
        job.publish_frozen()
        served = Served(job.frozen_file, job.frozen, found.head)
        features = target.features
    return Transferred(
        served=served,
        divided=divided,
        held=np.zeros(len(data.train), np.bool_),
        method="domain_adaptation",
        used=trained.hyperparameters | found.hyperparameters,
        device=trained.device,
        precision=trained.precision,
        is_trained=found.has_adapted,
        network=backbone if found.has_adapted else None,
        target=target,
        target_features=features,
        target_groups=groups,
        adapted=found.measured or _of_source(divided, source_only),
        adaptation=found.adaptation,
    )


def _source_only(job: Job, divided: Divided) -> FittedHead:
    """Fits the head that learns from the source alone."""
    data = divided.data
    fitted = job.first_head(data.train, divided.folds, data.classes)
    head = deciding(fitted.head, data.train.targets, job.spec.decision)
    return replace(fitted, head=head)


def _of_source(divided: Divided, source_only: FittedHead) -> list[Measured]:
    """Measures source-only on the source, where nothing is known of the target."""
    if source_only.out_of_fold is None:
        return []
    found = cross_validated(
        divided.data.train,
        divided.train,
        source_only.out_of_fold,
        ~divided.chose,
        divided.rounds,
    )
    return [replace(each, measured_on="source") for each in found]


def _exported(job: Job, head: Head, backbone: "Backbone") -> Served:
    from trainer import export

    job.stages.begin("exporting")
    job.send(Progressed("exporting", 0.0))
    file = job.out / BACKBONE_FILE
    export.to_onnx(backbone, file)
    settle(file, job.spec.precision, job.runtime)
    return Served(file, job.features_of_file(file), head)
