"""The events that a fake job plays, without number and time: those are given as they are played."""

from collections.abc import Iterable, Mapping

from google.protobuf.duration_pb2 import Duration

from graft.errors import GraftError, Reason
from graft.testing._refusals import to_status
from graft.v1 import dataset_pb2
from graft.v1 import fine_tuning_pb2 as pb


def running() -> pb.JobEvent:
    """A trainer started."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_RUNNING))


def requeued() -> pb.JobEvent:
    """The service stopped while a trainer worked; the job waits again."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_QUEUED))


def data(classes: Mapping[str, int] | None = None, digest: str = "") -> pb.JobEvent:
    """The data was read: images a class; None means what the job's dataset holds."""
    counts = [
        dataset_pb2.ClassCount(label=label, train_count=count)
        for label, count in sorted((classes or {}).items())
    ]
    return pb.JobEvent(data=pb.DataSummary(classes=counts, digest=digest))


def progress(
    stage: str,
    fraction: float,
    detail: str = "",
    *,
    elapsed_s: float = 0.0,
    remaining_s: float | None = None,
    step: int = 0,
    steps: int = 0,
) -> pb.JobEvent:
    """The job got on."""
    return pb.JobEvent(
        progress=pb.Progress(
            stage=stage,
            fraction=fraction,
            detail=detail,
            elapsed=_duration(elapsed_s),
            remaining=None if remaining_s is None else _duration(remaining_s),
            step=step,
            steps=steps,
        )
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def epoch(number: int, of: int, *, accuracy: float = 0.9, loss: float = 0.3) -> pb.JobEvent:
    """An epoch ended, with the same figures for training and validation."""
    return pb.JobEvent(
        epoch=pb.EpochMetrics(
            epoch=number,
            epochs=of,
            train_loss=loss,
            train_accuracy=accuracy,
            validation_loss=loss,
            validation_accuracy=accuracy,
            images_per_second=100.0,
            eta=Duration(seconds=of - number),
            learning_rate=0.001,
        )
    )


def note(text: str, *, warning: bool = False) -> pb.JobEvent:
    """A word for people."""
    level = pb.Message.LEVEL_WARNING if warning else pb.Message.LEVEL_INFO
    return pb.JobEvent(message=pb.Message(level=level, text=text))


def published(
    accuracy: float = 0.95, count: int = 20, *, gate_failures: Iterable[str] = ()
) -> pb.JobEvent:
    """A version is out; its model and number are the job's.

    With `gate_failures`, or an `accuracy` below what the job's gate asks for, it
    is a candidate.
    """
    return pb.JobEvent(
        published=pb.VersionPublished(
            validation_accuracy=accuracy, validation_count=count, gate_failures=gate_failures
        )
    )


def succeeded() -> pb.JobEvent:
    """The end, after `published`."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_SUCCEEDED))


def failed(
    message: str = "the loss is not a number", reason: str = Reason.TRAINING_FAILED
) -> pb.JobEvent:
    """The end, without a version."""
    error = to_status(GraftError(message, reason=reason))
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_FAILED, error=error))


def cancelled() -> pb.JobEvent:
    """The end, as somebody asked."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_CANCELLED))


DEFAULT_SCRIPT = (
    running(),
    data(),
    progress("features", 0.5),
    epoch(1, 2, accuracy=0.8),
    epoch(2, 2, accuracy=0.95),
    progress("publishing", 1.0),
    published(),
    succeeded(),
)
"""A job that goes well."""
