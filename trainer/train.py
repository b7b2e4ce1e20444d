"""A job from its spec to its artifacts, read top to bottom."""

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from service.contract import (
    ANSWERS_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
    BackbonesRanked,
    DataFound,
    Finished,
    JobSpec,
    Manifest,
    Note,
    PretrainedBackbone,
    Progressed,
    form_name,
)
from service.domain import DEFAULT_DECODING, Framing, Parity
from service.engine import head as heads
from service.engine import outliers as strangeness
from service.engine import preprocess
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import InvalidInput, Reason
from service.ingest.names import shown
from service.ops import failpoints
from trainer import answers, evaluate, growth, judgement, outliers, parity
from trainer import data as datasets
from trainer.answers import Role, Rows
from trainer.arrays import Ints
from trainer.backbone_file import BackboneFile
from trainer.data import Files, Source
from trainer.division import listed
from trainer.features import Features
from trainer.job import Job
from trainer.measuring import Measured, copies, is_calibrated, measure
from trainer.quantisation_cost import Answers
from trainer.quantise import Served, quantised
from trainer.records import Send
from trainer.reporting import findings, page, report, rules
from trainer.reporting.comparisons import Comparison
from trainer.reporting.measured_on import headline as headline_of
from trainer.transfer import Transferred, outliers_of, transfer

_PACKAGES = (
    "graft-server", "torch", "torchvision", "timm", "onnx", "onnxruntime-gpu", "numpy", "scipy",
    "pillow", "pi-heif",
)  # fmt: skip


def run(spec: JobSpec, tell: Send) -> Manifest:
    """Trains, exports, checks and reports; the artifacts lie in `spec.out_dir` afterwards.

    Raises GraftError when the job cannot succeed.
    """
    job = Job(spec, tell)
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        return _run(job)
    finally:
        job.close()


