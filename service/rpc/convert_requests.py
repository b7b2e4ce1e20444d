"""Between what FineTune is asked and what a job keeps of it; decides nothing."""

from typing import Any, Literal

import msgspec
from graft.v1 import fine_tuning_pb2 as pb

from service.contract import (
    Augmentation,
    Auto,
    Baseline,
    DomainAdaptation,
    FeatureBased,
    Gate,
    Grouping,
    Method,
    ModelBased,
    Technique,
)
from service.domain import LATEST, plain_name
from service.errors import InvalidInput, Reason
from service.ingest.labels import canonical
from service.jobs.request import JobRequest
from service.rpc import convert_decisions
from service.rpc.convert import duration

_DEVICES: dict[int, Literal["auto", "cpu", "cuda"]] = {
    pb.DEVICE_UNSPECIFIED: "auto",
    pb.DEVICE_CPU: "cpu",
    pb.DEVICE_CUDA: "cuda",
}
_FRAMINGS: dict[int, Literal["auto", "crop", "whole", "compare"]] = {
    pb.FRAMING_UNSPECIFIED: "auto",
    pb.FRAMING_CROP: "crop",
    pb.FRAMING_WHOLE: "whole",
    pb.FRAMING_COMPARE: "compare",
}
_RECIPES: dict[int, Literal["auto", "classic"]] = {
    pb.RECIPE_UNSPECIFIED: "auto",
    pb.RECIPE_AUTO: "auto",
    pb.RECIPE_CLASSIC: "classic",
}
_PRECISIONS: dict[int, Literal["auto", "fp32", "bf16", "fp16"]] = {
    pb.PRECISION_UNSPECIFIED: "auto",
    pb.PRECISION_FP32: "fp32",
    pb.PRECISION_BF16: "bf16",
    pb.PRECISION_FP16: "fp16",
}
_TECHNIQUES: dict[int, Technique] = {
    pb.ADAPTATION_TECHNIQUE_UNSPECIFIED: "auto",
    pb.ADAPTATION_TECHNIQUE_AUTO: "auto",
    pb.ADAPTATION_TECHNIQUE_CORAL: "coral",
    pb.ADAPTATION_TECHNIQUE_MCC: "mcc",
    pb.ADAPTATION_TECHNIQUE_PSEUDO_LABELS: "pseudo_labels",
    pb.ADAPTATION_TECHNIQUE_CDAN: "cdan",
}
_WHEN_UNCERTAIN: dict[int, Literal["hold", "promote"]] = {
    pb.WHEN_UNCERTAIN_UNSPECIFIED: "hold",
    pb.WHEN_UNCERTAIN_HOLD: "hold",
    pb.WHEN_UNCERTAIN_PROMOTE: "promote",
}
_BASELINES: dict[int, Baseline] = {
    pb.BASELINE_LINEAR_PROBE: "linear_probe",
    pb.BASELINE_FULL_FINE_TUNE: "full_fine_tune",
    pb.BASELINE_FROM_SCRATCH: "from_scratch",
    pb.BASELINE_NEAREST_CLASS_MEAN: "nearest_class_mean",
}

_MAX_REGRESSION = Gate().max_regression

# Fields that mean "the recipe's choice" when unset, the same on both sides.
_CHOSEN = (
    "epochs",
    "batch_size",
    "learning_rate",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "freeze_batch_norm",
)


def request(
    message: pb.FineTuneRequest,
    model: str,
    *,
    server_path: str = "",
    dataset_id: str = "",
    target_path: str = "",
    target_dataset_id: str = "",
) -> JobRequest:
    """What was asked, but for the base; `model` is its key.

    The images are where the caller put them.
    """
    return JobRequest(
        model=model,
        server_path=server_path,
        dataset_id=dataset_id,
        target_path=target_path,
        target_dataset_id=target_dataset_id,
        backbone=message.backbone,
        weights=message.weights,
        method=_method(message),
        validation_fraction=_optional(message, "validation_fraction"),
        outlier_false_alarm_rate=_optional(message, "outlier_false_alarm_rate"),
        grouping=_grouping(message.grouping) if message.HasField("grouping") else None,
        seed=_optional(message, "seed"),
        time_budget_s=(
            message.time_budget.ToMicroseconds() / 1e6 if message.HasField("time_budget") else None
        ),
        device=_named(_DEVICES, message.device, "device", "Device"),
        labels=dict(message.labels),
        background=message.background,
        framing=_named(_FRAMINGS, message.framing, "framing", "Framing"),
        augmentation=(
            _augmentation(message.augmentation) if message.HasField("augmentation") else None
        ),
        baselines=[
            _named(_BASELINES, number, "baselines", "Baseline") for number in message.baselines
        ],
        gate=_gate(message.gate) if message.HasField("gate") else None,
        decision=(
            convert_decisions.decision(message.decision) if message.HasField("decision") else None
        ),
        case_sensitive_labels=message.case_sensitive_labels,
    )


