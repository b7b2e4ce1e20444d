"""Conversion of the service's messages to the client's values. Pure."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from graftml_stubs.v1 import (
    backbone_pb2,
    dataset_pb2,
    decision_pb2,
    fine_tuning_pb2,
    model_pb2,
    prediction_pb2,
)

from graftml import errors, types
from graftml._backbones import BackboneSource

_METHODS: dict[int, Literal["feature_based", "model_based", "domain_adaptation"]] = {
    model_pb2.TRANSFER_METHOD_FEATURE_BASED: "feature_based",
    model_pb2.TRANSFER_METHOD_MODEL_BASED: "model_based",
    model_pb2.TRANSFER_METHOD_DOMAIN_ADAPTATION: "domain_adaptation",
}
_MEASURED_ON: dict[int, types.MeasuredOn] = {
    model_pb2.MEASURED_ON_UNSPECIFIED: "",
    model_pb2.MEASURED_ON_CROSS_VALIDATION: "cross_validation",
    model_pb2.MEASURED_ON_HELD_OUT: "held_out",
    model_pb2.MEASURED_ON_VALIDATION: "validation",
    model_pb2.MEASURED_ON_TEST: "test",
    model_pb2.MEASURED_ON_TARGET: "target",
    model_pb2.MEASURED_ON_SOURCE: "source",
}
_VERDICTS: dict[int, types.Verdict] = {
    model_pb2.GATE_VERDICT_PASSED: "passed",
    model_pb2.GATE_VERDICT_FAILED: "failed",
    model_pb2.GATE_VERDICT_UNDECIDED: "undecided",
}
_SPLITS: dict[int, types.Split] = {
    dataset_pb2.SPLIT_UNSPECIFIED: "",
    dataset_pb2.SPLIT_TRAIN: "train",
    dataset_pb2.SPLIT_VALIDATION: "val",
    dataset_pb2.SPLIT_TEST: "test",
}
_SOURCES: dict[int, BackboneSource] = {
    backbone_pb2.BACKBONE_SOURCE_REGISTERED: "registered",
    backbone_pb2.BACKBONE_SOURCE_PACKAGE: "package",
    backbone_pb2.BACKBONE_SOURCE_TORCHVISION: "torchvision",
    backbone_pb2.BACKBONE_SOURCE_TIMM: "timm",
}
_STATES = {
    fine_tuning_pb2.JobState.Value(f"JOB_STATE_{state}"): state
    for state in types.JobState
    if state is not types.JobState.UNKNOWN
}


def time(stamp: Timestamp) -> datetime | None:
    """An unset time is None, not 1970."""
    if not stamp.seconds and not stamp.nanos:
        return None
    return stamp.ToDatetime(tzinfo=UTC)


_KINDS: dict[int, Literal["fine_tune", "ranking"]] = {
    fine_tuning_pb2.JOB_KIND_FINE_TUNE: "fine_tune",
    fine_tuning_pb2.JOB_KIND_RANKING: "ranking",
}


def job(message: fine_tuning_pb2.Job) -> types.Job:
    kind: Literal["fine_tune", "ranking", "unknown"] = _KINDS.get(message.kind, "unknown")
    return types.Job(
        job_id=message.job_id,
        model=message.model,
        state=job_state(message.state),
        create_time=time(message.create_time),
        start_time=time(message.start_time),
        end_time=time(message.end_time),
        request=message.ranking_request if kind == "ranking" else message.request,
        version=message.version or None,
        error=_error(message, message.error),
        last_sequence=message.last_sequence,
        progress=progress(message.progress) if message.HasField("progress") else None,
        attempts=message.attempts,
        cancel_requested=message.cancel_requested,
        elapsed_s=_seconds(message.elapsed) if message.HasField("elapsed") else None,
        is_candidate=message.is_candidate,
        data_summary=_summary(message.data_summary) if message.HasField("data_summary") else None,
        base=_base(message.base) if message.HasField("base") else None,
        kind=kind,
        ranking=_ranking(message.ranking) if message.HasField("ranking") else None,
    )


def job_state(value: int) -> types.JobState:
    return _STATES.get(value, types.JobState.UNKNOWN)


def _decision(message: decision_pb2.Decision) -> types.Decision | Literal["unknown"]:
    match message.WhichOneof("rule"):
        case "argmax":
            return "argmax"
        case "balanced":
            return "balanced"
        case "thresholds":
            given = message.thresholds
            return types.Thresholds(dict(given.classes), _optional(given, "others"))
    return "unknown"


def _base(base: fine_tuning_pb2.BaseVersion) -> types.BaseVersion:
    return types.BaseVersion(version=base.version, model=base.model)


def progress(message: fine_tuning_pb2.Progress) -> types.Progress:
    has_remaining = message.HasField("remaining")
    return types.Progress(
        stage=message.stage,
        fraction=message.fraction,
        detail=message.detail,
        elapsed_s=_seconds(message.elapsed),
        remaining_s=_seconds(message.remaining) if has_remaining else None,
        step=message.step,
        steps=message.steps,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def event(message: fine_tuning_pb2.JobEvent) -> types.JobEvent:
    return types.JobEvent(message.sequence, time(message.time), _payload(message))


def _payload(message: fine_tuning_pb2.JobEvent) -> types.EventPayload:
    kind = message.WhichOneof("payload")
    read = _PAYLOADS.get(kind or "")
    return types.Unknown() if read is None else read(getattr(message, str(kind)))


def _state_change(change: fine_tuning_pb2.StateChange) -> types.StateChanged:
    return types.StateChanged(job_state(change.state), _error(change, change.error))


def _epoch(epoch: fine_tuning_pb2.EpochMetrics) -> types.EpochMetrics:
    return types.EpochMetrics(
        epoch=epoch.epoch,
        epochs=epoch.epochs,
        train_loss=epoch.train_loss,
        train_accuracy=epoch.train_accuracy,
        validation_loss=_optional(epoch, "validation_loss"),
        validation_accuracy=_optional(epoch, "validation_accuracy"),
        images_per_second=epoch.images_per_second,
        eta_s=epoch.eta.ToTimedelta().total_seconds(),
        learning_rate=epoch.learning_rate,
    )


def _data(data: fine_tuning_pb2.DataSummary) -> types.DataSummary:
    return types.DataSummary(
        _class_counts(data.classes),
        _summary(data.summary),
        data.digest,
    )


def _note(message: fine_tuning_pb2.Note) -> types.Note:
    is_warning = message.level == fine_tuning_pb2.Note.LEVEL_WARNING
    return types.Note("warning" if is_warning else "info", message.text)


def _published(out: fine_tuning_pb2.VersionPublished) -> types.VersionPublished:
    return types.VersionPublished(
        out.model,
        out.version,
        accuracy=_optional(out, "accuracy"),
        accuracy_low=_optional(out, "accuracy_low"),
        accuracy_high=_optional(out, "accuracy_high"),
        measured_on=_MEASURED_ON.get(out.measured_on, "unknown"),
        measured_count=out.measured_count,
        measured_group_count=out.measured_group_count,
        is_candidate=out.is_candidate,
        gate_failures=tuple(out.gate_failures),
    )


_PAYLOADS: dict[str, Callable[[Any], types.EventPayload]] = {
    "state_change": _state_change,
    "progress": progress,
    "epoch": _epoch,
    "data": _data,
    "note": _note,
    "published": _published,
}


def _ranking(message: fine_tuning_pb2.Ranking) -> types.BackboneRanking:
    return types.BackboneRanking(
        backbones=tuple(
            types.RankedBackbone(
                backbone=row.backbone,
                weights=row.weights,
                weights_licence=row.weights_licence,
                log_loss=_optional(row, "log_loss"),
                log_me=_optional(row, "log_me"),
                image_ms=_optional(row, "image_ms"),
                feature_dim=row.feature_dim,
                problem=row.problem,
            )
            for row in message.backbones
        ),
        explanation=message.explanation,
        image_count=message.image_count,
    )


def dataset(message: dataset_pb2.Dataset) -> types.Dataset:
    return types.Dataset(
        dataset_id=message.dataset_id,
        display_name=message.display_name,
        digest=message.digest,
        create_time=time(message.create_time),
        size_bytes=message.size_bytes,
        classes=_class_counts(message.classes),
        image_count=message.image_count,
        summary=_summary(message.summary),
        is_unlabelled=message.is_unlabelled,
        case_sensitive_labels=message.case_sensitive_labels,
        erased_image_count=message.erased_image_count,
    )


def dataset_image(message: dataset_pb2.DatasetImage) -> types.DatasetImage:
    return types.DatasetImage(
        digest=message.digest,
        name=message.name,
        label=message.label,
        split=_SPLITS.get(message.split, "unknown"),
        group=message.group,
        size_bytes=message.size_bytes,
        is_erased=message.is_erased,
    )


def erasure(message: dataset_pb2.EraseImageResponse) -> types.Erasure:
    return types.Erasure(
        dataset_ids=tuple(message.dataset_ids),
        versions=tuple(types.AffectedVersion(v.model, v.version) for v in message.versions),
    )


def model(message: model_pb2.Model) -> types.Model:
    return types.Model(
        name=message.name,
        create_time=time(message.create_time),
        update_time=time(message.update_time),
        aliases=dict(message.aliases),
        version_count=message.version_count,
    )


def version(message: model_pb2.Version) -> types.Version:
    parity = message.parity
    return types.Version(
        model=message.model,
        version=message.version,
        job_id=message.job_id,
        create_time=time(message.create_time),
        method=_METHODS.get(message.method, "unknown"),
        backbone=message.backbone,
        weights=message.weights,
        backbone_digest=message.backbone_digest,
        classes=tuple(message.classes),
        figures=tuple(_figure(figure) for figure in message.figures),
        calibrated=message.calibrated,
        dataset_digest=message.dataset_digest,
        parity=types.Parity(parity.max_difference, parity.top1_agreement, parity.image_count)
        if message.HasField("parity")
        else None,
        training_time_s=message.training_time.ToTimedelta().total_seconds()
        if message.HasField("training_time")
        else None,
        labels=dict(message.labels),
        manifest=json.loads(message.manifest_json) if message.manifest_json else {},
        aliases=tuple(message.aliases),
        is_candidate=message.is_candidate,
        gate_checks=tuple(_gate_check(check) for check in message.gate_checks),
        calibration_note=message.calibration_note,
        image_size=message.image_size,
        sees_whole_image=message.sees_whole_image,
        serving_precision=message.serving_precision,
        decision=_decision(message.decision) if message.HasField("decision") else "argmax",
        weights_licence=message.weights_licence,
        erased_image_count=message.erased_image_count,
    )


def _figure(figure: model_pb2.Figure) -> types.Figure:
    return types.Figure(
        measured_on=_MEASURED_ON.get(figure.measured_on, "unknown"),
        accuracy=figure.accuracy,
        accuracy_low=figure.accuracy_low,
        accuracy_high=figure.accuracy_high,
        log_loss=figure.log_loss,
        image_count=figure.image_count,
        group_count=figure.group_count,
    )


def _gate_check(check: model_pb2.GateCheck) -> types.GateCheck:
    return types.GateCheck(
        name=check.name,
        verdict=_VERDICTS.get(check.verdict, "unknown"),
        passed=check.passed,
        value=_optional(check, "value"),
        bound=check.bound,
        detail=check.detail,
        images_needed=check.images_needed,
    )


def rollback(message: model_pb2.RollbackAliasResponse) -> types.Rollback:
    return types.Rollback(model(message.model), message.from_version, message.to_version)


def predictions(message: prediction_pb2.PredictResponse) -> list[list[types.Prediction]]:
    return [
        [_prediction(result, answer) for result in answer.results] for answer in message.answers
    ]


def _prediction(
    result: prediction_pb2.ImageResult, message: prediction_pb2.ModelAnswer
) -> types.Prediction:
    if result.WhichOneof("outcome") != "classification":
        error = errors.from_status(result.error)
        return types.Prediction(message.model, message.version, error=error)
    answer = result.classification
    return types.Prediction(
        message.model,
        message.version,
        tuple(_score(score) for score in answer.scores),
        tuple(answer.features),
        out_of_distribution_score=_optional(answer, "out_of_distribution_score"),
        is_out_of_distribution=answer.is_out_of_distribution,
        calibrated=message.calibrated,
        answer=_score(answer.answer) if answer.HasField("answer") else None,
    )


def _score(score: prediction_pb2.ClassScore) -> types.ClassScore:
    return types.ClassScore(score.label, score.probability, score.class_index)


def backbone(message: backbone_pb2.Backbone) -> types.Backbone:
    return types.Backbone(
        name=message.name,
        source=_SOURCES.get(message.source, "unknown"),
        size=message.size,
        feature_dim=message.feature_dim,
        licence=message.licence,
        digest=message.digest,
        weights=message.weights,
        source_digest=message.source_digest,
        size_bytes=message.size_bytes,
        create_time=time(message.create_time),
    )


def _class_counts(counts: Any) -> tuple[types.ClassCount, ...]:
    return tuple(
        types.ClassCount(c.label, c.train_count, c.validation_count, c.test_count) for c in counts
    )


def _summary(message: dataset_pb2.ReadSummary) -> types.ReadSummary:
    return types.ReadSummary(
        seen_count=message.seen_count,
        used_count=message.used_count,
        left_out=tuple(
            types.LeftOut(_reason(row.reason), row.label, row.count) for row in message.left_out
        ),
        files=tuple(
            types.LeftOutFile(file.path, file.label, _reason(file.reason), file.detail)
            for file in message.left_out_files
        ),
        nested_count=message.nested_count,
        warnings=tuple(message.warnings),
    )


def _reason(number: Any) -> types.LeftOutReason:
    try:
        name = dataset_pb2.LeftOutReason.Name(number)
    except ValueError:
        return "unknown"
    reason: Any = name.removeprefix("LEFT_OUT_REASON_").lower()
    return "unknown" if number == 0 else reason


def _error(message: Any, status: status_pb2.Status) -> errors.GraftError | None:
    return errors.from_status(status) if message.HasField("error") else None


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None