def _run(job: Job) -> Manifest:
    spec, send, stages = job.spec, job.send, job.stages
    is_chosen = spec.backbone == "auto"
    if not is_chosen:
        job.start_from(
            PretrainedBackbone(backbone=spec.backbone, weights=spec.weights, exported=spec.exported)
        )

    send(Progressed("preparing", 0.0, "reading the images"))
    data = datasets.load(
        Source.of(spec.data, spec.files),
        spec.threads,
        bases=[Source.of(base, spec.files) for base in spec.base_data],
        base_digest=spec.base_digest,
        case_sensitive=spec.case_sensitive_labels,
        background=spec.background,
        target_bit_depth=_target_bit_depth(spec),
        grouping=spec.grouping,
    )
    failpoints.reach("trainer.validating")
    send(DataFound(data.counts(), data.summary, data.digest))
    if (bits := data.train.decoding.bit_depth) != DEFAULT_DECODING.bit_depth:
        text = (
            f"the 16-bit grey images hold values of {bits} bits at most: {2**bits - 1} is taken "
            "for white, for images to classify too"
        )
        send(Note("info", text))
    for warning in data.warnings:
        send(Note("warning", warning))
    if spec.gate and (strange := sorted({*spec.gate.class_recalls} - {*data.classes})):
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"the gate names classes that the images do not have: {listed(map(shown, strange))}; "
            f"theirs are {listed(map(shown, data.classes))}",
            field="gate.class_recalls",
        )
    spec.decision.check_classes(data.classes, "decision")
    if spec.gate and spec.gate.not_worse_than and spec.incumbent is None:
        text = (
            f"no version is behind the alias {spec.gate.not_worse_than!r}: the gate compares with "
            "none"
        )
        send(Note("warning", text))
    ranked = None
    if is_chosen:
        stages.begin("choosing the backbone")
        ranked = job.choose_backbone(data.train)

    framing: Framing = "whole" if spec.framing == "whole" else "crop"
    decoding = data.train.decoding
    data = data.decoded(msgspec.structs.replace(decoding, size=job.size, framing=framing))

    stages.begin("features")
    divided = job.divided(job.framed(data))
    stages.begin("training")
    found = transfer(job, divided)
    # Framed as was chosen.
    spec, data = job.spec, found.divided.data

    stages.begin("checking")
    agreed = _agreed(job, found)
    if spec.precision == "int8":
        stages.begin("quantising")
        found = _quantised(job, found)
    stages.begin("measuring")
    found, sets = measure(found)
    for text in copies(found):
        send(Note("warning", text))
    served = found.served
    headline = headline_of(sets)
    metrics = None
    if headline is not None:
        metrics = evaluate.measure(
            headline.probabilities,
            headline.part.targets,
            data.classes,
            headline.groups,
            answers=headline.answers,
            is_crossed=headline.rounds > 0,
        )
    calibrated, note = is_calibrated(sets)

    stages.begin("judging")
    send(Progressed("checking", 0.4, "what the transfer was worth"))
    rate = spec.outlier_false_alarm_rate
    known = outliers_of(found, spec.seed, outliers.FALSE_ALARMS if rate is None else rate)
    if known is not None and known.warning:
        send(Note("info" if rate is None else "warning", known.warning))
    head = replace(
        served.head, outliers=known.outliers if known else None, is_calibrated=calibrated
    )
    gate_checks = judgement.gate_checks(job, found, sets, metrics, agreed)
    compared = judgement.compared(job, found, headline)

    stages.begin("reporting")
    send(Progressed("checking", 0.7, "writing the report"))
    heads.save(head, job.out / HEAD_FILE)
    some = data.train.at(data.train.spread(parity.IMAGES))
    parity.check_head(job.out / HEAD_FILE, head, served.features.all_of(some))
    answers.save(job.out / ANSWERS_FILE, data.classes, _answers(found, sets))
    failpoints.reach("trainer.reporting")
    learned = data.train.take(~found.held)
    is_shared = not found.is_trained and not job.is_registered
    manifest = Manifest(
        model=spec.model,
        job_id=spec.job_id,
        method=found.method,
        recipe=found.recipe,
        backbone=spec.backbone,
        weights=job.weights,
        weights_licence=job.weights_licence,
        backbone_digest=_sha256(served.file),
        feature_dim=head.feature_dim,
        classes=list(data.classes),
        temperature=head.temperature,
        train_count=len(learned),
        train_groups=len(np.unique(found.learned_groups)),
        figures=[each.figure() for each in sets],
        calibrated=calibrated,
        calibration_note=note,
        dataset_digest=data.digest,
        reading=data.summary,
        seed=spec.seed,
        hyperparameters=found.used
        | {"outlier_false_alarm_rate": known.false_alarms if known else None},
        preprocess=preprocess.describe(data.train.decoding),
        decoding=data.train.decoding,
        decision=spec.decision,
        parity=agreed,
        reference_digest=job.reference_digest if is_shared else "",
        backbone_difference=job.reference.max_difference if is_shared else None,
        opset=job.opset,
        device=found.device,
        precision=found.precision,
        provider=job.runtime.provider,
        serving_precision=served.features.precision,
        quantisation=served.cost,
        precision_note=served.note,
        versions=_versions(),
        started_at=job.started_at.isoformat(timespec="seconds"),
        duration_s=time.monotonic() - job.started,
        labels=spec.labels,
        gate_checks=gate_checks,
        incumbent_version=spec.incumbent.version if spec.incumbent else None,
        base=spec.base,
        weights_asked=spec.weights,
        grouping=spec.grouping,
        augmentation=spec.augmentation,
        case_sensitive_labels=spec.case_sensitive_labels,
        technique=found.adaptation.published if found.adaptation else "",
        target_digest=found.target.images.digest if found.target else "",
        stages_s=stages.seconds(),
    )
    (job.out / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    written = report.collect(
        manifest,
        data,
        sets,
        metrics,
        job.epochs,
        _findings(found, sets, compared, known, ranked, spec),
        decisions=found.decisions,
    )
    (job.out / REPORT_JSON_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(written)))
    (job.out / REPORT_HTML_FILE).write_text(page.to_html(written, data, sets), encoding="utf-8")
    failpoints.reach("trainer.finished")
    send(Finished(metrics.accuracy if metrics else None, metrics.count if metrics else 0))
    failpoints.reach("trainer.sent")
    return manifest


