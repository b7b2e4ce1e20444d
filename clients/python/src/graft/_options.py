"""What `fine_tune` can be told: how to transfer, what to reach, where to go on from.

A part of `graft.types`, which callers take these from. Names nothing that the
service answers with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from graft._uploads import Target

Device = Literal["auto", "cpu", "cuda"]
Technique = Literal["auto", "coral", "mcc", "pseudo_labels", "cdan"]
Baseline = Literal["linear_probe", "full_fine_tune", "from_scratch", "nearest_class_mean"]


@dataclass(frozen=True)
class ServerPath:
    """Images that lie on the server's disk: a folder or an archive there."""

    path: str


@dataclass(frozen=True)
class PretrainedBackbone:
    """A backbone, with the weights to start from; "" for its pretrained ones."""

    backbone: str
    weights: str = ""


@dataclass(frozen=True)
class Auto:
    """Frozen features first; the network is trained only where it is shown to win."""


@dataclass(frozen=True, kw_only=True)
class FeatureBased:
    """Frozen backbone, new head. `l2` above 0; None means cross-validated."""

    l2: float | None = None
    augmented_views: int | None = None
    """Random views of each training image beside it, 0 to 16."""


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
    """The first stage that is trained; empty means the last stages, and all for classic."""
    freeze_batch_norm: bool | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DomainAdaptation:
    """Learn from the data's labels for images of another domain, the target.

    The version is for the target alone. Its own labels, where it has any, are never
    learned from.
    """

    target: "Target"
    """A folder or an archive with images at any depth, images, a `Dataset` or its id, or a
    `ServerPath`."""
    technique: Technique = "auto"
    """coral, mcc and pseudo_labels work on frozen features; cdan, experimental, trains the network
    on; "auto" is the best on frozen features."""
    always_adapt: bool = False
    """Also where there is a doubt that adapting helps."""
    evaluate_on_target: bool = False
    """The target has labels, as the data has, and the version is measured with them; a gate on
    accuracy needs it."""
    epochs: int | None = None
    """This and the next two are of the technique that trains the network on."""
    batch_size: int | None = None
    learning_rate: float | None = None


Method = Auto | FeatureBased | ModelBased | DomainAdaptation


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How the names of files tell which images belong together; give one of the two."""

    folder_level: int | None = None
    """The folder below the class's that names the group, from 1."""
    name_pattern: str = ""
    """Of file names, with `{group}` once and `*` for anything, such as "{group}_*.jpg"."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How images that are learned from are varied. None means the recipe's choice."""

    mirror: bool | None = None
    """False where the side tells the class: letters, arrows, hands."""
    min_scale: float | None = None
    """Least part of an image's area that a random crop has, 0.05 to 1."""
    rotation_degrees: float | None = None
    """Most that a view is turned to either side, 0 to 180."""
    colour: float | None = None
    """Most that brightness, contrast and saturation change by, as a part of them, 0 to 1."""
    trivial_augment: bool | None = None
    """One random operation on each view: TrivialAugment, the wide space."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a version must reach; one that does not is kept as a candidate."""

    min_accuracy: float | None = None
    """0 to 1, as measured on images that nothing was learned from."""
    min_class_recall: float | None = None
    """0 to 1, of every class that `class_recalls` does not name."""
    class_recalls: dict[str, float] = field(default_factory=dict)
    """The least recall by class."""
    not_worse_than: str = ""
    """An alias, `latest` among them: it must be shown, on the same images, that the version loses
    no more than `max_regression` of accuracy to the one behind it. It must be there where the
    model has versions, unless it is `latest` or `alias`."""
    max_regression: float | None = None
    """0 to 0.5, with `not_worse_than` alone; None means 0.03."""
    when_uncertain: Literal["hold", "promote"] = "hold"
    """What becomes of a version where a check is undecided."""
    max_parity_difference: float | None = None
    """Of a probability, between PyTorch and what serves; None means the service's bound."""
    max_latency_ms: float | None = None
    """Of one image on an idle engine, decoding included."""
    alias: str = ""
    """Moves to the version when it passes, beside `latest`."""


@dataclass(frozen=True, kw_only=True)
class BaseVersion:
    """The version that a job goes on from: by number, by alias, or `latest`."""

    version: int | None = None
    alias: str | None = None
    model: str = ""
    """Empty means the model that is fine-tuned."""


class FineTuneOptions(TypedDict, total=False):
    """What `fine_tune` takes beside the data and the name; all of it may be left out.

    The hyperparameters of the method (the fields of `FeatureBased`, `ModelBased`
    or `DomainAdaptation`) may be given here, where `method` is its name.
    """

    backbone: str
    """resnet18, resnet34, resnet50, resnet101, resnet152, efficientnet_lite0, or "auto" for the
    best for the data; the server's default where left out."""
    weights: str
    """Empty for the backbone's pretrained ones, a torchvision name, or "random"."""
    method: Literal["auto", "feature_based", "model_based", "domain_adaptation"] | Method
    """"auto" where left out."""
    background: str
    """The colour that transparency is laid on, "#rrggbb"; white where left out, with a base
    the base's."""
    validation_fraction: float | None
    """Held out where a network is trained on data without validation images, 0.05 to 0.5."""
    grouping: Grouping | int | str | None
    """Which images belong together, by their names: a `Grouping`, a folder level or a pattern."""
    augmentation: Augmentation | None
    """How images that are learned from are varied; with a base the base's where left out."""
    seed: int | None
    time_budget_s: float | None
    """How long training may take, at least 1 s."""
    device: Device
    labels: dict[str, str]
    """Your own marks, kept with the job and the version."""
    request_id: str
    """Makes a repeat harmless; a fresh UUID where left out."""
    baselines: Sequence[Baseline]
    """What the report compares the version with; each that trains costs its own time."""
    gate: Gate | None
    """What the version must reach to be published; nothing where left out."""
    case_sensitive_labels: bool
    """Class names that differ in upper and lower case alone are two classes."""
    base: BaseVersion | int | str | None
    """Learn from this version's images too: a `BaseVersion`, or a version or an alias of the
    same model."""

    l2: float | None
    augmented_views: int | None
    recipe: Literal["auto", "classic"]
    epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    momentum: float | None
    weight_decay: float | None
    label_smoothing: float | None
    train_from_stage: str
    freeze_batch_norm: bool | None
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    target: "Target"
    technique: Technique
    always_adapt: bool
    evaluate_on_target: bool
