"""Between what is stored and the contract's messages; decides nothing."""

from typing import Any

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from graft.v1 import dataset_pb2, model_pb2

from service.domain import (
    ClassCount,
    Figure,
    GateCheck,
    LeftOutReason,
    Manifest,
    MeasuredOn,
    PartName,
    ReadSummary,
    plain_name,
)
from service.errors import InvalidInput, Reason
from service.ingest.archives import ArchiveFormat
from service.rpc import convert_decisions
from service.storage.datasets import DatasetRecord
from service.storage.models import ModelRecord, VersionRecord

SPLITS: dict[int, PartName] = {
    dataset_pb2.SPLIT_UNSPECIFIED: "",
    dataset_pb2.SPLIT_TRAIN: "train",
    dataset_pb2.SPLIT_VALIDATION: "val",
    dataset_pb2.SPLIT_TEST: "test",
}
_REASONS = {
    reason: dataset_pb2.LeftOutReason.Name(
        dataset_pb2.LeftOutReason.Value(f"LEFT_OUT_REASON_{reason.name}")
    )
    for reason in LeftOutReason
}

_ARCHIVE_FORMATS: dict[int, ArchiveFormat] = {
    dataset_pb2.ARCHIVE_FORMAT_UNSPECIFIED: "",
    dataset_pb2.ARCHIVE_FORMAT_TAR: "tar",
    dataset_pb2.ARCHIVE_FORMAT_TAR_GZ: "tar.gz",
    dataset_pb2.ARCHIVE_FORMAT_ZIP: "zip",
}

_LONGEST_S = 315_576_000_000
"""As duration.proto has it."""

_METHODS = {
    "feature_based": model_pb2.TRANSFER_METHOD_FEATURE_BASED,
    "model_based": model_pb2.TRANSFER_METHOD_MODEL_BASED,
    "domain_adaptation": model_pb2.TRANSFER_METHOD_DOMAIN_ADAPTATION,
}
_VERDICTS = {
    "passed": model_pb2.GATE_VERDICT_PASSED,
    "failed": model_pb2.GATE_VERDICT_FAILED,
    "undecided": model_pb2.GATE_VERDICT_UNDECIDED,
}


def archive_format(value: int) -> ArchiveFormat:
    """The storage's word for a format; raises InvalidInput for an unknown number."""
    if value not in _ARCHIVE_FORMATS:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"header.format {value} is none: use a value of ArchiveFormat",
            field="header.format",
        )
    return _ARCHIVE_FORMATS[value]


def timestamp(seconds: float | None) -> Timestamp | None:
    """From seconds since 1970, UTC; nothing stays nothing."""
    if seconds is None:
        return None
    stamp = Timestamp()
    # Microseconds, since a float holds no more.
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def duration(seconds: float) -> Duration:
    """From seconds; longer ones are told as the longest there is, 10 000 years."""
    span = Duration()
    span.FromMicroseconds(round(max(-_LONGEST_S, min(seconds, _LONGEST_S)) * 1e6))
    return span


def class_counts(counts: list[ClassCount]) -> list[dataset_pb2.ClassCount]:
    """Images per class."""
    return [
        dataset_pb2.ClassCount(
            label=count.label,
            train_count=count.train,
            validation_count=count.validation,
            test_count=count.test,
        )
        for count in counts
    ]


def read_summary(summary: ReadSummary) -> dataset_pb2.ReadSummary:
    """Converts the summary of what became of a dataset's files."""
    return dataset_pb2.ReadSummary(
        seen_count=summary.seen,
        used_count=summary.used,
        left_out=[
            dataset_pb2.LeftOut(reason=_REASONS[row.reason], label=row.label, count=row.count)
            for row in summary.left_out
        ],
        left_out_files=[
            dataset_pb2.LeftOutFile(
                path=file.path,
                label=file.label,
                reason=_REASONS[file.reason],
                detail=file.detail,
            )
            for file in summary.files
        ],
        nested_count=summary.nested,
        warnings=summary.warnings,
    )


def dataset(record: DatasetRecord) -> dataset_pb2.Dataset:
    """A stored dataset."""
    return dataset_pb2.Dataset(
        dataset_id=record.dataset_id,
        display_name=record.display_name,
        digest=record.digest,
        create_time=timestamp(record.create_time_s),
        size_bytes=record.size_bytes,
        classes=class_counts(record.classes),
        image_count=record.image_count,
        summary=read_summary(record.summary),
        is_unlabelled=record.is_unlabelled,
        case_sensitive_labels=record.case_sensitive,
    )


def model(record: ModelRecord) -> model_pb2.Model:
    """A model."""
    return model_pb2.Model(
        name=plain_name(record.name),
        create_time=timestamp(record.create_time_s),
        update_time=timestamp(record.update_time_s),
        aliases=record.aliases,
        version_count=record.version_count,
        falling_back_aliases=record.falling_back,
    )


def version(record: VersionRecord, damage: str) -> model_pb2.Version:
    """A published version, and what is known to be wrong with its files."""
    manifest: Manifest = record.manifest
    return model_pb2.Version(
        model=plain_name(record.model),
        version=record.version,
        job_id=record.job_id,
        create_time=timestamp(record.create_time_s),
        method=_METHODS.get(manifest.method, model_pb2.TRANSFER_METHOD_UNSPECIFIED),
        backbone=manifest.backbone,
        weights=manifest.weights,
        weights_licence=manifest.weights_licence,
        backbone_digest=record.backbone_digest,
        classes=manifest.classes,
        figures=[_figure(figure) for figure in manifest.figures],
        calibrated=manifest.calibrated,
        calibration_note=manifest.calibration_note,
        image_size=manifest.decoding.size,
        sees_whole_image=manifest.decoding.framing == "whole",
        dataset_digest=manifest.dataset_digest,
        parity=model_pb2.Parity(
            max_difference=manifest.parity.max_difference,
            top1_agreement=manifest.parity.top1_agreement,
            image_count=manifest.parity.images,
        ),
        training_time=duration(manifest.duration_s),
        labels=manifest.labels,
        manifest_json=msgspec.json.encode(manifest).decode(),
        aliases=record.aliases,
        is_candidate=record.is_candidate,
        damage=damage,
        gate_checks=[_gate_check(check) for check in manifest.gate_checks],
        decision=convert_decisions.asked(manifest.decision),
    )


def measured_on(name: MeasuredOn) -> Any:
    """Converts the name of what was measured on; "" is UNSPECIFIED."""
    return model_pb2.MeasuredOn.Value(f"MEASURED_ON_{name.upper() or 'UNSPECIFIED'}")


def _figure(figure: Figure) -> model_pb2.Figure:
    return model_pb2.Figure(
        measured_on=measured_on(figure.measured_on),
        accuracy=figure.accuracy,
        accuracy_low=figure.accuracy_low,
        accuracy_high=figure.accuracy_high,
        log_loss=figure.loss,
        image_count=figure.count,
        group_count=figure.groups,
    )


def _gate_check(check: GateCheck) -> model_pb2.GateCheck:
    return model_pb2.GateCheck(
        name=check.name,
        verdict=_VERDICTS[check.verdict],
        passed=check.passed,
        value=check.value,
        bound=check.bound,
        detail=check.detail,
        images_needed=check.images_needed,
    )
