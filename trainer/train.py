"""A job from its spec to its artifacts, read top to bottom."""

import hashlib
import os
import platform
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from service.errors import GraftError, Reason
from service.inference import head as heads
from service.inference import preprocess
from service.inference.head import Head
from service.inference.providers import Provider, ProviderUnavailable, choose_provider
from service.inference.runtime import OnnxRuntime
from service.jobs.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    REPORT_HTML_FILE,
    REPORT_JSON_FILE,
    DataFound,
    EpochEnded,
    FeatureBased,
    Finished,
    JobSpec,
    Manifest,
    Note,
    Progressed,
    Record,
)
from trainer import data as datasets
from trainer import evaluate, report
from trainer.methods import feature_based
from trainer.quantise import Served, quantised
from trainer.records import Send

if TYPE_CHECKING:
    from trainer.backbones import Backbone

_PACKAGES = (
    "graft-server", "torch", "torchvision", "timm", "onnx", "onnxruntime-gpu", "numpy", "scipy",
    "pillow",
)  # fmt: skip
_MAX_REJECTED = 100


def run(spec: JobSpec, tell: Send) -> Manifest:
    """Trains, exports, checks and reports; the artifacts lie in `spec.out_dir` afterwards.

    Raises GraftError when the job cannot succeed.
    """
    epochs: list[EpochEnded] = []

    def send(record: Record) -> None:
        if isinstance(record, EpochEnded):
            epochs.append(record)
        tell(record)

    def without_epochs(record: Record) -> None:
        if not isinstance(record, EpochEnded):
            tell(record)

    started, started_at = time.monotonic(), datetime.now(UTC)
    if spec.device != "cuda":
        # Who asks for answers goes before who waits for training.
        os.nice(10)
    out = Path(spec.out_dir)
    out.mkdir(parents=True, exist_ok=True)

    send(Progressed("preparing", 0.0, "reading the pictures"))
    data = datasets.load(Path(spec.data_dir), spec.validation_fraction, spec.seed, spec.threads)
    send(
        DataFound(
            data.counts(), list(data.rejected[:_MAX_REJECTED]), len(data.rejected), data.digest
        )
    )
    for warning in data.warnings:
        send(Note("warning", warning))

    send(Progressed("preparing", 0.5, f"loading {spec.backbone}"))
    # Imported here: five seconds that bad data need not wait for.
    import torch

    from trainer import backbones, compute, export
    from trainer.methods import model_based

    torch.set_num_threads(spec.threads or len(os.sched_getaffinity(0)))
    weights = backbones.weights_name(spec.backbone, spec.weights, spec.seed)
    backbone = backbones.load(spec.backbone, spec.weights, spec.seed, Path(spec.weights_dir))
    if weights.startswith("random:"):
        send(Note("warning", "the backbone starts from random weights: it was never pretrained"))
    runtime = _runtime(spec)

    def first_head() -> Head:
        frozen = runtime.load(_pretrained_file(spec, weights, backbone, out))
        fitted = feature_based.fit_head(FeatureBased(), data, frozen, spec.seed, without_epochs)
        return fitted[0]

    if isinstance(spec.method, FeatureBased):
        if spec.device == "cuda":
            compute.choose_device("cuda")
        method, recipe = "feature_based", ""
        device, precision = runtime.provider, "fp32"
        float_file = _pretrained_file(spec, weights, backbone, out)
        session = runtime.load(float_file)
        head, features, used = feature_based.fit_head(spec.method, data, session, spec.seed, send)
    else:
        method, recipe = "model_based", spec.method.recipe
        deadline = model_based.training_deadline(started, spec.time_budget_s)
        head, used, device, precision = model_based.train(
            spec, spec.method, data, backbone, first_head, deadline, send
        )
        float_file = out / BACKBONE_FILE
        send(Progressed("exporting", 0.0))
        export.to_onnx(backbone, float_file)
        session = runtime.load(float_file)
        features = feature_based.features_of(
            session, data.validation.pixels, send, "validation pictures"
        )

    send(Progressed("checking", 0.0, "PyTorch against ONNX Runtime"))
    # In full precision, where any difference is the export's fault.
    exact = OnnxRuntime(Provider("cpu", "for the check"), spec.threads).load(float_file)
    checked = data.validation.pixels[: export.PARITY_PICTURES]
    parity = export.check_parity(head, exact.run(checked), backbone, checked)

    served = Served(float_file, session, head, features)
    if spec.precision == "int8":
        known = next((k for k in spec.exported if k.weights == f"{weights}:int8"), None)
        served = quantised(spec, served, known, data, runtime, send)
    head, features = served.head, served.features
    probabilities = head.probabilities(features)
    metrics = evaluate.measure(probabilities, data.validation.targets, data.classes)

    send(Progressed("checking", 0.7, "writing the report"))
    heads.save(head, out / HEAD_FILE)
    manifest = Manifest(
        model=spec.model,
        job_id=spec.job_id,
        method=method,
        recipe=recipe,
        backbone=spec.backbone,
        weights=weights,
        backbone_digest=_sha256(served.file),
        feature_dim=head.feature_dim,
        classes=list(data.classes),
        temperature=head.temperature,
        train_count=len(data.train),
        validation_count=len(data.validation),
        validation_accuracy=metrics.accuracy,
        validation_loss=metrics.loss,
        dataset_digest=data.digest,
        rejected_count=len(data.rejected),
        seed=spec.seed,
        hyperparameters=used,
        preprocess=preprocess.describe(),
        parity=parity,
        opset=export.OPSET,
        device=device,
        precision=precision,
        provider=runtime.provider,
        serving_precision=served.session.precision,
        float_validation_accuracy=served.float_accuracy,
        precision_note=served.note,
        versions=_versions(),
        started_at=started_at.isoformat(timespec="seconds"),
        duration_s=time.monotonic() - started,
        labels=spec.labels,
    )
    (out / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    findings = report.collect(manifest, metrics, data, probabilities, epochs)
    (out / REPORT_JSON_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(findings)))
    (out / REPORT_HTML_FILE).write_text(report.to_html(findings, data), encoding="utf-8")
    send(Finished(metrics.accuracy, metrics.count))
    return manifest


def _runtime(spec: JobSpec) -> OnnxRuntime:
    try:
        return OnnxRuntime(choose_provider(spec.provider), spec.threads, spec.precision)
    except ProviderUnavailable as error:
        raise GraftError(Reason.DEVICE_UNAVAILABLE, str(error)) from error


def _pretrained_file(spec: JobSpec, weights: str, backbone: "Backbone", out: Path) -> Path:
    """The frozen backbone's ONNX file: an earlier job's, or exported now."""
    from trainer import export

    for known in spec.exported:
        if known.weights == weights and Path(known.path).exists():
            return Path(known.path)
    path = out / BACKBONE_FILE
    if not path.exists():
        export.to_onnx(backbone, path)
    return path


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
