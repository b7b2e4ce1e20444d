"""The words of the house as types: jobs and their legal lives, models, versions.

Knows nothing of storage, sockets or threads.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

import msgspec

from service.errors import bad_field
from service.quantisation import QuantisationCost

LATEST = "latest"

ProviderSetting = Literal["auto", "tensorrt", "cuda", "openvino", "cpu"]
"""What is to compute features."""
Precision = Literal["fp32", "bf16", "fp16", "int8"]
"""What a backbone's file is computed in, wherever it serves."""
PrecisionSetting = Literal["auto", "fp32", "bf16", "fp16", "int8"]
"""What new versions are made for; `auto` takes what is quicker on this machine and exact enough."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""A number of things, as the contract's int32 can tell it."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self not in TRANSITIONS


class JobKind(StrEnum):
    """What a job makes: a version of a model, or a ranking of backbones."""

    FINE_TUNE = "fine_tune"
    RANKING = "ranking"


# RUNNING -> QUEUED happens when the service stops or died while a trainer worked.
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.QUEUED}
    ),
}


PartName = Literal["", "train", "val", "test"]
"""The part of a dataset that an image belongs to; empty where the service divides it."""


class ClassCount(msgspec.Struct, frozen=True):
    """Counts a class's images by part; all count as `train` where no part is named."""

    label: str
    train: Count
    validation: Count
    test: Count = 0


class LeftOutReason(StrEnum):
    """Reasons for which a file is not among the images of a dataset."""

    UNREADABLE = "unreadable"
    """Damaged, too large, or may not be read."""
    WRONG_FORMAT = "wrong_format"
    """Something other than an image, or in a format that is not decoded."""
    LINK = "link"
    """A symbolic or hard link, a device or a pipe: what it leads to is not followed."""
    HIDDEN = "hidden"
    """Its name, or a folder's around it, begins with a dot."""
    SYSTEM = "system"
    """What operating systems and network disks put beside images: thumbnails, bins."""
    STRAY = "stray"
    """It lies beside the folders of the classes."""
    COPY = "copy"
    """The same bytes as another image that is used."""
    CONTRADICTION = "contradiction"
    """The same bytes in two classes; none of them is used."""
    ERASED = "erased"
    """The same bytes as an image that was erased from the dataset."""


class LeftOutFile(msgspec.Struct, frozen=True):
    """A file that was left out."""

    path: str
    """Relative to the dataset, for people."""
    label: str
    """Its class; empty where it lies in none."""
    reason: LeftOutReason
    detail: str
    """For people."""


class LeftOut(msgspec.Struct, frozen=True):
    """Counts the files of one class that were left out for one reason."""

    reason: LeftOutReason
    label: str
    count: Count


class ReadSummary(msgspec.Struct, frozen=True):
    """Says what became of every file that was sent: seen = used + all that were left out."""

    seen: Count = 0
    used: Count = 0
    left_out: list[LeftOut] = []
    """Sorted by reason and class."""
    files: list[LeftOutFile] = []
    """The first `MAX_LEFT_OUT_FILES` of them."""
    nested: Count = 0
    """Used images that lie in folders below their class."""
    warnings: list[str] = []
    """What looks as if it was meant otherwise, for people."""

    @property
    def left_out_count(self) -> int:
        """Counts the files that were left out."""
        return self.seen - self.used


MAX_LEFT_OUT_FILES = 100


class VersionSource(msgspec.Struct, frozen=True):
    """One source of a version's images: a dataset, or a folder of the server's."""

    role: Literal["source", "target"]
    """Learned from with its classes, or adapted to."""
    dataset_id: str = ""
    folder: str = ""


class Parity(msgspec.Struct, frozen=True):
    """Answers of what serves against PyTorch, or against the CPU provider for a registered file.

    Of a version in int8 the form in float32 is compared.
    """

    max_difference: float
    """Largest absolute difference of a probability."""
    top1_agreement: float
    """Part of the images with the same best class, 0 to 1."""
    images: Count
    """How many were compared."""


