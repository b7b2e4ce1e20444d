"""From the service's messages to the client's values. Pure; the inverse of `_requests`."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from graft import _requests, errors, types
from graft.v1 import dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2

_DEVICES: dict[int, types.Device] = {
    fine_tuning_pb2.DEVICE_CPU: "cpu",
    fine_tuning_pb2.DEVICE_CUDA: "cuda",
}
_METHODS: dict[int, Literal["feature_based", "model_based", "domain_adaptation"]] = {
    model_pb2.TRANSFER_METHOD_FEATURE_BASED: "feature_based",
    model_pb2.TRANSFER_METHOD_MODEL_BASED: "model_based",
    model_pb2.TRANSFER_METHOD_DOMAIN_ADAPTATION: "domain_adaptation",
}
_PRECISIONS: dict[int, Literal["auto", "fp32", "bf16", "fp16"]] = {
    fine_tuning_pb2.PRECISION_FP32: "fp32",
    fine_tuning_pb2.PRECISION_BF16: "bf16",
    fine_tuning_pb2.PRECISION_FP16: "fp16",
}
_TECHNIQUES: dict[int, types.Technique] = {n: name for name, n in _requests.TECHNIQUES.items()}
_BASELINES: dict[int, types.Baseline] = {n: name for name, n in _requests.BASELINES.items()}
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


def job(message: fine_tuning_pb2.Job) -> types.Job:
    return types.Job(
        job_id=message.job_id,
        model=message.model,
        state=job_state(message.state),
        create_time=time(message.create_time),
        start_time=time(message.start_time),
        end_time=time(message.end_time),
        request=job_request(message.request),
        version=message.version or None,
        error=_error(message, message.error),
        last_sequence=message.last_sequence,
        progress=progress(message.progress) if message.HasField("progress") else None,
        attempts=message.attempts,
        cancel_requested=message.cancel_requested,
        elapsed_s=_seconds(message.elapsed) if message.HasField("elapsed") else None,
        is_candidate=message.is_candidate,
        data_summary=_summary(message.data_summary) if message.HasField("data_summary") else None,
    )


def job_state(value: int) -> types.JobState:
    return _STATES.get(value, types.JobState.UNKNOWN)


def job_request(message: fine_tuning_pb2.FineTuneRequest) -> types.JobRequest:
    by_path = message.WhichOneof("data") == "server_path"
    return types.JobRequest(
        data=types.ServerPath(message.server_path.path) if by_path else message.dataset_id,
        backbone=message.backbone,
        weights=message.weights,
        method=_method(message),
        background=message.background,
        validation_fraction=_optional(message, "validation_fraction"),
        grouping=_grouping(message.grouping) if message.HasField("grouping") else None,
        augmentation=_augmentation(message) if message.HasField("augmentation") else None,
        seed=_optional(message, "seed"),
        time_budget_s=message.time_budget.ToTimedelta().total_seconds()
        if message.HasField("time_budget")
        else None,
        device=_DEVICES.get(message.device, "auto"),
        labels=dict(message.labels),
        request_id=message.request_id,
        baselines=tuple(_BASELINES[n] for n in message.baselines if n in _BASELINES),
        gate=_gate(message.gate) if message.HasField("gate") else None,
        base=_base(message.base) if message.HasField("base") else None,
        case_sensitive_labels=message.case_sensitive_labels,
    )


def _method(message: fine_tuning_pb2.FineTuneRequest) -> types.Method:
    match message.WhichOneof("method"):
        case "model_based":
            return _model_based(message.model_based)
        case "domain_adaptation":
            return _domain_adaptation(message.domain_adaptation)
        case "feature_based":
            method = message.feature_based
            return types.FeatureBased(
                l2=_optional(method, "l2"), augmented_views=_optional(method, "augmented_views")
            )
    return types.Auto()


def _domain_adaptation(method: fine_tuning_pb2.DomainAdaptation) -> types.DomainAdaptation:
    by_path = method.WhichOneof("target") == "target_path"
    return types.DomainAdaptation(
        target=types.ServerPath(method.target_path.path) if by_path else method.target_dataset_id,
        technique=_TECHNIQUES.get(method.technique, "auto"),
        always_adapt=method.always_adapt,
        evaluate_on_target=method.evaluate_on_target,
        epochs=_optional(method, "epochs"),
        batch_size=_optional(method, "batch_size"),
        learning_rate=_optional(method, "learning_rate"),
    )


def _grouping(grouping: fine_tuning_pb2.Grouping) -> types.Grouping:
    if grouping.WhichOneof("by") == "name_pattern":
        return types.Grouping(name_pattern=grouping.name_pattern)
    return types.Grouping(folder_level=grouping.folder_level)


def _augmentation(message: fine_tuning_pb2.FineTuneRequest) -> types.Augmentation:
    names = types.Augmentation.__dataclass_fields__
    return types.Augmentation(**{name: _optional(message.augmentation, name) for name in names})


def _gate(gate: fine_tuning_pb2.Gate) -> types.Gate:
    has_latency = gate.HasField("max_latency")
    return types.Gate(
        min_accuracy=_optional(gate, "min_accuracy"),
        min_class_recall=_optional(gate, "min_class_recall"),
        class_recalls=dict(gate.class_recalls),
        not_worse_than=gate.not_worse_than,
        max_regression=_optional(gate, "max_regression"),
        when_uncertain=(
            "promote" if gate.when_uncertain == fine_tuning_pb2.WHEN_UNCERTAIN_PROMOTE else "hold"
        ),
        max_parity_difference=_optional(gate, "max_parity_difference"),
        max_latency_ms=gate.max_latency.ToMicroseconds() / 1000 if has_latency else None,
        alias=gate.alias,
    )


def _base(base: fine_tuning_pb2.BaseVersion) -> types.BaseVersion:
    return types.BaseVersion(
        version=_optional(base, "version"), alias=_optional(base, "alias"), model=base.model
    )


def _model_based(method: fine_tuning_pb2.ModelBased) -> types.ModelBased:
    return types.ModelBased(
        recipe="classic" if method.recipe == fine_tuning_pb2.RECIPE_CLASSIC else "auto",
        train_from_stage=method.train_from_stage,
        precision=_PRECISIONS.get(method.precision, "auto"),
        epochs=_optional(method, "epochs"),
        batch_size=_optional(method, "batch_size"),
        learning_rate=_optional(method, "learning_rate"),
        momentum=_optional(method, "momentum"),
        weight_decay=_optional(method, "weight_decay"),
        label_smoothing=_optional(method, "label_smoothing"),
        freeze_batch_norm=_optional(method, "freeze_batch_norm"),
    )


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


def _note(message: fine_tuning_pb2.Message) -> types.Note:
    is_warning = message.level == fine_tuning_pb2.Message.LEVEL_WARNING
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
    "message": _note,
    "published": _published,
}


def ranking(message: fine_tuning_pb2.RankBackbonesResponse) -> types.BackboneRanking:
    return types.BackboneRanking(
        backbones=tuple(
            types.RankedBackbone(
                backbone=row.backbone,
                weights=row.weights,
                score=_optional(row, "score"),
                log_me=_optional(row, "log_me"),
                h_score=_optional(row, "h_score"),
                leep=_optional(row, "leep"),
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
    )


def model(message: model_pb2.Model) -> types.Model:
    return types.Model(
        name=message.name,
        create_time=time(message.create_time),
        update_time=time(message.update_time),
        aliases=dict(message.aliases),
        version_count=message.version_count,
        falling_back_aliases=tuple(message.falling_back_aliases),
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
        damage=message.damage,
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


def report(message: model_pb2.GetReportResponse) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(message.content)
    return value


def predictions(message: prediction_pb2.PredictResponse) -> list[types.Prediction]:
    return [_prediction(result, message) for result in message.results]


def _prediction(
    result: prediction_pb2.ImageResult, message: prediction_pb2.PredictResponse
) -> types.Prediction:
    if result.WhichOneof("outcome") != "classification":
        error = errors.from_status(result.error)
        return types.Prediction(message.model, message.version, error=error)
    answer = result.classification
    return types.Prediction(
        message.model,
        message.version,
        tuple(
            types.ClassScore(score.label, score.probability, score.class_index)
            for score in answer.scores
        ),
        tuple(answer.features),
        out_of_distribution_score=_optional(answer, "out_of_distribution_score"),
        is_out_of_distribution=answer.is_out_of_distribution,
        calibrated=message.calibrated,
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
