"""Models and versions as messages, and times and durations in any."""

from typing import Any

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from graftml_stubs.v1 import model_pb2 as pb

from service.domain import Figure, GateCheck, Manifest, MeasuredOn
from service.rpc.codec import decisions
from service.storage.version_rows import ModelRecord, VersionRecord

_LONGEST_S = 315_576_000_000
"""The longest Duration, 10 000 years, as duration.proto has it."""


def timestamp(seconds: float | None) -> Timestamp | None:
    """Converts seconds since 1970, UTC; None stays None."""
    if seconds is None:
        return None
    stamp = Timestamp()
    # Microseconds, since a float holds no more.
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp


def duration(seconds: float) -> Duration:
    """Converts seconds; longer ones than a Duration holds become the longest."""
    span = Duration()
    span.FromMicroseconds(round(max(-_LONGEST_S, min(seconds, _LONGEST_S)) * 1e6))
    return span


def model(record: ModelRecord) -> pb.Model:
    return pb.Model(
        name=record.key.name,
        create_time=timestamp(record.create_time_s),
        update_time=timestamp(record.update_time_s),
        aliases=record.aliases,
        version_count=record.version_count,
    )


def version(record: VersionRecord, manifest: Manifest) -> pb.Version:
    """Converts a published version, whose manifest this is."""
    return pb.Version(
        model=record.model.name,
        version=record.version,
        job_id=record.job_id,
        create_time=timestamp(record.create_time_s),
        method=f"TRANSFER_METHOD_{manifest.method.upper()}",
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
        serving_precision=manifest.serving_precision,
        dataset_digest=manifest.dataset_digest,
        parity=pb.Parity(
            max_difference=manifest.parity.max_difference,
            top1_agreement=manifest.parity.top1_agreement,
            image_count=manifest.parity.images,
        ),
        training_time=duration(manifest.duration_s),
        labels=manifest.labels,
        manifest_json=msgspec.json.encode(manifest).decode(),
        aliases=record.aliases,
        is_candidate=record.is_candidate,
        erased_image_count=record.erased_images,
        gate_checks=[_gate_check(check) for check in manifest.gate_checks],
        decision=decisions.message(manifest.decision),
    )


def measured_on(name: MeasuredOn) -> Any:
    """Converts the name of a set of images that figures are measured on; "" is UNSPECIFIED."""
    return pb.MeasuredOn.Value(f"MEASURED_ON_{name.upper() or 'UNSPECIFIED'}")


def _figure(figure: Figure) -> pb.Figure:
    return pb.Figure(
        measured_on=measured_on(figure.measured_on),
        accuracy=figure.accuracy,
        accuracy_low=figure.accuracy_low,
        accuracy_high=figure.accuracy_high,
        log_loss=figure.loss,
        image_count=figure.count,
        group_count=figure.groups,
    )


def _gate_check(check: GateCheck) -> pb.GateCheck:
    return pb.GateCheck(
        name=check.name,
        verdict=f"GATE_VERDICT_{check.verdict.upper()}",
        passed=check.passed,
        value=check.value,
        bound=check.bound,
        detail=check.detail,
        images_needed=check.images_needed,
    )