Verdict = Literal["passed", "failed", "undecided"]
_WORST_FIRST: tuple[Verdict, ...] = ("failed", "undecided", "passed")


class GateCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One condition of a gate, and how it ended."""

    name: Literal["accuracy", "class_recall", "not_worse", "parity", "latency"]
    verdict: Verdict
    """`undecided`: too few images to compare on, or none to measure on."""
    passed: bool
    """Whether the version may be published: also where it is undecided and the gate says so."""
    value: float | None
    """An accuracy, the least recall of a class, the one-sided 95 % lower end of the difference in
    accuracy to the incumbent, a difference of a probability, or milliseconds; None where nothing
    could be measured."""
    bound: float
    """In the same unit."""
    detail: str
    """For people."""
    images_needed: Count = 0
    """Images that would settle an undecided comparison, about; 0 where that is not known."""


MeasuredOn = Literal["", "cross_validation", "held_out", "validation", "test", "target", "source"]
"""The images that a figure is of, none of them learned from by what answered: `cross_validation`
over the images that were learned from; `held_out` from those that came undivided; `validation` and
`test` as they came in `val/` and `test/`; `target` and `source` of a domain adaptation. "" where
nothing could be measured."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """How well a version classifies images that nothing was learned from or chosen by."""

    measured_on: MeasuredOn
    accuracy: float
    accuracy_low: float
    """Of the 95 % interval, by groups of images that belong together."""
    accuracy_high: float
    loss: float
    """Mean cross-entropy, nats."""
    count: Count
    """Images."""
    groups: Count
    """Groups of images that belong together; a lone image is one."""
    rounds: Count = 0
    """Of the cross-validation; 0 where the images were measured once."""


BLOCKS = "graft.blocks"
"""In the metadata of a backbone's file: how many features each of its blocks has, the last layer's
first; a list in JSON."""
PRECISION = "graft.precision"
"""In the same metadata: bf16 or fp16, for a file that is computed in it. One without is computed
in fp32, or in int8 where its graph says so."""

WHITE = "#ffffff"
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")


Framing = Literal["crop", "whole"]
"""What a backbone sees of an image: the middle square of it, or all of it, squeezed to a square."""


class ImageDecoding(msgspec.Struct, frozen=True):
    """How an image file becomes pixels, chosen once for a version and kept with it."""

    background: str = WHITE
    """The colour that transparency is laid on, "#rrggbb"."""
    bit_depth: int = 16
    """Bits used of 16-bit grey whose file does not declare them: 10, 12, 14 or 16."""
    size: Annotated[int, msgspec.Meta(ge=32, le=1024)] = 224
    """Side of what the backbone takes, pixels."""
    framing: Framing = "crop"


DEFAULT_DECODING = ImageDecoding()
"""The decoding for images that no version is to classify."""


DEFAULT_TENANT = "default"
"""Whose everything is where nobody has to say who they are."""


class ModelKey(NamedTuple):
    """Names a model among those of all tenants."""

    tenant: str
    name: str

    def __str__(self) -> str:
        """Returns "NAME" for the default tenant's, else "TENANT/NAME": for people, never parsed."""
        return self.name if self.tenant == DEFAULT_TENANT else f"{self.tenant}/{self.name}"


