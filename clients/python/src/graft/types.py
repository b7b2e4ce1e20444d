"""What the client speaks in: frozen values, no protobuf, no gRPC.

Times are aware `datetime`s in UTC, durations are seconds (`_s`), and what the
service has not set is None. Enumerations are strings, so that
`job.state == "RUNNING"` works.
"""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, TypedDict

from graft.errors import GraftError


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


Device = Literal["auto", "cpu", "cuda"]
Split = Literal["", "train", "val"]


@dataclass(frozen=True)
class ServerPath:
    """Pictures that lie on the server's disk: a folder or an archive there."""

    path: str


@dataclass(frozen=True, kw_only=True)
class FeatureBased:
    """Frozen backbone, new head. `l2` above 0; None means cross-validated."""

    l2: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelBased:
    """Train the network on. None means the recipe's choice."""

    recipe: Literal["auto", "classic"] = "auto"
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    train_from_stage: str = ""
    """The first stage that is trained; empty means all are."""
    freeze_batch_norm: bool | None = None
    early_stopping_patience: int | None = None
    """Epochs without a better validation loss; 0 means never."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class FineTuneOptions(TypedDict, total=False):
    """What `fine_tune` takes beside the data and the name; all of it may be left out.

    The hyperparameters of the method (the fields of `FeatureBased` or
    `ModelBased`) may be given here, where `method` is its name.
    """

    backbone: str
    """"auto", resnet18, resnet34, resnet50, resnet101, resnet152, efficientnet_lite0."""
    weights: str
    """Empty for the backbone's pretrained ones, a torchvision name, or "random"."""
    method: Literal["feature_based", "model_based"] | FeatureBased | ModelBased
    """"feature_based" where left out."""
    validation_fraction: float | None
    """Held out where the data names no validation pictures, 0.05 to 0.5."""
    seed: int | None
    time_budget_s: float | None
    """How long training may take, at least 1 s."""
    device: Device
    labels: dict[str, str]
    """Your own marks, kept with the job and the version."""
    request_id: str
    """Makes a repeat harmless; a fresh UUID where left out."""

    l2: float | None
    recipe: Literal["auto", "classic"]
    epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    momentum: float | None
    weight_decay: float | None
    label_smoothing: float | None
    train_from_stage: str
    freeze_batch_norm: bool | None
    early_stopping_patience: int | None
    precision: Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Progress:
    """The job got on. Stages: preparing, features, training, exporting, checking, publishing."""

    stage: str
    fraction: float
    """Done of this stage, 0 to 1."""
    detail: str = ""


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
    validation_loss: float
    validation_accuracy: float
    images_per_second: float
    eta_s: float
    """Until the training's end, as planned."""
    learning_rate: float


@dataclass(frozen=True)
class ClassCount:
    """How many pictures a class has; all count as `train` where no split is named."""

    label: str
    train: int
    validation: int


@dataclass(frozen=True)
class RejectedFile:
    """A file that was left out, and why."""

    path: str
    detail: str


@dataclass(frozen=True)
class DataSummary:
    """What the data is, counted after the split; at most 100 rejected files are listed."""

    classes: tuple[ClassCount, ...]
    rejected: tuple[RejectedFile, ...]
    rejected_count: int
    digest: str


@dataclass(frozen=True)
class Note:
    """A word for people."""

    level: Literal["info", "warning"]
    text: str


@dataclass(frozen=True)
class VersionPublished:
    """The job's version is served from now on."""

    model: str
    version: int
    validation_accuracy: float
    validation_count: int


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
class JobRequest:
    """What a job was asked for."""

    data: str | ServerPath
    """The id of a dataset, or where the pictures lie on the server."""
    backbone: str
    weights: str
    method: FeatureBased | ModelBased
    validation_fraction: float | None
    seed: int | None
    time_budget_s: float | None
    device: Device
    labels: dict[str, str]
    request_id: str


@dataclass(frozen=True)
class Job:
    """One FineTune request's life, as it was when asked."""

    job_id: str
    model: str
    state: JobState
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None
    request: JobRequest
    version: int | None
    """What it published; None unless SUCCEEDED."""
    error: GraftError | None
    """Why it FAILED."""
    last_sequence: int
    progress: Progress | None
    attempts: int
    cancel_requested: bool


@dataclass(frozen=True)
class Dataset:
    """A stored set of labelled pictures. Never changes."""

    dataset_id: str
    display_name: str
    digest: str
    create_time: datetime | None
    size_bytes: int
    classes: tuple[ClassCount, ...]
    picture_count: int
    rejected: tuple[RejectedFile, ...]
    rejected_count: int
    has_validation_split: bool


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
    picture_count: int


@dataclass(frozen=True)
class Version:
    """An immutable published model."""

    model: str
    version: int
    job_id: str
    create_time: datetime | None
    method: Literal["feature_based", "model_based", "unknown"]
    backbone: str
    weights: str
    backbone_digest: str
    classes: tuple[str, ...]
    validation_accuracy: float
    validation_count: int
    dataset_digest: str
    parity: Parity | None
    training_time_s: float | None
    labels: dict[str, str]
    manifest: dict[str, Any]
    """Everything else that is known of its making."""
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class ClassScore:
    """One class's share."""

    label: str
    probability: float
    class_index: int


@dataclass(frozen=True)
class Prediction:
    """What became of one picture: scores, or the error that it failed with.

    `label` and `probability` are the best class's; for a picture that failed
    they raise its error, so that a failure cannot pass for an answer.
    """

    model: str
    version: int | None
    scores: tuple[ClassScore, ...] = ()
    """Best first."""
    features: tuple[float, ...] = field(default=(), repr=False)
    """The backbone's features, where asked for."""
    error: GraftError | None = None

    @property
    def label(self) -> str:
        """The best class."""
        return self._best().label

    @property
    def probability(self) -> float:
        """The best class's probability, 0 to 1."""
        return self._best().probability

    def _best(self) -> ClassScore:
        if self.error is not None:
            raise self.error
        return self.scores[0]
