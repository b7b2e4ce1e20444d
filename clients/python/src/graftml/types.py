"""The client's values: frozen, without gRPC; `Job.request` alone is a message of the contract.

Times are aware `datetime`s in UTC, durations are seconds (`_s`) or
milliseconds (`_ms`), and what the service has not set is None. Enumerations are strings, so that
`job.state == "RUNNING"` works.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, TypedDict

from graftml_stubs.v1.fine_tuning_pb2 import FineTuneRequest, RankBackbonesRequest

from graftml import _display
from graftml._backbones import Backbone
from graftml._data import (
    AffectedVersion,
    ClassCount,
    Dataset,
    DatasetImage,
    Erasure,
    LeftOut,
    LeftOutFile,
    LeftOutReason,
    ReadSummary,
    ServerPath,
    Split,
)
from graftml._figures import Figure, GateCheck, MeasuredOn, Verdict, VersionPublished
from graftml._options import (
    Augmentation,
    Auto,
    Baseline,
    BaseVersion,
    Decision,
    Device,
    DomainAdaptation,
    FeatureBased,
    FineTuneOptions,
    Framing,
    Gate,
    Grouping,
    Method,
    ModelBased,
    PretrainedBackbone,
    ServingPrecision,
    Technique,
    Thresholds,
)
from graftml._predictions import ClassScore, ModelSpec, Prediction
from graftml.errors import GraftError

__all__ = [
    "AffectedVersion",
    "Augmentation",
    "Auto",
    "Backbone",
    "BackboneRanking",
    "BaseVersion",
    "Baseline",
    "ClassCount",
    "ClassScore",
    "DataSummary",
    "Dataset",
    "DatasetImage",
    "Decision",
    "Device",
    "DomainAdaptation",
    "EpochMetrics",
    "Erasure",
    "EventPayload",
    "FeatureBased",
    "Figure",
    "FineTuneOptions",
    "Framing",
    "Gate",
    "GateCheck",
    "Grouping",
    "Job",
    "JobEvent",
    "JobState",
    "LeftOut",
    "LeftOutFile",
    "LeftOutReason",
    "MeasuredOn",
    "Method",
    "Model",
    "ModelBased",
    "ModelSpec",
    "Note",
    "Parity",
    "Prediction",
    "PretrainedBackbone",
    "Progress",
    "RankedBackbone",
    "ReadSummary",
    "Rollback",
    "ServerPath",
    "ServingPrecision",
    "Split",
    "StateChanged",
    "Technique",
    "Thresholds",
    "Unknown",
    "Verdict",
    "Version",
    "VersionPublished",
]


class JobState(StrEnum):
    """Where a job is in its life."""

    UNKNOWN = "UNKNOWN"
    """A state that this client is too old to know."""
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True)
class Progress:
    """The job got on. Stages: preparing, features, training, exporting, checking, publishing."""

    stage: str
    fraction: float
    """Done of this stage, 0 to 1; 1 at its end alone. A stage may have parts, which `detail`
    names: each begins at 0."""
    detail: str = ""
    elapsed_s: float = 0.0
    """Since the stage began, when this was sent."""
    remaining_s: float | None = None
    """Until the stage's end, at the pace that was measured; None while that is not known."""
    step: int = 0
    steps: int = 0
    """Of the stage, as planned now; 0 where it has no steps."""


@dataclass(frozen=True)
class StateChanged:
    """The job moved to another state; `error` says why it FAILED."""

    state: JobState
    error: GraftError | None = None


@dataclass(frozen=True)
class EpochMetrics:
    """The figures of one epoch."""

    epoch: int
    """From 1."""
    epochs: int
    """How many are planned."""
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    """Of images that are not learned from, and choose nothing; None where there are none."""
    validation_accuracy: float | None
    images_per_second: float
    eta_s: float
    """Until the training's end, as planned."""
    learning_rate: float


@dataclass(frozen=True)
class DataSummary:
    """Describes a job's data."""

    classes: tuple[ClassCount, ...]
    summary: ReadSummary
    digest: str


@dataclass(frozen=True)
class Note:
    """A word for people."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class Unknown:
    """A kind of event that this client is too old to know."""


EventPayload = (
    StateChanged | Progress | EpochMetrics | DataSummary | Note | VersionPublished | Unknown
)


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; numbered from 1 without gaps."""

    sequence: int
    time: datetime | None
    payload: EventPayload


@dataclass(frozen=True)
class Job:
    """The life of one fine-tuning or ranking, as it was when asked."""

    job_id: str
    model: str
    """Empty for a ranking."""
    state: JobState
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    request: FineTuneRequest | RankBackbonesRequest
    """The message as it was sent, but for inline images, which are a dataset by now."""
    version: int | None
    """The version it made, a candidate too; None unless a fine-tuning has SUCCEEDED."""
    error: GraftError | None
    """Why it FAILED."""
    last_sequence: int
    progress: Progress | None
    attempts: int
    cancel_requested: bool
    elapsed_s: float | None = None
    """Since its trainer was last started, until its end or this answer; None before the start."""
    is_candidate: bool = False
    """Its version was a candidate when the job ended; `Version` says what it is now."""
    data_summary: ReadSummary | None = None
    """What became of the files of its data, once they were read."""
    base: BaseVersion | None = None
    """The version that the request's base named then, by its number; None where it named none."""
    kind: Literal["fine_tune", "ranking", "unknown"] = "fine_tune"
    ranking: "BackboneRanking | None" = None
    """The result of a ranking that has SUCCEEDED."""

    def _repr_html_(self) -> str:
        at = self.progress
        return _display.table(
            f"Job {self.job_id}",
            [
                ("model", self.model),
                ("state", f"{self.state}, a candidate" if self.is_candidate else self.state),
                ("error", None if self.error is None else self.error.message),
                ("stage", None if at is None else f"{at.stage}, {int(100 * at.fraction)} %"),
                ("seconds", None if self.elapsed_s is None else f"{self.elapsed_s:.1f}"),
                ("data", self.data_summary),
                ("version", self.version),
                ("ranking", None if self.ranking is None else self.ranking.explanation),
            ],
        )