@dataclass(frozen=True)
class ModelFiles:
    """All that answers by a version need: the digests of its files, and its decoding."""

    model: ModelKey
    version: int
    """For statistics; 0 while it has no number."""
    backbone_digest: str
    head_digest: str
    decoding: ImageDecoding = DEFAULT_DECODING
    """Says how its images become pixels."""


Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """How probabilities become an answer; they stay what they are."""

    rule: Literal["argmax", "balanced", "thresholds"] = "argmax"
    """The most probable class; the one with the largest multiple of its share in the training; or
    the most probable of those that reach their threshold, or none."""
    thresholds: dict[str, Share] = {}
    """Of the rule of that name: the least probability of an answer by class."""
    default_threshold: Share = 0.0
    """Of the same, for every class that `thresholds` does not name."""

    def check(self, field: str) -> None:
        """Raises InvalidInput for thresholds that are none, or too many; `field` names it."""
        if self.rule != "thresholds":
            return
        at = f"{field}.thresholds"
        check_threshold_count(len(self.thresholds), field)
        named = {f"{at}.classes[{label}]": least for label, least in self.thresholds.items()}
        for where, least in {**named, f"{at}.others": self.default_threshold}.items():
            # Written so that NaN fails.
            if not 0 <= least <= 1:
                text = f"{where} is {least:g}: it must be at least 0 and at most 1"
                raise bad_field(where, text)

    def check_classes(self, classes: Collection[str], field: str) -> None:
        """Raises InvalidInput where a threshold is of none of the classes."""
        strange = sorted({*self.thresholds} - {*classes})
        if strange:
            raise bad_field(
                f"{field}.thresholds.classes",
                f"there are thresholds of classes that the model does not have: "
                f"{_listed(strange)}; its classes are {_listed(sorted(classes))}",
            )


ARGMAX = Decision()
MAX_THRESHOLDS = 1000
"""Classes that may have a threshold of their own."""
_NAMED = 10


def check_threshold_count(count: int, field: str) -> None:
    """Raises InvalidInput for more thresholds of classes than a decision may have."""
    if count > MAX_THRESHOLDS:
        at = f"{field}.thresholds.classes"
        raise bad_field(
            at,
            f"there are {count} classes in {at}: at most {MAX_THRESHOLDS} may be named; set others "
            "for all that are not",
        )


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(map(ascii, labels[:_NAMED])) + more


class Base(msgspec.Struct, frozen=True):
    """The version that a version grew from."""

    model: str
    """A name of the same tenant's."""
    version: int


class Augmentation(msgspec.Struct, frozen=True, kw_only=True):
    """How images that are learned from are varied; None means the recipe's choice."""

    mirror: bool | None = None
    min_scale: Annotated[float, msgspec.Meta(ge=0.05, le=1)] | None = None
    """Least part of an image's area that a random crop has."""
    rotation_degrees: Annotated[float, msgspec.Meta(ge=0, le=180)] | None = None
    """At most, to either side."""
    colour: Share | None = None
    """Most that brightness, contrast and saturation change by, as a part of them."""
    trivial_augment: bool | None = None


