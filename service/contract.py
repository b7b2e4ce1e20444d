"""The contract between the service and the trainer process.

The launcher starts `python -m trainer run SPEC`, where SPEC is the path of a
JSON file that holds a `JobSpec` (`rank` and `export` take theirs), or `python -m
trainer wait`, which is told it by an `Order` later. The trainer writes one JSON `Record` a line to
its standard output (everything else it prints goes to standard error) and
exits with one of the codes below. Its artifacts lie in `JobSpec.out_dir`:

    backbone.onnx      only when the job made or first exported a backbone
    reference.safetensors  the same of a shared one, see trainer.reference
    head.safetensors   see service.engine.head
    answers.safetensors  what was answered on images that were not learned from
    manifest.json      service.domain.Manifest
    report.json, report.html

The trainer must end soon after its standard input closes (its parent is gone)
or after SIGTERM. Knows no torch, no gRPC, no database.
"""

from enum import IntEnum
from typing import Annotated, Any, Literal, get_args

import msgspec

from service.backbones import DEFAULT_BACKBONE
from service.domain import (
    ARGMAX,
    DEFAULT_DECODING,
    WHITE,
    Augmentation,
    Base,
    ClassCount,
    Count,
    Decision,
    GateCheck,
    Grouping,
    ImageDecoding,
    Manifest,
    Parity,
    Precision,
    PrecisionSetting,
    ProviderSetting,
    ReadSummary,
    Share,
)
from service.errors import Reason

__all__ = [  # what it passes on; its own names follow
    "DEFAULT_BACKBONE",
    "Augmentation",
    "Base",
    "ClassCount",
    "GateCheck",
    "Grouping",
    "ImageDecoding",
    "Manifest",
    "Parity",
    "Precision",
    "PrecisionSetting",
    "ProviderSetting",
    "ReadSummary",
    "Reason",
]

Positive = Annotated[float, msgspec.Meta(gt=0)]
AtLeastZero = Annotated[float, msgspec.Meta(ge=0)]
BelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Epochs = Annotated[int, msgspec.Meta(ge=1, le=10_000)]

MOST_RANKED_IMAGES = 2000
"""Backbones are ranked on at most so many images, a stratified sample of more."""

HEARTBEAT_S = 5.0
"""Between two heartbeats, where the parent does not ask for more of them."""

BACKBONE_FILE = "backbone.onnx"
REFERENCE_FILE = "reference.safetensors"
HEAD_FILE = "head.safetensors"
ANSWERS_FILE = "answers.safetensors"
MANIFEST_FILE = "manifest.json"
REPORT_JSON_FILE = "report.json"
REPORT_HTML_FILE = "report.html"
REPORT_VERSION_MARK = "<!--version-->"
"""Marks the place in a page's heading for the version's number, once there is one."""
REPORT_STANDING_MARK = "<!--standing-->"
"""Marks the place below it where a candidate is called one."""


Command = Literal["run", "rank", "export"]
"""Of a trainer, with a spec of each kind."""


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


class Auto(msgspec.Struct, frozen=True, tag="auto"):
    """Frozen features; the network is trained only where the cross-validated loss says it pays."""


class FeatureBased(msgspec.Struct, frozen=True, tag="feature_based", kw_only=True):
    """Frozen backbone, new head. `l2` as in the proto; None means cross-validated."""

    l2: Positive | None = None
    augmented_views: Annotated[int, msgspec.Meta(ge=0, le=16)] = 0
    """Randomly cropped and flipped copies of each training image, beside it."""


class ModelBased(msgspec.Struct, frozen=True, tag="model_based", kw_only=True):
    """The last stages, all layers, or those from a stage on. None means the recipe's choice."""

    recipe: Literal["auto", "classic"] = "auto"
    epochs: Epochs | None = None
    batch_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    learning_rate: Positive | None = None
    momentum: BelowOne | None = None
    weight_decay: AtLeastZero | None = None
    label_smoothing: BelowOne | None = None
    train_from_stage: str = ""
    freeze_batch_norm: bool | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


