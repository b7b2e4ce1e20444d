"""Jobs and their events as messages."""

import time
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from graft.v1 import fine_tuning_pb2 as pb

from service.contract import (
    DataFound,
    EpochEnded,
    Note,
    Progressed,
)
from service.domain import JobState, plain_name
from service.errors import InvalidInput, Reason
from service.jobs import events
from service.jobs.events import JobEvent
from service.jobs.store import JobRecord
from service.rpc import status
from service.rpc.codec.datasets import class_counts, read_summary
from service.rpc.codec.models import measured_on
from service.rpc.codec.times import duration, timestamp

_LEVELS = {"info": pb.Message.LEVEL_INFO, "warning": pb.Message.LEVEL_WARNING}


def state(number: int) -> JobState:
    """Reads a number of JobState; raises InvalidInput for one that names no state."""
    if number not in pb.JobState.values() or number == pb.JOB_STATE_UNSPECIFIED:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            f"states holds {number}, which is no job state: use values of JobState",
            field="states",
        )
    return JobState(pb.JobState.Name(number).removeprefix("JOB_STATE_"))


def job(record: JobRecord) -> pb.Job:
    """Converts a job as it is now."""
    base = record.request.base
    return pb.Job(
        job_id=record.job_id,
        model=plain_name(record.request.model),
        state=_state_number(record.state),
        create_time=timestamp(record.create_time_s),
        start_time=timestamp(record.start_time_s),
        end_time=timestamp(record.end_time_s),
        request=pb.FineTuneRequest.FromString(record.message),
        base=(
            None
            if base is None
            else pb.BaseVersion(model=plain_name(base.model), version=base.version)
        ),
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
        elapsed=_elapsed(record),
        is_candidate=record.is_candidate,
        data_summary=read_summary(record.summary) if record.summary else None,
    )


def event(happened: JobEvent) -> pb.JobEvent:
    """Converts an event."""
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
                    summary=read_summary(data.summary),
                    digest=data.digest,
                )
            )
        case Note() as note:
            message.message.CopyFrom(pb.Message(level=_LEVELS[note.level], text=note.text))
        case events.Published() as published:
            message.published.CopyFrom(_published(published))
    return message


def _published(published: events.Published) -> pb.VersionPublished:
    message = pb.VersionPublished(
        model=plain_name(published.model),
        version=published.version,
        is_candidate=published.is_candidate,
        gate_failures=published.gate_failures,
    )
    if (figure := published.figure) is not None:
        message.accuracy = figure.accuracy
        message.accuracy_low = figure.accuracy_low
        message.accuracy_high = figure.accuracy_high
        message.measured_on = measured_on(figure.measured_on)
        message.measured_count = figure.count
        message.measured_group_count = figure.groups
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
    remaining_s = progress.remaining_s
    return pb.Progress(
        stage=progress.stage,
        fraction=progress.fraction,
        detail=progress.detail,
        elapsed=duration(progress.elapsed_s),
        remaining=None if remaining_s is None else duration(remaining_s),
        step=progress.step,
        steps=progress.steps,
    )


def _elapsed(record: JobRecord) -> Duration | None:
    if record.start_time_s is None:
        return None
    until_s = time.time() if record.end_time_s is None else record.end_time_s
    # A clock may be put back.
    return duration(max(0.0, until_s - record.start_time_s))


def _error(reason: Reason | None, message: str) -> status_pb2.Status | None:
    return None if reason is None else status.of_job(reason, message)


def _state_number(value: JobState) -> Any:
    return pb.JobState.Value(f"JOB_STATE_{value.value}")
