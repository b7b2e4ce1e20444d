"""The contract between the service and the trainer process.

The launcher starts `python -m trainer run SPEC`, where SPEC is the path of a
JSON file that holds a `JobSpec`. The trainer writes one JSON `Record` a line to
its standard output (everything else it prints goes to standard error) and
exits with one of the codes below. Its artifacts lie in `JobSpec.out_dir`:

    backbone.onnx      only when the job made or first exported a backbone
    head.safetensors   see service.inference.head
    manifest.json      service.domain.Manifest
    report.json, report.html

The trainer must end soon after its standard input closes (its parent is gone)
or after SIGTERM. Knows no torch, no gRPC, no database.
"""

from enum import IntEnum
from typing import Literal

import msgspec

from service.domain import (
    ClassCount,
    Manifest,
    Parity,
    Precision,
    ProviderSetting,
    RejectedFile,
)
from service.errors import Reason

__all__ = [
    "BACKBONES",
    "BACKBONE_FILE",
    "DEFAULT_BACKBONE",
    "HEAD_FILE",
    "MANIFEST_FILE",
    "REPORT_HTML_FILE",
    "REPORT_JSON_FILE",
    "ClassCount",
    "DataFound",
    "EpochEnded",
    "ExitCode",
    "ExportedBackbone",
    "Failed",
    "FeatureBased",
    "Finished",
    "Heartbeat",
    "JobSpec",
    "Manifest",
    "Method",
    "ModelBased",
    "Note",
    "Parity",
    "Precision",
    "Progressed",
    "ProviderSetting",
    "Reason",
    "Record",
    "RejectedFile",
    "decode_record",
    "encode",
]

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet_lite0")
DEFAULT_BACKBONE = "efficientnet_lite0"
"""Its weights come with a package, so that it works without any network."""

BACKBONE_FILE = "backbone.onnx"
HEAD_FILE = "head.safetensors"
MANIFEST_FILE = "manifest.json"
REPORT_JSON_FILE = "report.json"
REPORT_HTML_FILE = "report.html"


class ExitCode(IntEnum):
    """How the trainer ended."""

    OK = 0
    """The last record is `Finished`."""
    CRASHED = 1
    """An unhandled exception; the last record may be missing."""
    FAILED = 3
    """The last record is `Failed`; trying again will not help."""
    STOPPED = 4
    """It was told to stop (SIGTERM, or its standard input closed)."""


class FeatureBased(msgspec.Struct, frozen=True, tag="feature_based", kw_only=True):
    """Frozen backbone, new head. `l2` as in the proto; None means cross-validated."""

    l2: float | None = None


class ModelBased(msgspec.Struct, frozen=True, tag="model_based", kw_only=True):
    """All layers, or those from a stage on. None means the recipe's choice."""

    recipe: Literal["auto", "classic"] = "auto"
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    train_from_stage: str = ""
    freeze_batch_norm: bool | None = None
    early_stopping_patience: int | None = None
    """Epochs without a better validation loss; 0 means never."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


Method = FeatureBased | ModelBased


class ExportedBackbone(msgspec.Struct, frozen=True):
    """A pretrained backbone that an earlier job exported to ONNX; never changes."""

    weights: str
    """As in `Manifest.weights`, with ":int8" after it for the quantised form."""
    path: str
    digest: str


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that the trainer needs to know."""

    job_id: str
    model: str
    data_dir: str
    """A folder per class, or `train/` and `val/` with a folder per class in each."""
    out_dir: str
    """Empty; the artifacts go here."""
    method: Method
    backbone: str = DEFAULT_BACKBONE
    weights: str = ""
    """"" for the backbone's pretrained ones, a torchvision name, or "random"."""
    exported: list[ExportedBackbone] = []
    """What is known of `backbone`; spares an export when the weights fit."""
    weights_dir: str
    """Where downloaded weights are kept; may be a pre-filled mirror."""
    validation_fraction: float = 0.2
    seed: int = 0
    time_budget_s: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """Of torch and ONNX Runtime; 0 means as many as there are cores."""
    provider: ProviderSetting = "auto"
    """What computes features and checks: the one that serves."""
    precision: Precision = "exact"
    """Of the same: the one that serves."""
    labels: dict[str, str] = {}


class Progressed(msgspec.Struct, frozen=True, tag="progress"):
    """The job got on; stages as in the proto's Progress, fraction 0 to 1."""

    stage: str
    fraction: float
    detail: str = ""


class DataFound(msgspec.Struct, frozen=True, tag="data"):
    """What the data is, counted after the split; at most 100 rejected files."""

    classes: list[ClassCount]
    rejected: list[RejectedFile]
    rejected_count: int
    digest: str


class EpochEnded(msgspec.Struct, frozen=True, tag="epoch", kw_only=True):
    """The figures of one epoch, as the proto's EpochMetrics."""

    epoch: int
    epochs: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float
    eta_s: float
    learning_rate: float


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A word for people."""

    level: Literal["info", "warning"]
    text: str


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The trainer lives; sent at least every 10 s. Not kept."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last record of a job that cannot succeed."""

    reason: Reason
    message: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last record of a job that succeeded: the artifacts are complete in `out_dir`."""

    validation_accuracy: float
    validation_count: int


Record = Progressed | DataFound | EpochEnded | Note | Heartbeat | Failed | Finished

_decoder = msgspec.json.Decoder(Record)


def encode(value: msgspec.Struct) -> bytes:
    """Returns the value as one line of JSON, without the newline."""
    return msgspec.json.encode(value)


def decode_record(line: bytes) -> Record:
    """Reads one line; raises msgspec.DecodeError for anything that is no record."""
    record: Record = _decoder.decode(line)
    return record