FROZEN_TECHNIQUES = ("coral", "mcc", "pseudo_labels")
NETWORK_TECHNIQUES = ("cdan",)
Technique = Literal["auto", "coral", "mcc", "pseudo_labels", "cdan"]


class DomainAdaptation(msgspec.Struct, frozen=True, tag="domain_adaptation", kw_only=True):
    """Labelled source images (the job's data) and unlabelled ones of the target."""

    technique: Technique = "auto"
    """The first group works on frozen features, the second trains the network on."""
    always_adapt: bool = False
    """Publish the adapted model also where it does not look better than source-only."""
    evaluate_on_target: bool = False
    """The target's folders name its classes: measured with, never trained with."""
    epochs: Epochs | None = None
    """Of the techniques that train the network; None means the recipe's choice."""
    batch_size: Annotated[int, msgspec.Meta(ge=2, le=4096)] | None = None
    learning_rate: Positive | None = None


Method = Auto | FeatureBased | ModelBased | DomainAdaptation

Baseline = Literal["linear_probe", "full_fine_tune", "from_scratch", "nearest_class_mean"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """What a version must reach to be published; None asks for nothing."""

    min_accuracy: Share | None = None
    min_class_recall: Share | None = None
    """Of every class that `class_recalls` does not name."""
    class_recalls: dict[str, Share] = {}
    """The least recall by class."""
    not_worse_than: str = ""
    """An alias: paired on the same images, by the classes of its version; "" asks for nothing."""
    max_regression: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.03
    """Of accuracy, 0 to 1: it must be shown (one-sided, 95 %) that no more is lost."""
    when_uncertain: Literal["hold", "promote"] = "hold"
    """What becomes of a version where a check is undecided."""
    max_parity_difference: Positive | None = None
    """Of a probability, between PyTorch and what serves."""
    max_latency_ms: Positive | None = None
    """Of one image on an idle engine, decoding included; the median."""
    alias: str = ""
    """An alias that moves to the version when it passes, beside `latest`."""


class Incumbent(msgspec.Struct, frozen=True, kw_only=True):
    """The version that a gate compares with, or that a job grows from."""

    version: int
    backbone_digest: str
    head_digest: str
    decoding: ImageDecoding = DEFAULT_DECODING
    answers_digest: str
    """Of its answers to images that it did not learn from."""


def form_name(weights: str, precision: Precision) -> str:
    """Names a backbone's file: its weights, and what it is computed in unless that is fp32."""
    return weights if precision == "fp32" else f"{weights}:{precision}"


class ExportedBackbone(msgspec.Struct, frozen=True):
    """A pretrained backbone in ONNX, exported by an earlier job or registered; never changes."""

    weights: str
    """As in `Manifest.weights`, named as `form_name` does."""
    digest: str
    licence: str = ""
    """Of a registered one, as whoever registered it names it."""
    reference: str = ""
    """sha256 of what a job without PyTorch knows it by; "" of a quantised or registered one."""


class PretrainedBackbone(msgspec.Struct, frozen=True, kw_only=True):
    """A backbone with the weights to start from."""

    backbone: str
    weights: str = ""
    exported: list[ExportedBackbone] = []


class RankedBackbone(msgspec.Struct, frozen=True, kw_only=True):
    """How well a backbone's features fit the data, and what it costs."""

    backbone: str
    weights: str
    """As in `Manifest.weights`."""
    weights_licence: str = ""
    """As in `Manifest.weights_licence`."""
    log_loss: float | None = None
    """Of a quick head, cross-validated, nats an image; None where nothing could be held out."""
    log_me: float | None = None
    """Nats an image, see `trainer.transferability`; None when not scored."""
    image_ms: float | None = None
    """When served here, one image at a time, decoding included."""
    feature_dim: Count = 0
    problem: str = ""
    """Why it was not scored: no weights, no time."""


class ImageSource(msgspec.Struct, frozen=True, kw_only=True):
    """Images of a job: a folder of the server's, read where it lies, or a stored dataset."""

    folder: str = ""
    """A real path; "" for a dataset."""
    index_file: str = ""
    """The file of a folder's index; "" where the trainer is to read the folder itself, and for a
    dataset."""
    index: str = ""
    """sha256 of a dataset's index; "" for a folder."""
    packs: list[str] = []
    """sha256 of each file that holds images of a dataset."""
    name: str = ""
    """For people."""


class TrainerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What jobs and rankings have in common."""

    data: ImageSource
    files: dict[str, str] = {}
    """From the sha256 of each stored file that the job may need to its path on this machine; filled
    in just before the trainer starts. A backbone whose file is not among them is exported anew."""
    weights_dir: str
    """Where downloaded weights are kept; may be a pre-filled mirror."""
    seed: int = 0
    gpu: str = ""
    """What the launcher sets CUDA_VISIBLE_DEVICES to: the one GPU that the trainer sees, "" for
    none. Of no use to one that no launcher started."""
    threads: int = 0
    """Of torch and ONNX Runtime; 0 means one for each core that the process may use."""
    provider: ProviderSetting = "auto"
    """What computes features and checks: as in the serving process."""
    precision: PrecisionSetting = "fp32"
    """What the version is to be computed in, wherever it serves."""
    provider_table: str = ""
    """The file that says which provider was measured to be quickest for which backbone."""
    feature_cache: str = ""
    """The file that keeps features between jobs; "" keeps none."""
    feature_cache_bytes: int = 2**30
    feature_cache_owner: str = ""
    """Whose features are found in it, and kept; no job can tell what those of others are."""
    heartbeat_s: float = HEARTBEAT_S
    """Between two heartbeats."""


class JobSpec(TrainerSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that the trainer needs to know."""

    job_id: str
    model: str
    out_dir: str
    """Empty; the artifacts go here."""
    method: Method
    backbone: str = DEFAULT_BACKBONE
    """A name, or "auto" for the best of `backbones`."""
    weights: str = ""
    """As in FineTuneRequest: "" for the backbone's pretrained ones, "random", "file:NAME"."""
    exported: list[ExportedBackbone] = []
    """What is known of `backbone`; spares an export when the weights fit."""
    backbones: list[PretrainedBackbone] = []
    """What backbone "auto" is chosen from: all whose weights are available."""
    framing: Literal["auto", "crop", "whole", "compare"] = "auto"
    """What the backbone sees of an image; `auto` compares both where images are long."""
    outlier_false_alarm_rate: float | None = None
    """The part of images of the training's kind that may be called outliers; None means 0.05."""
    validation_fraction: float = 0.2
    """Held out where the network is trained and no image is in `val/`."""
    grouping: Grouping | None = None
    previous_answers: str = ""
    """sha256 of the answers of the version before, whose images keep their sides; "" for none."""
    time_budget_s: float | None = None
    """The longest that the job may take."""
    asked_budget_s: float | None = None
    """What the request allows; None where it names no time, and `auto` trains no network long."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """On `cpu` nothing of the job runs on a GPU, whatever `provider` says."""
    is_precision_asked: bool = False
    """By the request: int8 is then served even where it is shown to lose accuracy."""
    case_sensitive_labels: bool = False
    """Class names that differ in upper and lower case alone are two."""
    augmentation: Augmentation | None = None
    labels: dict[str, str] = {}
    background: str = WHITE
    """The colour that the transparency of images is laid on, "#rrggbb"."""
    target: ImageSource | None = None
    """Of domain adaptation: images at any depth, or a folder per class."""
    baselines: list[Baseline] = []
    """What the report compares with, beside the nearest class mean."""
    decision: Decision = ARGMAX
    """Turns the version's probabilities into answers; what is measured goes by it."""
    gate: Gate | None = None
    incumbent: Incumbent | None = None
    """Behind `gate.not_worse_than`; None where there is none yet."""
    base: Base | None = None
    """The version that this one grows from."""
    base_data: list[ImageSource] = []
    """What it was trained on, oldest first; the job's own data comes on top."""
    base_digest: str = ""
    """The base's `Manifest.dataset_digest`; "" where there is no base."""
    checkpoint_dir: str = ""
    """Survives the attempt: training goes on from what lies here; "" keeps nothing."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer that waits is told: one line of JSON on its standard input."""

    command: Command = "run"
    spec: str
    """The path of the JSON file that it would have been started with."""
    log: str
    """The file that what it prints beside records goes to."""
    tmp_dir: str = ""
    """Where its temporary files go from now on; "" leaves that as it is."""
    gpu: str = ""
    """As in `TrainerSpec`: none was visible while it waited."""


class RankSpec(TrainerSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which backbone to start from: backbones are scored on the data, none is trained."""

    backbones: list[PretrainedBackbone]
    work_dir: str = ""
    """Exists; what is written meanwhile goes here. "" means a temporary folder."""
    only_available: bool = False
    """Leaves backbones out whose weights need a download."""
    time_budget_s: float = 60.0


class ExportSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which backbone to export into `out_dir`, which exists; nothing is downloaded."""

    backbone: str
    out_dir: str
    weights_dir: str
    precision: PrecisionSetting = "fp32"
    """As in `TrainerSpec`, as is the next; no GPU is needed."""
    gpu: str = ""
    threads: int = 0


Spec = JobSpec | RankSpec | ExportSpec
"""What a trainer is started on."""


class Progressed(msgspec.Struct, frozen=True, tag="progress"):
    """The job got on; stages as in the proto's Progress."""

    stage: str
    fraction: float
    """Done of the stage, 0 to 1: from 0 anew in each, and 1 at its end alone."""
    detail: str = ""
    step: Count = 0
    steps: Count = 0
    """Of the stage, as planned now; 0 where it has no steps."""
    remaining_s: float | None = None
    """Until the stage's end, at the pace that was measured; None while that is not known."""
    elapsed_s: float = 0.0
    """Since the stage began; the service's to fill in."""


class DataFound(msgspec.Struct, frozen=True, tag="data"):
    """Describes a job's data, counted after the split."""

    classes: list[ClassCount]
    summary: ReadSummary
    digest: str


class EpochEnded(msgspec.Struct, frozen=True, tag="epoch", kw_only=True):
    """The figures of one epoch, as the proto's EpochMetrics."""

    epoch: Count
    epochs: Count
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    """Of images that are not learned from; None where there are none."""
    validation_accuracy: float | None
    images_per_second: float
    eta_s: float
    learning_rate: float


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A word for people."""

    level: Literal["info", "warning"]
    text: str


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The trainer lives; sent every `JobSpec.heartbeat_s`. Not kept.

    One that hangs sends none: one that uses no processor time and waits neither for a disk
    nor for what it said that it waits for.
    """


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last record of a job that cannot succeed."""

    reason: Reason
    message: str


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last record of a job that succeeded: the artifacts are complete in `out_dir`."""

    accuracy: float | None
    """The headline's; None where nothing could be measured."""
    count: Count
    """Images that it is of."""


class BackbonesRanked(msgspec.Struct, frozen=True, tag="ranked"):
    """The one to take first; what could not be scored last. The last record of a ranking."""

    ranking: list[RankedBackbone]
    explanation: str
    """For people."""
    images: Count
    """How many were scored on."""


class Exported(msgspec.Struct, frozen=True, tag="exported"):
    """The last record of an export: forms in `out_dir`, each in a file named by its digest."""

    forms: list[ExportedBackbone]


Record = (
    Progressed | DataFound | EpochEnded | Note | Heartbeat | Failed | Finished | BackbonesRanked
    | Exported
)  # fmt: skip

_decoder = msgspec.json.Decoder(Record)
_manifest_decoder = msgspec.json.Decoder(Manifest)


def encode(value: msgspec.Struct) -> bytes:
    """Returns the value as one line of JSON, without the newline."""
    return msgspec.json.encode(value)


def decode_record(line: bytes) -> Record:
    """Reads one line; raises msgspec.DecodeError for anything that is not a record."""
    record: Record = _decoded(_decoder, line)
    return record


def decode_manifest(data: bytes) -> Manifest:
    """Reads a manifest; raises msgspec.DecodeError for anything that is none."""
    manifest: Manifest = _decoded(_manifest_decoder, data)
    return manifest


def _decoded(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (RecursionError, UnicodeDecodeError) as error:
        raise msgspec.DecodeError(f"it is not JSON: {error}") from error
