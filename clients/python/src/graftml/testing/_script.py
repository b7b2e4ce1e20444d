"""The events that a fake job plays, without number and time: those are given as they are played."""

from collections.abc import Iterable, Mapping

from google.protobuf.duration_pb2 import Duration
from graftml_stubs.v1 import dataset_pb2, model_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from graftml.errors import Aborted, GraftError, Reason
from graftml.testing._refusals import to_status

CLASSES = ("cat", "dog")
IMAGES_A_CLASS = 3
SUMMARY = dataset_pb2.ReadSummary(
    seen_count=8,
    used_count=6,
    left_out=[
        dataset_pb2.LeftOut(reason=dataset_pb2.LEFT_OUT_REASON_LINK, label="dog", count=1),
        dataset_pb2.LeftOut(reason=dataset_pb2.LEFT_OUT_REASON_HIDDEN, label="cat", count=1),
    ],
    left_out_files=[
        dataset_pb2.LeftOutFile(
            path="dog/link.jpg",
            label="dog",
            reason=dataset_pb2.LEFT_OUT_REASON_LINK,
            detail="links are not followed",
        ),
        dataset_pb2.LeftOutFile(
            path="cat/.hidden",
            label="cat",
            reason=dataset_pb2.LEFT_OUT_REASON_HIDDEN,
            detail="hidden files are left out",
        ),
    ],
)
"""What every dataset and every job's data are said to hold."""


def running() -> pb.JobEvent:
    """A trainer started."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_RUNNING))


def requeued() -> pb.JobEvent:
    """The service stopped while a trainer worked; the job waits again."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_QUEUED))


def data(classes: Mapping[str, int] | None = None, digest: str = "") -> pb.JobEvent:
    """The data was read: images a class; None means three of a cat and three of a dog."""
    counts = [
        dataset_pb2.ClassCount(label=label, train_count=count)
        for label, count in sorted((classes or dict.fromkeys(CLASSES, IMAGES_A_CLASS)).items())
    ]
    if classes is None:
        summary, digest = SUMMARY, digest or "0" * 64
    else:
        summary = dataset_pb2.ReadSummary()
    return pb.JobEvent(data=pb.DataSummary(classes=counts, summary=summary, digest=digest))


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
    level = pb.Note.LEVEL_WARNING if warning else pb.Note.LEVEL_INFO
    return pb.JobEvent(note=pb.Note(level=level, text=text))


def published(
    accuracy: float | None = 0.95, count: int = 20, *, gate_failures: Iterable[str] = ()
) -> pb.JobEvent:
    """A version is out, measured by cross-validation; its model and number are the job's.

    Without an `accuracy` nothing could be measured. With `gate_failures` it is a candidate.
    """
    out = pb.VersionPublished(gate_failures=gate_failures)
    if accuracy is not None:
        figure = figure_of(accuracy, count)
        out.accuracy, out.measured_on = figure.accuracy, figure.measured_on
        out.accuracy_low, out.accuracy_high = figure.accuracy_low, figure.accuracy_high
        out.measured_count, out.measured_group_count = figure.image_count, figure.group_count
    return pb.JobEvent(published=out)


def figure_of(accuracy: float, count: int) -> model_pb2.Figure:
    """An accuracy by cross-validation, with an interval of some width."""
    return model_pb2.Figure(
        measured_on=model_pb2.MEASURED_ON_CROSS_VALIDATION,
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 0.04),
        accuracy_high=min(1.0, accuracy + 0.04),
        log_loss=1 - accuracy,
        image_count=count,
        group_count=count,
    )


def succeeded() -> pb.JobEvent:
    """The end, after `published`."""
    return pb.JobEvent(state_change=pb.StateChange(state=pb.JOB_STATE_SUCCEEDED))


def failed(
    message: str = "the loss is not a number",
    reason: str = Reason.TRAINING_FAILED,
    kind: type[GraftError] = Aborted,
) -> pb.JobEvent:
    """The end, without a version; `kind` is the class of the error, of which its code is."""
    error = to_status(kind(message, reason=reason))
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

RANKING_SCRIPT = (running(), succeeded())
"""The events of a ranking that goes well."""