def _target_bit_depth(spec: JobSpec) -> int:
    if spec.target is None:
        return 0
    target = Source.of(spec.target, spec.files)
    return target.read(spec.threads, is_labelled=False).bit_depth


def _answers(found: Transferred, sets: Sequence[Measured]) -> list[Rows]:
    """Collects every image of the job with what is known of it, for the jobs to come."""
    divided, target = found.divided, found.target
    train = divided.data.train
    side = dict(zip(train.digests, divided.sides.tolist(), strict=True))
    # Groups of the target have numbers of their own, after those of the data.
    after = divided.found.count
    rows, told = [], set[str]()

    def add(
        role: Role, part: Files, targets: Ints, groups: Ints, measured: Measured | None = None
    ) -> None:
        sides = np.array([side.get(digest, np.nan) for digest in part.digests])
        shares = None if measured is None else measured.probabilities
        answers = None if measured is None else measured.answers
        rows.append(Rows(role, part.digests, targets, groups, shares, answers, sides))
        told.update(part.digests)

    for each in sets:
        # Of an adapted version they are not its own answers, but those of the source's head.
        if each.measured_on != "source":
            role = Role.OUT_OF_FOLD if each.rounds else Role.HELD_OUT
            groups = each.groups + after if each.measured_on == "target" else each.groups
            add(role, each.part, each.part.targets, groups, each)
    untold = np.array([digest not in told for digest in train.digests], dtype=np.bool_)
    for mask, role in ((untold & ~found.held, Role.LEARNED), (untold & found.held, Role.HELD_OUT)):
        part = train.take(mask)
        add(role, part, part.targets, divided.train[mask])
    if target is not None and found.target_groups is not None:
        # What was adapted to was learned from, though without classes.
        places = [i for i, digest in enumerate(target.images.digests) if digest not in told]
        none = np.full(len(places), -1, np.int64)
        add(Role.LEARNED, target.images.at(places), none, found.target_groups[places] + after)
    return rows


def _findings(
    found: Transferred,
    sets: Sequence[Measured],
    compared: Sequence[Comparison],
    known: outliers.Fitted | None,
    ranked: BackbonesRanked | None,
    spec: JobSpec,
) -> findings.Findings:
    divided, data = found.divided, found.divided.data
    parts = (data.train, data.validation, data.test)
    grouped, contradictions = findings.grouped(
        divided.found,
        np.concatenate([part.targets for part in parts]),
        any(name for part in parts for name in part.given_groups),
    )
    is_adapted, headline = found.target is not None, headline_of(sets)
    return findings.Findings(
        comparisons=list(compared),
        suspects=findings.suspects([] if is_adapted else sets, len(data.classes)),
        grouped=grouped,
        contradictions=contradictions,
        adaptation=found.adaptation,
        backbones=ranked,
        out_of_distribution=None if known is None else _out_of_distribution(found, known),
        growth=growth.told(spec, data),
        rules=None if headline is None else rules.compared(found.served.head, headline),
    )


def _out_of_distribution(found: Transferred, known: outliers.Fitted) -> findings.OutOfDistribution:
    images, reference = "training images", "other training images"
    if found.target is not None:
        images, reference = "target images kept aside for this", "other target images"
    elif found.held.any():
        images, reference = "held-out images", "training images"
    elif len(found.divided.data.validation):
        images, reference = "validation images", "training images"
    return findings.out_of_distribution(
        known.scores, 1.0, known.false_alarms, strangeness.METHOD, images, reference
    )


