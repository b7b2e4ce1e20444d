"""What `fine_tune` can be told: how to transfer, what to reach, where to go on from.

A part of `graftml.types`, which callers take these from. Names nothing that the
service answers with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from graftml._data import Target

Device = Literal["auto", "cpu", "cuda"]
Framing = Literal["auto", "crop", "whole", "compare"]
ServingPrecision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Technique = Literal["auto", "coral", "mcc", "pseudo_labels", "cdan"]
Baseline = Literal["linear_probe", "full_fine_tune", "from_scratch", "nearest_class_mean"]


@dataclass(frozen=True)
class Thresholds:
    """The least probability of an answer; a class below its own is not answered."""

    classes: dict[str, float] = field(default_factory=dict)
    """By class, 0 to 1."""
    others: float | None = None
    """Of every other class; None means that they need none."""


Decision = Literal["argmax", "balanced"] | Thresholds
"""How probabilities become an answer: the most probable class; the one whose probability is the
largest multiple of its share in the training, so that every class counts the same; or the most
probable of those that reach their threshold, or none."""


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
    """Randomly cropped and flipped copies of each training image beside it, 0 to 16."""


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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DomainAdaptation:
    """Learn from the data's labels for images of another domain, the target.

    The version is for the target alone. Its own labels, where it has any, are never
    learned from.
    """

    target: Target
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
    """How images are varied while they are learned from; None means the method's own choice, with
    a base the base's."""

    mirror: bool | None = None
    """Every second image, left to right; False where left and right are different classes."""
    min_scale: float | None = None
    """The part of the image's area that a random crop has at least, 0.05 to 1."""
    rotation_degrees: float | None = None
    """At most, to either side, 0 to 180."""
    colour: float | None = None
    """The part that brightness, contrast and saturation are changed by at most, 0 to 1."""
    trivial_augment: bool | None = None
    """One of 14 operations in a random strength (Müller and Hutter 2021, TrivialAugment)."""


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
    """A name such as efficientnet_lite0 or resnet50, timm/NAME for any network of timm's, onnx/NAME
    for a registered one, or "auto" for the best for the data; the server's default where left
    out."""
    weights: str
    """Empty for the backbone's pretrained ones, a torchvision name, "random", or "file:NAME" for
    a file in the server's folder of weights."""
    method: Literal["auto", "feature_based", "model_based", "domain_adaptation"] | Method
    """"auto" where left out."""
    background: str
    """The colour that transparency is laid on, "#rrggbb"; white where left out, with a base
    the base's."""
    framing: Framing
    """What the backbone sees of an image: "crop" (its middle), "whole" (all of it, squeezed), or
    "compare" for the better of the two; "auto", where left out, compares where images are long."""
    serving_precision: ServingPrecision
    """What the version computes in, wherever it serves: "fp32", "bf16", "fp16" or "int8", whose
    price and gain the report says; the server's default where left out."""
    augmentation: Augmentation | None
    """How images are varied in training; refused where the method varies none."""
    validation_fraction: float | None
    """Held out where a network is trained on data without validation images, 0.05 to 0.5."""
    outlier_false_alarm_rate: float | None
    """The part of images of the training's kind that may be called out of distribution, 0.001 to
    0.5; 0.05 where left out. What is rarer than one of the images that set it cannot be told."""
    grouping: Grouping | int | str | None
    """Which images belong together, by their names: a `Grouping`, a folder level or a pattern."""
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
    decision: Decision | None
    """How the version answers, unless a call says otherwise; its figures and its gate go by it.
    "argmax" where left out, with a base the base's."""
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
    target: Target
    technique: Technique
    always_adapt: bool
    evaluate_on_target: bool
