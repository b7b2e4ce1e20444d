"""Between jobs and the contract's messages; checks no values, but numbers that have no name."""

from typing import Any, Literal

from google.rpc import status_pb2
from graft.v1 import fine_tuning_pb2 as pb

from service.domain import JobState
from service.errors import InvalidInput, Reason
from service.jobs import events
from service.jobs.contract import (
    DataFound,
    EpochEnded,
    FeatureBased,
    Method,
    ModelBased,
    Note,
    Progressed,
)
from service.jobs.events import JobEvent
from service.jobs.request import JobRequest
from service.jobs.store import JobRecord
from service.rpc import status
from service.rpc.convert import class_counts, duration, rejected_files, timestamp

_DEVICES: dict[int, Literal["auto", "cpu", "cuda"]] = {
    pb.DEVICE_UNSPECIFIED: "auto",
    pb.DEVICE_CPU: "cpu",
    pb.DEVICE_CUDA: "cuda",
}
_RECIPES: dict[int, Literal["auto", "classic"]] = {
    pb.RECIPE_UNSPECIFIED: "auto",
    pb.RECIPE_AUTO: "auto",
    pb.RECIPE_CLASSIC: "classic",
}
_PRECISIONS: dict[int, Literal["auto", "fp32", "bf16", "fp16"]] = {
    pb.PRECISION_UNSPECIFIED: "auto",
    pb.PRECISION_FP32: "fp32",
    pb.PRECISION_BF16: "bf16",
    pb.PRECISION_FP16: "fp16",
}
_LEVELS = {"info": pb.Message.LEVEL_INFO, "warning": pb.Message.LEVEL_WARNING}

# Fields that mean "the recipe's choice" when unset, the same on both sides.
_CHOSEN = (
    "epochs",
    "batch_size",
    "learning_rate",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "freeze_batch_norm",
    "early_stopping_patience",
)


def request(message: pb.FineTuneRequest, *, server_path: str, dataset_id: str) -> JobRequest:
    """What was asked; the pictures are where the caller of this function put them."""
    return JobRequest(
        model=message.model,
        server_path=server_path,
        dataset_id=dataset_id,
        backbone=message.backbone,
        weights=message.weights,
        method=_method(message),
        validation_fraction=_optional(message, "validation_fraction"),
        seed=_optional(message, "seed"),
        time_budget_s=(
            message.time_budget.ToMicroseconds() / 1e6 if message.HasField("time_budget") else None
        ),
        device=_named(_DEVICES, message.device, "device", "Device"),
        labels=dict(message.labels),
    )


def _method(message: pb.FineTuneRequest) -> Method:
    if message.WhichOneof("method") != "model_based":
        return FeatureBased(l2=_optional(message.feature_based, "l2"))
    given = message.model_based
    return ModelBased(
        recipe=_named(_RECIPES, given.recipe, "model_based.recipe", "Recipe"),
        train_from_stage=given.train_from_stage,
        precision=_named(_PRECISIONS, given.precision, "model_based.precision", "Precision"),
        **{name: _optional(given, name) for name in _CHOSEN},
    )


def state(number: int) -> JobState:
    """From the contract's number; raises InvalidInput for one that names no state."""
    if number not in pb.JobState.values() or number == pb.JOB_STATE_UNSPECIFIED:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"states holds {number}, which is no job state: use values of JobState",
            field="states",
        )
    return JobState(pb.JobState.Name(number).removeprefix("JOB_STATE_"))


def job(record: JobRecord) -> pb.Job:
    """A job as it is now."""
    return pb.Job(
        job_id=record.job_id,
        model=record.request.model,
        state=_state_number(record.state),
        create_time=timestamp(record.create_time_s),
        start_time=timestamp(record.start_time_s),
        end_time=timestamp(record.end_time_s),
        request=_asked(record.request),
        version=record.version,
        error=_error(record.error_reason, record.error_message),
        last_sequence=record.last_sequence,
        progress=(
            _progress(record.progress)
            if record.progress and record.state is JobState.RUNNING
            else None
        ),
        attempts=record.attempts,
        cancel_requested=record.cancel_requested,
    )


def event(happened: JobEvent) -> pb.JobEvent:
    """One event."""
    message = pb.JobEvent(sequence=happened.sequence, time=timestamp(happened.time_s))
    match happened.payload:
        case events.StateChanged() as change:
            message.state_change.state = _state_number(change.state)
            if error := _error(change.reason, change.message):
                message.state_change.error.CopyFrom(error)
        case Progressed() as progress:
            message.progress.CopyFrom(_progress(progress))
        case EpochEnded() as epoch:
            message.epoch.CopyFrom(_epoch(epoch))
        case DataFound() as data:
            message.data.CopyFrom(
                pb.DataSummary(
                    classes=class_counts(data.classes),
                    rejected_files=rejected_files(data.rejected),
                    rejected_count=data.rejected_count,
                    digest=data.digest,
                )
            )
        case Note() as note:
            message.message.CopyFrom(pb.Message(level=_LEVELS[note.level], text=note.text))
        case events.Published() as published:
            message.published.CopyFrom(
                pb.VersionPublished(
                    model=published.model,
                    version=published.version,
                    validation_accuracy=published.validation_accuracy,
                    validation_count=published.validation_count,
                )
            )
    return message


def _asked(asked: JobRequest) -> pb.FineTuneRequest:
    message = pb.FineTuneRequest(
        model=asked.model,
        backbone=asked.backbone,
        weights=asked.weights,
        validation_fraction=asked.validation_fraction,
        seed=asked.seed,
        time_budget=None if asked.time_budget_s is None else duration(asked.time_budget_s),
        device=_number(_DEVICES, asked.device),
        labels=asked.labels,
    )
    if asked.server_path:
        message.server_path.path = asked.server_path
    else:
        message.dataset_id = asked.dataset_id
    method = asked.method
    if isinstance(method, FeatureBased):
        message.feature_based.CopyFrom(pb.FeatureBased(l2=method.l2))
    else:
        message.model_based.CopyFrom(
            pb.ModelBased(
                recipe=_number(_RECIPES, method.recipe),
                train_from_stage=method.train_from_stage,
                precision=_number(_PRECISIONS, method.precision),
                **{name: getattr(method, name) for name in _CHOSEN},
            )
        )
    return message


def _epoch(epoch: EpochEnded) -> pb.EpochMetrics:
    return pb.EpochMetrics(
        epoch=epoch.epoch,
        epochs=epoch.epochs,
        train_loss=epoch.train_loss,
        train_accuracy=epoch.train_accuracy,
        validation_loss=epoch.validation_loss,
        validation_accuracy=epoch.validation_accuracy,
        images_per_second=epoch.images_per_second,
        eta=duration(epoch.eta_s),
        learning_rate=epoch.learning_rate,
    )


def _progress(progress: Progressed) -> pb.Progress:
    return pb.Progress(stage=progress.stage, fraction=progress.fraction, detail=progress.detail)


def _error(reason: Reason | None, message: str) -> status_pb2.Status | None:
    return None if reason is None else status.of_job(reason, message)


def _state_number(value: JobState) -> Any:
    return pb.JobState.Value(f"JOB_STATE_{value.value}")


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _named(names: dict[int, Any], number: int, field: str, kind: str) -> Any:
    if number not in names:
        raise InvalidInput(
            Reason.INVALID_FIELD, f"{field} {number} is none: use a value of {kind}", field=field
        )
    return names[number]


def _number(names: dict[int, Any], name: str) -> Any:
    # The last number of a name is its own; UNSPECIFIED comes first.
    return next(number for number, known in reversed(names.items()) if known == name)