def _quantised(job: Job, found: Transferred) -> Transferred:
    if found.target is not None:
        note = "a version that was adapted to a domain is not quantised: it is served in float"
        job.send(Note("info", note))
        return replace(found, served=replace(found.served, note=note))
    if found.out_of_fold is not None:
        note = "a version that averages two networks is not quantised: it is served in float"
        job.send(Note("info", note))
        return replace(found, served=replace(found.served, note=note))
    shared = next(
        (e for e in job.spec.exported if e.weights == form_name(job.weights, "int8")), None
    )
    cache = None if found.is_trained else job.cache
    train = found.divided.data.train

    learned = train.take(~found.held)

    def answers(served: Served) -> Answers:
        divided = found.divided
        if served.fitted is not None and served.fitted.out_of_fold is not None:
            there = ~np.isnan(served.fitted.out_of_fold[:, 0])
            probabilities = served.fitted.out_of_fold[there]
            targets, groups = train.targets[there], divided.train[there]
        else:
            part, groups = divided.data.validation, divided.validation
            if found.held.any():
                part, groups = train.take(found.held), divided.train[found.held]
            probabilities = np.empty((0, len(served.head.classes)), np.float32)
            if len(part):
                probabilities = served.head.probabilities(served.features.all_of(part))
            targets = part.targets
        return Answers(probabilities, served.head.decide(probabilities), targets, groups)

    served = quantised(
        job.spec, found.served, shared, learned, found.divided.folds, answers, job.runtime, cache,
        job.send,
    )  # fmt: skip
    return replace(found, served=served)


def _agreed(job: Job, found: Transferred) -> Parity:
    """Compares what serves with what it was made of."""
    head, train = found.served.head, found.divided.data.train

    def told(title: str) -> str:
        job.send(Progressed("checking", 0.0, f"{title} against what serves"))
        return title

    if job.is_registered and job.plain is not None:
        # There is no network but the file itself, which was checked when it was registered.
        title = told("ONNX Runtime on the CPU")
        checked = train.at(train.spread(parity.PLAIN_IMAGES))
        plain = _on_cpu(job, job.file(job.plain.digest), job.plain.digest)
        wanted = Features(plain, job.cache, job.spec.threads).all_of(checked)
        return parity.compare(head, _exact(job, found).all_of(checked), wanted, title)
    title = told("PyTorch")
    if found.is_trained:
        from trainer import export

        places = train.spread(parity.IMAGES)
        served = _exact(job, found).all_of(train.at(places))
        pixels = train.decode(places, job.spec.threads)
        wanted = export.torch_features(found.network or job.backbone, pixels)
    else:
        wanted, served = job.reference.features, job.reference.served
        # Where int8 serves, its floats are compared, which no job need load for this alone.
        if job.floating is job.frozen:
            served = _exact(job, found).of_probes(job.reference.probes, job.reference.name)
    return parity.compare(head, served, wanted, title)


def _on_cpu(job: Job, file: Path, digest: str) -> BackboneFile:
    """Returns a file as ONNX Runtime computes it on the CPU in full precision."""
    runtime = OnnxRuntime(Provider("cpu", "for the check"), job.spec.threads, is_narrow=True)
    return BackboneFile(file, runtime, digest)


def _exact(job: Job, found: Transferred) -> Features:
    """What serves, in full precision, where any difference is the export's fault."""
    served = found.served
    if not found.is_trained and job.floating is not job.frozen:
        return job.floating
    # A GPU rounds the factors of its products, even of what it calls fp32.
    if not job.runtime.is_gpu and served.features.precision == "fp32":
        return served.features
    if found.is_trained:
        return Features(_on_cpu(job, served.file, ""), None, job.spec.threads)
    digest = job.known.digest if job.known else ""
    return Features(_on_cpu(job, served.file, digest), job.cache, job.spec.threads)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # The plain onnxruntime has another package's name.
            continue
    return versions