class Grouping(msgspec.Struct, frozen=True, kw_only=True):
    """How names tell which images belong together; at most one is set."""

    folder_level: Count = 0
    """The folder below the class's that names the group, from 1; 0 for none."""
    name_pattern: str = ""
    """Of file names: `{group}` is the group, `*` anything; "" for none."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a version's making; `manifest.json` beside its files."""

    format: int = 1
    model: str
    job_id: str
    method: str
    """`feature_based`, `model_based` or `domain_adaptation`: what `auto` came to."""
    recipe: str = ""
    backbone: str
    weights: str
    """The weights it started from: a torchvision name, a package's, `random:SEED`, or a tag of
    timm's or `file:NAME`, each with `@sha256:` and the first 16 digits of the file's digest."""
    weights_licence: str = ""
    """As their publisher names it; "" of random ones."""
    backbone_digest: str
    """sha256 of the backbone's ONNX file, lower-case hex."""
    feature_dim: int
    classes: list[str]
    temperature: float
    train_count: Count
    """Images that the served head learned from."""
    train_groups: Count
    """Groups of images that belong together among them; a lone image is one."""
    figures: list[Figure]
    """The one to go by first; empty where nothing could be measured."""
    calibrated: bool
    """Whether the probabilities were shown to be right on images that nothing was learned from."""
    calibration_note: str = ""
    """Why they were not, for people."""
    dataset_digest: str
    reading: ReadSummary = ReadSummary()
    """What became of the files of its data, those of its base not counted."""
    seed: int
    hyperparameters: dict[str, float | int | str | bool | None]
    preprocess: dict[str, float | int | str]
    decoding: ImageDecoding = DEFAULT_DECODING
    decision: Decision = ARGMAX
    """Turns its probabilities into answers, as its head has it; its figures go by it."""
    parity: Parity
    reference_digest: str = ""
    """Of a shared float backbone: sha256 of what PyTorch made of it (`trainer.reference`)."""
    backbone_difference: float | None = None
    """Of the same: the largest of a feature from PyTorch's, over the largest feature."""
    opset: int
    device: str
    precision: str
    """What it was trained in; of a frozen backbone, what its features were computed in."""
    provider: str
    """What computed the validation figures: `cpu`, `openvino`, `cuda`, `tensorrt`."""
    serving_precision: Precision = "fp32"
    """What its backbone's file is computed in, wherever it serves."""
    quantisation: QuantisationCost | None = None
    """What int8 costs, where it was tried and there were images to tell."""
    precision_note: str = ""
    """The same for people, or why int8 was asked for and is not served."""
    versions: dict[str, str]
    """Of Python and of every package that matters."""
    started_at: str
    """ISO 8601, UTC."""
    duration_s: float
    labels: dict[str, str] = {}
    gate_checks: list[GateCheck] = []
    """Empty when nothing was asked of it."""
    incumbent_version: int | None = None
    """What `not_worse` was checked against; None where there was none."""
    base: Base | None = None
    weights_asked: str = ""
    """As the request named them, for versions that grow from this one; so are the next three."""
    grouping: Grouping | None = None
    augmentation: Augmentation | None = None
    case_sensitive_labels: bool = False
    technique: str = ""
    """Of domain adaptation: what serves, `source_only` where adapting did not look better."""
    target_digest: str = ""
    """Of the target's images, as of an unlabelled dataset that holds them."""
    stages_s: dict[str, float] = {}
    """Where the time went."""

    @property
    def headline(self) -> Figure | None:
        """Returns the figure to go by; None where none is of images as the version is for."""
        return next((f for f in self.figures if f.measured_on != "source"), None)

    @property
    def gate_failures(self) -> list[str]:
        """Lists what of its gate it did not reach, for people."""
        return gate_failures(self.gate_checks)

    @property
    def gate_verdict(self) -> Literal[Verdict, "none"]:
        """Returns the worst verdict of its gate's conditions; "none" without a gate."""
        found = {check.verdict for check in self.gate_checks}
        for verdict in _WORST_FIRST:
            if verdict in found:
                return verdict
        return "none"


def gate_failures(checks: Iterable[GateCheck]) -> list[str]:
    """Lists the conditions of a gate that were not reached, for people."""
    return [check.detail for check in checks if not check.passed]


def check_name(value: str, field: str) -> str:
    """Returns `value` when it can name a model or an alias; raises InvalidInput otherwise."""
    if not _NAME.fullmatch(value):
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise bad_field(
            field,
            f"{field} {shown!r} is not a name: use 1 to 63 lower-case letters, digits, "
            "'-', '_' and '.', beginning with a letter or digit",
        )
    return value


def check_alias(value: str, field: str) -> str:
    """As `check_name`, for an alias: it is not a number either."""
    check_name(value, field)
    if value.isdigit():
        raise bad_field(
            field, f"{field} {value!r} is a number, which could be taken for a version: use a name"
        )
    return value


def check_colour(value: str, field: str) -> str:
    """Returns a colour "#rrggbb" in lower case; raises InvalidInput for anything else."""
    if not _COLOUR.fullmatch(value):
        raise bad_field(
            field,
            f"{field} {value[:80]!r} is not a colour: use # and six hexadecimal digits, such as "
            "#ffffff for white or #000000 for black",
        )
    return value.lower()