class RankOptions(TypedDict, total=False):
    """What `rank_backbones` takes, as `start_ranking`."""

    backbones: "Iterable[str | PretrainedBackbone]"
    time_budget_s: float | None
    seed: int | None
    case_sensitive_labels: bool
    request_id: str
    on_upload: Callable[[int, int | None], None] | None


@dataclass(frozen=True)
class RankedBackbone:
    """How well a backbone's features fit the images, and what it costs."""

    backbone: str
    weights: str
    log_loss: float | None
    """Of a quick head on its features, cross-validated, nats an image: lower is better. None when
    it was not scored, and where every class has one image."""
    log_me: float | None
    """Nats an image: higher is better. None when it was not scored."""
    image_ms: float | None
    """An image when served there, one at a time, decoding included."""
    feature_dim: int
    problem: str
    """Why it was not scored; empty when it was."""
    weights_licence: str = ""
    """As their publisher names it, or "not known"; "" for random weights."""


@dataclass(frozen=True)
class BackboneRanking:
    """Backbones, the one to take first; what could not be scored last."""

    backbones: tuple[RankedBackbone, ...]
    explanation: str
    """Why the first is first, for people."""
    image_count: int
    """How many images were scored on."""


@dataclass(frozen=True)
class Model:
    """A named line of versions."""

    name: str
    create_time: datetime | None
    update_time: datetime | None
    aliases: dict[str, int]
    version_count: int


@dataclass(frozen=True)
class Parity:
    """How closely the exported model gives PyTorch's answers."""

    max_difference: float
    top1_agreement: float
    image_count: int


@dataclass(frozen=True)
class Version:
    """An immutable published model."""

    model: str
    version: int
    job_id: str
    create_time: datetime | None
    method: Literal["feature_based", "model_based", "domain_adaptation", "unknown"]
    backbone: str
    weights: str
    backbone_digest: str
    classes: tuple[str, ...]
    figures: tuple[Figure, ...]
    """How well it does, the one to go by first; empty where nothing could be measured."""
    calibrated: bool
    """Its probabilities were shown to be right on images that nothing was learned from."""
    dataset_digest: str
    parity: Parity | None
    training_time_s: float | None
    labels: dict[str, str]
    manifest: dict[str, Any]
    """Everything else that is known of its making."""
    aliases: tuple[str, ...]
    is_candidate: bool = False
    """Its gate did not let it pass and it was not promoted since."""
    gate_checks: tuple[GateCheck, ...] = ()
    """Empty when there was no gate."""
    calibration_note: str = ""
    """Why it is not `calibrated`."""
    image_size: int = 224
    """Side of the square that its backbone takes, pixels."""
    sees_whole_image: bool = False
    """It sees all of an image, squeezed to that square, not its middle alone."""
    serving_precision: str = "fp32"
    """What its backbone computes in: fp32, bf16, fp16 or int8."""
    decision: Decision | Literal["unknown"] = "argmax"
    """How it answers, unless a call says otherwise; its figures and its gate go by it."""
    erased_image_count: int = 0
    """How many of the images that it was trained or measured on were erased since."""
    weights_licence: str = ""
    """Of the weights it started from, as their publisher names it, or "not known"; "" for random
    ones."""

    @property
    def headline(self) -> Figure | None:
        """The figure to go by; None where none is of images as the version is for."""
        return next((figure for figure in self.figures if figure.measured_on != "source"), None)

    @property
    def measured(self) -> str:
        """Its accuracy in words, and whether its probabilities are not calibrated."""
        text = "nothing could be measured" if self.headline is None else str(self.headline)
        return text if self.calibrated else f"{text}, not calibrated"

    def _repr_html_(self) -> str:
        failed = [check.detail for check in self.gate_checks if not check.passed]
        return _display.table(
            f"{self.model} version {self.version}",
            [
                ("accuracy", self.measured),
                ("candidate", "; ".join(failed) or "yes" if self.is_candidate else None),
                ("aliases", ", ".join(self.aliases)),
                ("classes", ", ".join(self.classes)),
                ("method", self.method),
                ("backbone", self.backbone),
                ("labels", ", ".join(f"{name}={value}" for name, value in self.labels.items())),
                ("created", self.create_time),
                ("job", self.job_id),
            ],
        )


@dataclass(frozen=True)
class Rollback:
    """An alias that points back to an earlier version; `model` is as it is now."""

    model: Model
    from_version: int
    to_version: int
