"""Requests of FineTune and RankBackbones as jobs work by them, with the checks of their fields.

A `JobRequest` is stored with its job as JSON, beside the message that it was made of. Field names
in errors are those of the message. Knows no gRPC.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import msgspec.inspect

from service import backbones as registry
from service.contract import (
    DEFAULT_BACKBONE,
    NETWORK_TECHNIQUES,
    Augmentation,
    Auto,
    Base,
    Baseline,
    DomainAdaptation,
    FeatureBased,
    Gate,
    Grouping,
    Method,
    ModelBased,
    PretrainedBackbone,
)
from service.domain import (
    LATEST,
    WHITE,
    Decision,
    JobKind,
    ModelKey,
    PrecisionSetting,
    VersionSource,
    check_alias,
    check_colour,
    check_name,
)
from service.errors import InvalidInput, NotAllowed, NotFound, Reason, bad_field
from service.ingest.grouping import NamedGroups
from service.ingest.labels import check_given
from service.jobs.weights import TRAINED_BASELINES, check_registered

AUTO = "auto"
"""Names no backbone: the job chooses one by its data."""
DEFAULT_VALIDATION_FRACTION = 0.2
MAX_REQUEST_ID_CHARS = 128
DEFAULT_RANKING_S = 60.0
_MAX_CLASS_RECALLS = 1000
_MAX_RANKED = 32
_MAX_LABELS = 32
_MAX_KEY_CHARS = 63
_MAX_VALUE_CHARS = 255
_MAX_PATH_CHARS = 4096

_Number = msgspec.inspect.IntType | msgspec.inspect.FloatType


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request; its images lie at `server_path` or in `dataset_id`, one of the two."""

    tenant: str
    """The tenant that the job belongs to."""
    model: str
    """A name of the tenant's; its first version makes the model."""
    server_path: str = ""
    dataset_id: str = ""
    target_path: str = ""
    """For domain adaptation, this or `target_dataset_id`."""
    target_dataset_id: str = ""
    backbone: str = ""
    """"" for the server's default, "auto" for the best for the job's data."""
    weights: str = ""
    method: Method = msgspec.field(default_factory=Auto)
    validation_fraction: Annotated[float, msgspec.Meta(ge=0.05, le=0.5)] | None = None
    """None means 0.2."""
    outlier_false_alarm_rate: Annotated[float, msgspec.Meta(ge=0.001, le=0.5)] | None = None
    """None means 0.05."""
    grouping: Grouping | None = None
    """With a base, None means the base's."""
    seed: int | None = None
    """None means 0."""
    time_budget_s: Annotated[float, msgspec.Meta(ge=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    labels: dict[str, str] = {}
    background: str = ""
    """"#rrggbb" below transparency; "" for white, with a base for the base's."""
    framing: Literal["auto", "crop", "whole", "compare"] = "auto"
    serving_precision: PrecisionSetting = "auto"
    """auto means the server's default."""
    augmentation: Augmentation | None = None
    """None means the method's own choice; what is not set is the base's, where there is one."""
    baselines: list[Baseline] = []
    gate: Gate | None = None
    decision: Decision | None = None
    """None means argmax, with a base the base's."""
    case_sensitive_labels: bool = False
    """Class names that differ in upper and lower case alone are two."""
    base: Base | None = None
    """The version whose images are learned from too."""
    base_sources: list[VersionSource] = []
    """The images that it was trained on, oldest first, whatever becomes of the version."""
    base_digest: str = ""
    """The digest of that data, as it was then."""

    @property
    def kind(self) -> JobKind:
        """Returns the kind of its job."""
        return JobKind.FINE_TUNE

    def backbone_names(self, default: str) -> list[str]:
        """Returns the backbones that its job needs; "auto" where it may choose any."""
        return [self.backbone_or(default)]

    @property
    def key(self) -> ModelKey:
        """Returns the key of the model that the job makes a version of."""
        return ModelKey(self.tenant, self.model)

    @property
    def background_or_white(self) -> str:
        """Returns the colour below transparency that is meant, "#rrggbb" in lower case."""
        return self.background.lower() or WHITE

    def backbone_or(self, default: str) -> str:
        """Returns the request's backbone, else the server's `default`; may be "auto"."""
        return self.backbone or default

    def check(self, default_backbone: str = DEFAULT_BACKBONE, *, needs_images: bool = True) -> None:
        """Raises InvalidInput for the first field whose value is not allowed.

        Without `needs_images` those may be missing: they are uploaded later.
        """
        check_name(self.model, "model")
        _check_data(self.server_path, self.dataset_id, is_needed=needs_images)
        backbone = self.backbone_or(default_backbone)
        check_registered(backbone, self.weights, self.method, self.baselines)
        if backbone != AUTO:
            registry.found(backbone, "backbone", AUTO).weights_name(self.weights)
        elif self.weights:
            raise bad_field(
                "weights",
                "weights are named and the backbone is auto, which takes each backbone's "
                "pretrained ones: leave weights empty, or name a backbone",
            )
        _check_bounds(self.method, f"{self.method.__struct_config__.tag}.")
        match self.method:
            case ModelBased() as method:
                self._check_model_based(method, backbone)
            case DomainAdaptation() as method:
                self._check_domain_adaptation(method, needs_images=needs_images)
        _check_bounds(self)
        _check_grouping(self.grouping)
        if self.augmentation is not None:
            _check_bounds(self.augmentation, "augmentation.")
        _check_seed(self.seed)
        _check_labels(self.labels)
        if self.background:
            check_colour(self.background, "background")
        if len(set(self.baselines)) < len(self.baselines):
            raise bad_field("baselines", "baselines names one twice: name each once")
        if self.gate is not None:
            _check_gate(self.gate)
            _check_can_be_measured(self.gate, self.method)
        if self.decision is not None:
            self.decision.check("decision")

    def check_augments(self) -> None:
        """Raises InvalidInput for an augmentation where no image is varied.

        For what the caller asks for: a base's is kept, for the versions that grow from this one.
        """
        if self.augmentation in (None, Augmentation()):
            return
        if not TRAINED_BASELINES.isdisjoint(self.baselines):
            return
        match self.method:
            case FeatureBased(augmented_views=0):
                raise bad_field(
                    "augmentation",
                    "augmentation is set, and feature_based without augmented_views varies no "
                    "image: set augmented_views, choose another method, or leave it out",
                )
            case DomainAdaptation(technique=technique) if technique not in NETWORK_TECHNIQUES:
                raise bad_field(
                    "augmentation",
                    f"augmentation is set, and the technique {technique} works on frozen features "
                    "and varies no image: leave it out, or choose one of "
                    f"{', '.join(NETWORK_TECHNIQUES)}",
                )

    def _check_model_based(self, method: ModelBased, backbone: str) -> None:
        at = "model_based."
        # Of "auto" the trainer knows which backbone it is, and of timm's which stages it has.
        row = registry.find(backbone)
        stages = row.stages if row else ()
        if method.train_from_stage and stages and method.train_from_stage not in stages:
            raise bad_field(
                at + "train_from_stage",
                f"{backbone} has no stage {_shown(method.train_from_stage)}; its stages are "
                f"{', '.join(stages)}",
            )
        if method.precision == "fp16" and self.device == "cpu":
            raise bad_field(
                at + "precision", "fp16 trains on CUDA alone: use fp32 or bf16 on the CPU"
            )

    def _check_domain_adaptation(self, method: DomainAdaptation, *, needs_images: bool) -> None:
        at = "domain_adaptation."
        if needs_images and not self.target_path and not self.target_dataset_id:
            raise bad_field(
                at + "target",
                "the request names no images of the target: set target_path, target_dataset_id "
                "or target_images",
            )
        for name in ("epochs", "batch_size", "learning_rate"):
            is_set = getattr(method, name) is not None
            if is_set and method.technique not in NETWORK_TECHNIQUES:
                raise bad_field(
                    at + name,
                    f"{name} is set and the technique {method.technique} trains a head alone: "
                    f"leave it out, or choose one of {', '.join(NETWORK_TECHNIQUES)}",
                )


class RankRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request to rank backbones; fields in errors are those of its message."""

    tenant: str
    """The tenant that asks."""
    server_path: str = ""
    dataset_id: str = ""
    backbones: list[PretrainedBackbone] = []
    """None means all whose weights are available."""
    time_budget_s: Annotated[float, msgspec.Meta(ge=1, le=600)] | None = None
    """None means 60."""
    seed: int | None = None
    """None means 0."""
    case_sensitive_labels: bool = False

    @property
    def kind(self) -> JobKind:
        """Returns the kind of its job."""
        return JobKind.RANKING

    @property
    def device(self) -> str:
        """Returns where to compute: a ranking does not care."""
        return "auto"

    def backbone_names(self, default: str) -> list[str]:  # noqa: ARG002 - as of a fine-tuning
        """Returns the backbones that its job needs; "auto" where it takes all that are there."""
        return [each.backbone for each in self.backbones] or [AUTO]

    def check(self, *, needs_images: bool = True) -> None:
        """Raises InvalidInput for the first field whose value is not allowed.

        Without `needs_images` those may be missing: they are uploaded later.
        """
        _check_data(self.server_path, self.dataset_id, is_needed=needs_images)
        if len(self.backbones) > _MAX_RANKED:
            raise bad_field(
                "backbones",
                f"there are {len(self.backbones)} backbones: at most {_MAX_RANKED} are "
                "ranked at once",
            )
        met: dict[tuple[str, str], int] = {}
        for index, pretrained in enumerate(self.backbones):
            at = f"backbones[{index}]"
            row = registry.found(pretrained.backbone, f"{at}.backbone")
            row.weights_name(pretrained.weights, f"{at}.weights")
            check_registered(pretrained.backbone, pretrained.weights, at=f"{at}.")
            first = met.setdefault((pretrained.backbone, pretrained.weights), index)
            if first != index:
                raise bad_field(at, f"{at} is backbones[{first}] again: name each once")
        _check_bounds(self)
        _check_seed(self.seed)


def check_request_id(value: str) -> None:
    """Raises InvalidInput for a request id that is too long."""
    if len(value) > MAX_REQUEST_ID_CHARS:
        raise bad_field("request_id", f"request_id has more than {MAX_REQUEST_ID_CHARS} characters")


def allowed_path(path: str, allowed: tuple[Path, ...], field: str = "server_path.path") -> Path:
    """Returns the real path behind `path`, links resolved, when it lies in an allowed folder.

    Raises InvalidInput, NotAllowed (PATH_NOT_ALLOWED) or NotFound
    (PATH_NOT_FOUND) about `field`; the messages say nothing about what lies outside.
    """
    if not path.startswith("/") or "\0" in path or len(path) > _MAX_PATH_CHARS:
        raise bad_field(
            field, f"path {_shown(path)} is not absolute: name a folder or an archive from '/' on"
        )
    try:
        real = Path(path).resolve(strict=False)
    except (OSError, RuntimeError):
        # A loop of links, or a name that no file system takes: not inside, whatever it is.
        real = Path("/")
    folders = [folder.resolve() for folder in allowed]
    if not any(real.is_relative_to(folder) for folder in folders):
        raise NotAllowed(
            Reason.PATH_NOT_ALLOWED,
            f"path {_shown(path)} lies outside the folders that this server may read: ask its "
            "operator to allow the folder (GRAFT_ALLOWED_DIRS), or upload the images",
            field=field,
        )
    try:
        is_there = real.is_dir() or real.is_file()
    except OSError:
        is_there = False
    if not is_there:
        raise NotFound(
            Reason.PATH_NOT_FOUND, f"there is no folder or archive at {_shown(path)}", field=field
        )
    return real


def _check_data(server_path: str, dataset_id: str, *, is_needed: bool) -> None:
    if is_needed and not server_path and not dataset_id:
        raise bad_field(
            "data", "the request names no images: set server_path, dataset_id or inline_images"
        )
    if server_path and dataset_id:
        raise bad_field("data", "server_path and dataset_id are both set: set one")


def _check_seed(seed: int | None) -> None:
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise bad_field("seed", "seed does not fit into 64 bits")


def _check_grouping(given: Grouping | None) -> None:
    if given is None:
        return
    NamedGroups(given.folder_level, given.name_pattern)
    if not given.folder_level and not given.name_pattern:
        raise bad_field(
            "grouping",
            "grouping says neither which folder names the groups nor which part of a file's name: "
            "set folder_level, from 1, or name_pattern",
        )


def _check_gate(gate: Gate) -> None:
    _check_bounds(gate, "gate.")
    if len(gate.class_recalls) > _MAX_CLASS_RECALLS:
        raise bad_field(
            "gate.class_recalls",
            f"there are {len(gate.class_recalls)} classes in class_recalls: at most "
            f"{_MAX_CLASS_RECALLS} may be named; set min_class_recall for all others",
        )
    for label, recall in gate.class_recalls.items():
        try:
            check_given(label, is_labelled=True)
        except InvalidInput as error:
            raise bad_field("gate.class_recalls", error.message) from None
        if not 0 <= recall <= 1:
            at = f"gate.class_recalls[{label}]"
            raise bad_field(at, f"{at} is {recall:g}: it must be at least 0 and at most 1")
    if gate.not_worse_than:
        check_alias(gate.not_worse_than, "gate.not_worse_than")
    if gate.alias:
        check_alias(gate.alias, "gate.alias")
    if gate.alias == LATEST:
        raise bad_field(
            "gate.alias",
            f"{LATEST} moves to a version that passes anyway: leave gate.alias empty, or name "
            "another alias",
        )


def _check_can_be_measured(gate: Gate, method: Method) -> None:
    if not isinstance(method, DomainAdaptation) or method.evaluate_on_target:
        return
    for name in ("min_accuracy", "min_class_recall", "class_recalls", "not_worse_than"):
        if getattr(gate, name) not in (None, {}, ""):
            raise bad_field(
                f"gate.{name}",
                f"{name} is set, and without labels of the target nothing tells how good an "
                "adapted version is there: say evaluate_on_target and label some target images, "
                "or leave the condition out",
            )


def _check_labels(given: Mapping[str, str]) -> None:
    if len(given) > _MAX_LABELS:
        raise bad_field("labels", f"there are {len(given)} labels: at most {_MAX_LABELS} are kept")
    for key, value in given.items():
        if not 1 <= len(key) <= _MAX_KEY_CHARS:
            raise bad_field(
                "labels", f"the label {_shown(key)} has no 1 to {_MAX_KEY_CHARS} characters"
            )
        if len(value) > _MAX_VALUE_CHARS:
            raise bad_field(
                f"labels[{key}]",
                f"the value of {key!r} has more than {_MAX_VALUE_CHARS} characters",
            )


def _check_bounds(given: msgspec.Struct, at: str = "") -> None:
    """Raises InvalidInput for the first number outside of the bounds that its field declares."""
    for name, unit, bounds in _bounded(type(given)):
        value = getattr(given, name)
        if value is None or (math.isfinite(value) and _hold(bounds, value)):
            continue
        # A duration in the message; its unit is in the name here alone.
        field = at + name.removesuffix(f"_{unit}")
        shown = f" {unit}" if unit else ""
        raise bad_field(
            field, f"{field} is {value:g}{shown}: it must be {_in_words(bounds)}{shown}"
        )


def _hold(bounds: _Number, value: float) -> bool:
    return (
        (bounds.gt is None or value > bounds.gt)
        and (bounds.ge is None or value >= bounds.ge)
        and (bounds.lt is None or value < bounds.lt)
        and (bounds.le is None or value <= bounds.le)
    )


def _in_words(bounds: _Number) -> str:
    words = {"above": bounds.gt, "at least": bounds.ge, "below": bounds.lt, "at most": bounds.le}
    return " and ".join(f"{word} {n:g}" for word, n in words.items() if n is not None)


@cache
def _bounded(kind: type[msgspec.Struct]) -> list[tuple[str, str, _Number]]:
    """Lists the numbers of a struct that have bounds, with the units that their names end in."""
    found = []
    for field in msgspec.structs.fields(kind):
        described = msgspec.inspect.type_info(field.type)
        kinds = getattr(described, "types", (described,))
        for number in kinds:
            if isinstance(number, _Number) and _in_words(number):
                unit = next((u for u in ("ms", "s") if field.name.endswith(f"_{u}")), "")
                found.append((field.name, unit, number))
    return found


def _shown(value: str) -> str:
    return repr(value if len(value) <= 120 else value[:117] + "...")