def asked(given: JobRequest) -> pb.FineTuneRequest:
    """A request as its job tells it; its base is the version that was meant then."""
    message = pb.FineTuneRequest(
        model=plain_name(given.model),
        case_sensitive_labels=given.case_sensitive_labels,
        backbone=given.backbone,
        weights=given.weights,
        validation_fraction=given.validation_fraction,
        outlier_false_alarm_rate=given.outlier_false_alarm_rate,
        seed=given.seed,
        time_budget=None if given.time_budget_s is None else duration(given.time_budget_s),
        device=_number(_DEVICES, given.device),
        labels=given.labels,
        background=given.background,
        framing=_number(_FRAMINGS, given.framing),
        augmentation=(
            None
            if given.augmentation is None
            else pb.Augmentation(**msgspec.structs.asdict(given.augmentation))
        ),
        baselines=[_number(_BASELINES, name) for name in given.baselines],
    )
    if given.server_path:
        message.server_path.path = given.server_path
    else:
        message.dataset_id = given.dataset_id
    match given.method:
        case Auto():
            message.auto.SetInParent()
        case FeatureBased() as method:
            message.feature_based.CopyFrom(
                pb.FeatureBased(l2=method.l2, augmented_views=method.augmented_views or None)
            )
        case ModelBased() as method:
            message.model_based.CopyFrom(
                pb.ModelBased(
                    recipe=_number(_RECIPES, method.recipe),
                    train_from_stage=method.train_from_stage,
                    precision=_number(_PRECISIONS, method.precision),
                    **{name: getattr(method, name) for name in _CHOSEN},
                )
            )
        case DomainAdaptation() as method:
            adaptation = pb.DomainAdaptation(
                technique=_number(_TECHNIQUES, method.technique),
                always_adapt=method.always_adapt,
                evaluate_on_target=method.evaluate_on_target,
                epochs=method.epochs,
                batch_size=method.batch_size,
                learning_rate=method.learning_rate,
            )
            if given.target_path:
                adaptation.target_path.path = given.target_path
            else:
                adaptation.target_dataset_id = given.target_dataset_id
            message.domain_adaptation.CopyFrom(adaptation)
    if given.grouping is not None:
        message.grouping.CopyFrom(_asked_grouping(given.grouping))
    if given.gate is not None:
        message.gate.CopyFrom(_asked_gate(given.gate))
    if given.decision is not None:
        message.decision.CopyFrom(convert_decisions.asked(given.decision))
    if given.base is not None:
        message.base.model = plain_name(given.base.model)
        message.base.version = given.base.version
    return message


def _method(message: pb.FineTuneRequest) -> Method:
    which = message.WhichOneof("method")
    if which == "domain_adaptation":
        return _domain_adaptation(message.domain_adaptation)
    if which == "feature_based":
        return FeatureBased(
            l2=_optional(message.feature_based, "l2"),
            augmented_views=message.feature_based.augmented_views,
        )
    if which != "model_based":
        return Auto()
    given = message.model_based
    return ModelBased(
        recipe=_named(_RECIPES, given.recipe, "model_based.recipe", "Recipe"),
        train_from_stage=given.train_from_stage,
        precision=_named(_PRECISIONS, given.precision, "model_based.precision", "Precision"),
        **{name: _optional(given, name) for name in _CHOSEN},
    )


def _domain_adaptation(given: pb.DomainAdaptation) -> DomainAdaptation:
    return DomainAdaptation(
        technique=_named(
            _TECHNIQUES, given.technique, "domain_adaptation.technique", "AdaptationTechnique"
        ),
        always_adapt=given.always_adapt,
        evaluate_on_target=given.evaluate_on_target,
        epochs=_optional(given, "epochs"),
        batch_size=_optional(given, "batch_size"),
        learning_rate=_optional(given, "learning_rate"),
    )


def _grouping(given: pb.Grouping) -> Grouping:
    return Grouping(folder_level=given.folder_level, name_pattern=given.name_pattern)


def _asked_grouping(grouping: Grouping) -> pb.Grouping:
    if grouping.name_pattern:
        return pb.Grouping(name_pattern=grouping.name_pattern)
    return pb.Grouping(folder_level=grouping.folder_level)


def _augmentation(given: pb.Augmentation) -> Augmentation:
    names = Augmentation.__struct_fields__
    return Augmentation(**{name: _optional(given, name) for name in names})


def _gate(given: pb.Gate) -> Gate:
    if given.HasField("max_regression") and not given.not_worse_than:
        raise InvalidInput(
            Reason.INVALID_FIELD,
            "max_regression is set, and no version to compare with: set not_worse_than to an "
            f"alias, such as {LATEST}, or leave it out",
            field="gate.max_regression",
        )
    return Gate(
        min_accuracy=_optional(given, "min_accuracy"),
        min_class_recall=_optional(given, "min_class_recall"),
        class_recalls={canonical(label): least for label, least in given.class_recalls.items()},
        not_worse_than=given.not_worse_than,
        max_regression=(
            given.max_regression if given.HasField("max_regression") else _MAX_REGRESSION
        ),
        when_uncertain=_named(
            _WHEN_UNCERTAIN, given.when_uncertain, "gate.when_uncertain", "WhenUncertain"
        ),
        max_parity_difference=_optional(given, "max_parity_difference"),
        max_latency_ms=(
            given.max_latency.ToMicroseconds() / 1e3 if given.HasField("max_latency") else None
        ),
        alias=given.alias,
    )


def _asked_gate(gate: Gate) -> pb.Gate:
    return pb.Gate(
        min_accuracy=gate.min_accuracy,
        min_class_recall=gate.min_class_recall,
        class_recalls=gate.class_recalls,
        not_worse_than=gate.not_worse_than,
        max_regression=gate.max_regression if gate.not_worse_than else None,
        when_uncertain=_number(_WHEN_UNCERTAIN, gate.when_uncertain),
        max_parity_difference=gate.max_parity_difference,
        max_latency=None if gate.max_latency_ms is None else duration(gate.max_latency_ms / 1e3),
        alias=gate.alias,
    )


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _named(names: dict[int, Any], number: int, field: str, kind: str) -> Any:
    if number not in names:
        raise InvalidInput(
            Reason.INVALID_FIELD, f"{field} {number} is none: use a value of {kind}", field=field
        )
    return names[number]


def _number(names: dict[int, Any], name: str) -> Any:
    # The last number of a name is its own; UNSPECIFIED comes first.
    return next(number for number, known in reversed(names.items()) if known == name)
