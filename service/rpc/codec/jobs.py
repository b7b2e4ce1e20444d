"""Jobs and their events as messages."""

import time
from typing import Any, TypeVar

import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.contract import BackbonesRanked, DataFound, EpochEnded, Note, Progressed
from service.domain import JobKind, JobState
from service.errors import Reason, bad_field
from service.jobs import records
from service.jobs.records import JobEvent, JobRecord
from service.jobs.request import RankRequest
from service.rpc import status
from service.rpc.codec.datasets import class_counts, read_summary
from service.rpc.codec.models import duration, measured_on, timestamp

M = TypeVar("M", bound=Message)


def state(number: int) -> JobState:
    """Reads a number of JobState; raises InvalidInput for one that names no state."""
    if number not in pb.JobState.values() or number == pb.JOB_STATE_UNSPECIFIED:
        raise bad_field(
            "states", f"states holds {number}, which is not a job state: use values of JobState"
        )
    return JobState(pb.JobState.Name(number).removeprefix("JOB_STATE_"))


def kind(number: int) -> JobKind | None:
    """Reads a number of JobKind, None for the unset one; raises InvalidInput for any other."""
    if number == pb.JOB_KIND_UNSPECIFIED:
        return None
    if number not in pb.JobKind.values():
        raise bad_field("kind", f"kind {number} is none: use a value of JobKind")
    return JobKind(pb.JobKind.Name(number).removeprefix("JOB_KIND_").lower())


def job(record: JobRecord) -> pb.Job:
    """Converts a job as it is now."""
    message = _job(record)
    if isinstance(record.request, RankRequest):
        message.ranking_request.MergeFromString(record.message)
        if record.ranking is not None:
            message.ranking.CopyFrom(_ranking(record.ranking))
        return message
    message.model = record.request.model
    message.request.MergeFromString(record.message)
    if (base := record.request.base) is not None:
        message.base.CopyFrom(pb.BaseVersion(model=base.model, version=base.version))
    return message


def _job(record: JobRecord) -> pb.Job:
    return pb.Job(
        job_id=record.job_id,
        kind=f"JOB_KIND_{record.kind.value.upper()}",
        state=_state_number(record.state),
        create_time=timestamp(record.create_time_s),
        start_time=timestamp(record.start_time_s),
        end_time=timestamp(record.end_time_s),
        version=record.version,
        error=_error(record.error_reason, record.error_message),
        last_sequence=record.last_sequence,
        progress=(
            _by_name(record.progress, pb.Progress)
            if record.progress and record.state is JobState.RUNNING
            else None
        ),
        attempts=record.attempts,
        cancel_requested=record.cancel_requested,
        elapsed=_elapsed(record),
        is_candidate=record.is_candidate,
        data_summary=read_summary(record.summary) if record.summary else None,
    )


def _ranking(ranked: BackbonesRanked) -> pb.Ranking:
    return pb.Ranking(
        backbones=[_by_name(row, pb.RankedBackbone) for row in ranked.ranking],
        explanation=ranked.explanation,
        image_count=ranked.images,
    )


def event(happened: JobEvent) -> pb.JobEvent:
    message = pb.JobEvent(sequence=happened.sequence, time=timestamp(happened.time_s))
    match happened.payload:
        case records.StateChanged() as change:
            message.state_change.state = _state_number(change.state)
            if error := _error(change.reason, change.message):
                message.state_change.error.CopyFrom(error)
        case Progressed() as progress:
            message.progress.CopyFrom(_by_name(progress, pb.Progress))
        case EpochEnded() as epoch:
            message.epoch.CopyFrom(_by_name(epoch, pb.EpochMetrics))
        case DataFound() as data:
            message.data.CopyFrom(
                pb.DataSummary(
                    classes=class_counts(data.classes),
                    summary=read_summary(data.summary),
                    digest=data.digest,
                )
            )
        case Note() as note:
            message.note.CopyFrom(pb.Note(level=f"LEVEL_{note.level.upper()}", text=note.text))
        case records.Published() as published:
            message.published.CopyFrom(_published(published))
    return message


def _published(published: records.Published) -> pb.VersionPublished:
    message = pb.VersionPublished(
        model=published.model,
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


def _by_name(given: msgspec.Struct, kind: type[M]) -> M:
    """Converts what names its fields as the message does; a duration's name ends in its unit."""
    seconds = {
        field.name: getattr(given, f"{field.name}_s", None) for field in kind.DESCRIPTOR.fields
    }
    durations = {name: duration(value) for name, value in seconds.items() if value is not None}
    others = {name: getattr(given, name, None) for name in seconds.keys() - durations.keys()}
    return kind(**others, **durations)


def _elapsed(record: JobRecord) -> Duration | None:
    if record.start_time_s is None:
        return None
    until_s = time.time() if record.end_time_s is None else record.end_time_s
    # A clock may be put back.
    return duration(max(0.0, until_s - record.start_time_s))


def _error(reason: Reason | None, message: str) -> status_pb2.Status | None:
    return None if reason is None else status.of_reason(reason, message)


def _state_number(value: JobState) -> Any:
    return pb.JobState.Value(f"JOB_STATE_{value.value}")
