"""Conversion of a caller's arguments to the service's messages. Pure.

What only the service can judge is left to it; refused here is what cannot be
put into a message at all, or would be misread.
"""

import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from graftml_stubs.v1 import decision_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from graftml import types
from graftml._encoding import encoding
from graftml.errors import InvalidArgument, invalid

W = TypeVar("W")
M = TypeVar("M", bound=Message)

_DEVICES = {"auto": pb.DEVICE_UNSPECIFIED, "cpu": pb.DEVICE_CPU, "cuda": pb.DEVICE_CUDA}
_RECIPES = {"auto": pb.RECIPE_AUTO, "classic": pb.RECIPE_CLASSIC}
_PRECISIONS = {
    "auto": pb.PRECISION_UNSPECIFIED,
    "fp32": pb.PRECISION_FP32,
    "bf16": pb.PRECISION_BF16,
    "fp16": pb.PRECISION_FP16,
}
_METHODS: dict[str, type[types.Method]] = {
    "auto": types.Auto,
    "feature_based": types.FeatureBased,
    "model_based": types.ModelBased,
    "domain_adaptation": types.DomainAdaptation,
}
TECHNIQUES: dict[types.Technique, pb.AdaptationTechnique] = {
    "auto": pb.ADAPTATION_TECHNIQUE_AUTO,
    "coral": pb.ADAPTATION_TECHNIQUE_CORAL,
    "mcc": pb.ADAPTATION_TECHNIQUE_MCC,
    "pseudo_labels": pb.ADAPTATION_TECHNIQUE_PSEUDO_LABELS,
    "cdan": pb.ADAPTATION_TECHNIQUE_CDAN,
}
_WHEN_UNCERTAIN = {"hold": pb.WHEN_UNCERTAIN_HOLD, "promote": pb.WHEN_UNCERTAIN_PROMOTE}
BASELINES: dict[types.Baseline, pb.Baseline] = {
    "linear_probe": pb.BASELINE_LINEAR_PROBE,
    "full_fine_tune": pb.BASELINE_FULL_FINE_TUNE,
    "from_scratch": pb.BASELINE_FROM_SCRATCH,
    "nearest_class_mean": pb.BASELINE_NEAREST_CLASS_MEAN,
}
FRAMINGS: dict[types.Framing, pb.Framing] = {
    "auto": pb.FRAMING_UNSPECIFIED,
    "crop": pb.FRAMING_CROP,
    "whole": pb.FRAMING_WHOLE,
    "compare": pb.FRAMING_COMPARE,
}
PRECISIONS: dict[types.ServingPrecision, pb.ServingPrecision] = {
    "auto": pb.SERVING_PRECISION_UNSPECIFIED,
    "fp32": pb.SERVING_PRECISION_FP32,
    "bf16": pb.SERVING_PRECISION_BF16,
    "fp16": pb.SERVING_PRECISION_FP16,
    "int8": pb.SERVING_PRECISION_INT8,
}
_CHOICES: dict[str, dict[Any, Any]] = {
    "recipe": _RECIPES,
    "precision": _PRECISIONS,
    "technique": TECHNIQUES,
    "when_uncertain": _WHEN_UNCERTAIN,
}
_HYPERPARAMETERS = {name for kind in _METHODS.values() for name in kind.__dataclass_fields__}


@encoding
def fine_tune(
    data: str | types.ServerPath,
    name: str,
    options: types.FineTuneOptions,
    target: str | types.ServerPath = "",
) -> pb.FineTuneRequest:
    """`data` and `target` are each the id of a dataset or a path on the server.

    `target` is where the images of a domain adaptation's target are by now. Both are ""
    while they are not there yet.
    """
    known = types.FineTuneOptions.__optional_keys__
    for key in options:
        if key not in known:
            raise invalid(f"fine_tune takes no {key}: it takes {', '.join(sorted(known))}", key)
    budget_s = options.get("time_budget_s")
    request = pb.FineTuneRequest(
        model=name,
        backbone=options.get("backbone", ""),
        weights=options.get("weights", ""),
        background=options.get("background", ""),
        augmentation=_augmentation(options.get("augmentation")),
        framing=_choice("framing", options.get("framing", "auto"), FRAMINGS),
        serving_precision=_choice(
            "serving_precision", options.get("serving_precision", "auto"), PRECISIONS
        ),
        validation_fraction=options.get("validation_fraction"),
        outlier_false_alarm_rate=options.get("outlier_false_alarm_rate"),
        seed=options.get("seed"),
        time_budget=None if budget_s is None else _duration("time_budget_s", budget_s),
        device=_choice("device", options.get("device", "auto"), _DEVICES),
        labels=options.get("labels", {}),
        request_id=options.get("request_id") or str(uuid.uuid4()),
        baselines=_baselines(options.get("baselines", ())),
        gate=_gate(options.get("gate")),
        decision=decision(options.get("decision")),
        base=_base(options.get("base")),
        grouping=_grouping(options.get("grouping")),
        case_sensitive_labels=options.get("case_sensitive_labels", False),
    )
    _set_data(request, data)
    match method(options):
        case types.Auto():
            request.auto.SetInParent()
        case types.FeatureBased() as feature_based:
            request.feature_based.CopyFrom(_message(pb.FeatureBased, feature_based))
        case types.ModelBased() as model_based:
            request.model_based.CopyFrom(_message(pb.ModelBased, model_based))
        case types.DomainAdaptation() as adaptation:
            request.domain_adaptation.CopyFrom(_domain_adaptation(adaptation, target))
    return request


def identified(options: types.FineTuneOptions) -> types.FineTuneOptions:
    """Returns the options with a request id, so that a repeat of the same call is known by it."""
    return {**options, "request_id": options.get("request_id") or str(uuid.uuid4())}


@encoding
def rank_backbones(
    data: str | types.ServerPath,
    backbones: Iterable[str | types.PretrainedBackbone],
    time_budget_s: float | None,
    seed: int | None,
    *,
    case_sensitive_labels: bool = False,
    request_id: str = "",
) -> pb.RankBackbonesRequest:
    """`data` is the id of a dataset or a path on the server."""
    request = pb.RankBackbonesRequest(
        backbones=[_pretrained(pretrained) for pretrained in listed(backbones)],
        time_budget=None if time_budget_s is None else _duration("time_budget_s", time_budget_s),
        seed=seed,
        case_sensitive_labels=case_sensitive_labels,
        request_id=request_id or str(uuid.uuid4()),
    )
    _set_data(request, data)
    return request


def listed(
    backbones: Iterable[str | types.PretrainedBackbone],
) -> list[str | types.PretrainedBackbone]:
    """Returns the backbones as a list, of a single name too; refuses what is neither."""
    if isinstance(backbones, str | types.PretrainedBackbone):
        return [backbones]
    if not isinstance(backbones, Iterable):
        raise invalid(f"backbones is {backbones!r}: it must be a list of names", "backbones")
    return list(backbones)


def _set_data(
    request: pb.FineTuneRequest | pb.RankBackbonesRequest, data: str | types.ServerPath
) -> None:
    if isinstance(data, types.ServerPath):
        request.server_path.path = str(data.path)
    elif data:
        request.dataset_id = data


def _pretrained(given: str | types.PretrainedBackbone) -> pb.PretrainedBackbone:
    if isinstance(given, str):
        backbone, _, weights = given.partition(":")
        given = types.PretrainedBackbone(backbone, weights)
    return pb.PretrainedBackbone(backbone=given.backbone, weights=given.weights)


def method(options: types.FineTuneOptions) -> types.Method:
    """The method with the hyperparameters that stand beside its name."""
    beside: dict[str, Any] = {
        key: value
        for key, value in options.items()
        if key in _HYPERPARAMETERS and not (value is None or (isinstance(value, str) and not value))
    }
    given = options.get("method", "auto")
    if not isinstance(given, str):
        if beside:
            raise invalid(
                f"{', '.join(beside)} stand beside a {type(given).__name__}: give them to it",
                "method",
            )
        if not isinstance(given, types.Method):
            raise invalid(
                f"method is a {type(given).__name__}: it must be one of {', '.join(_METHODS)}, or "
                "an Auto, FeatureBased, ModelBased or DomainAdaptation",
                "method",
            )
        return given
    kind = _choice("method", given, _METHODS)
    strange = [key for key in beside if key not in kind.__dataclass_fields__]
    if strange:
        raise _elsewhere(strange, given)
    if kind is types.DomainAdaptation and "target" not in beside:
        raise invalid(
            "domain_adaptation needs the target, images of the domain to adapt to", "target"
        )
    return kind(**beside)


def _elsewhere(strange: list[str], given: str) -> InvalidArgument:
    """Says which method has the hyperparameters that this one has not."""

    def owners(keys: list[str]) -> list[str]:
        return [
            name
            for name, kind in _METHODS.items()
            if all(key in kind.__dataclass_fields__ for key in keys)
        ]

    # Where no method has them all, the first one will do.
    named = strange if owners(strange) else strange[:1]
    having = owners(named)
    keys = ", ".join(named)
    what = "is a hyperparameter" if len(named) == 1 else "are hyperparameters"
    how = " or ".join(f"method={name!r}" for name in having)
    return invalid(
        f"{keys} {what} of {' and '.join(having)}, not of {given}: set {how}, or leave {keys} out",
        strange[0],
    )


def _message(kind: type[M], given: Any) -> M:
    """Puts a value into the message of its kind; fields have the same names in both."""
    known = kind.DESCRIPTOR.fields_by_name
    fields = {name: value for name, value in vars(given).items() if name in known}
    for name in fields.keys() & _CHOICES.keys():
        fields[name] = _choice(name, fields[name], _CHOICES[name])
    return kind(**fields)


def _domain_adaptation(
    method: types.DomainAdaptation, target: str | types.ServerPath
) -> pb.DomainAdaptation:
    adaptation = _message(pb.DomainAdaptation, method)
    if isinstance(target, types.ServerPath):
        adaptation.target_path.path = str(target.path)
    elif target:
        adaptation.target_dataset_id = target
    return adaptation


def _baselines(given: Any) -> list[pb.Baseline]:
    names = [given] if isinstance(given, str) else given
    return [_choice("baselines", name, BASELINES) for name in names]


def _gate(gate: types.Gate | None) -> pb.Gate | None:
    if gate is None:
        return None
    message = _message(pb.Gate, gate)
    if gate.max_latency_ms is not None:
        message.max_latency.CopyFrom(_duration("max_latency_ms", gate.max_latency_ms / 1000))
    return message


def decision(given: types.Decision | None) -> decision_pb2.Decision | None:
    """The decision of a request; None leaves it to the server."""
    if given is None:
        return None
    if isinstance(given, types.Thresholds):
        thresholds = decision_pb2.Thresholds(classes=given.classes, others=given.others)
        return decision_pb2.Decision(thresholds=thresholds)
    rules = {
        "argmax": decision_pb2.Decision(argmax=decision_pb2.Argmax()),
        "balanced": decision_pb2.Decision(balanced=decision_pb2.Balanced()),
    }
    if not isinstance(given, str) or given not in rules:
        raise invalid(
            f"decision is {given!r}: it must be argmax or balanced, or a Thresholds", "decision"
        )
    return rules[given]


def _grouping(given: types.Grouping | int | str | None) -> pb.Grouping | None:
    if given is None:
        return None
    if isinstance(given, int):
        given = types.Grouping(folder_level=given)
    elif isinstance(given, str):
        given = types.Grouping(name_pattern=given)
    if (given.folder_level is None) == (not given.name_pattern):
        raise invalid(
            'grouping needs either folder_level, from 1, or name_pattern, such as "{group}_*.jpg"',
            "grouping",
        )
    return pb.Grouping(folder_level=given.folder_level, name_pattern=given.name_pattern or None)


def _augmentation(given: types.Augmentation | None) -> pb.Augmentation | None:
    return None if given is None else _message(pb.Augmentation, given)


def _base(base: types.BaseVersion | int | str | None) -> pb.BaseVersion | None:
    if base is None:
        return None
    if isinstance(base, int):
        base = types.BaseVersion(version=base)
    elif isinstance(base, str):
        base = types.BaseVersion(alias=base)
    return pb.BaseVersion(model=base.model, **which(base.version, base.alias))


@encoding
def states(states: Iterable[str] | str) -> list[pb.JobState]:
    """Job states by name, in any case."""
    numbers: dict[str, Any] = {
        str(state): pb.JobState.Value(f"JOB_STATE_{state}")
        for state in types.JobState
        if state is not types.JobState.UNKNOWN
    }
    names = [states] if isinstance(states, str) else states
    return [_choice("states", str(name).upper(), numbers) for name in names]


def which(version: int | None, alias: str | None) -> dict[str, Any]:
    """The `which` of a request: a version, an alias, or neither for `latest`."""
    if version is not None and alias is not None:
        raise invalid(
            f"version {version} and alias {alias!r} were both given: give one, or neither for "
            "the newest version",
            "which",
        )
    if version is not None:
        return {"version": version}
    return {} if alias is None else {"alias": alias}


def version_of(model: str, version: int | None, alias: str | None) -> dict[str, Any]:
    """The `model` and the `which` of a request; refuses a name with a version in it."""
    if not isinstance(model, str):
        raise invalid(f"model is {model!r}: it must be text", "model")
    name, at, after = model.partition("@")
    if not at:
        name, _, after = model.partition(":")
    if name and after and (at or after.isdigit()):
        how = f"alias={after!r}" if at else f"version={after}"
        raise invalid(f"model is {model!r}: give model={name!r} and {how}", "model")
    return {"model": model, **which(version, alias)}


def _choice(field: str, given: Any, choices: dict[Any, W]) -> W:
    if given not in choices:
        raise invalid(f"{field} is {given!r}: it must be one of {', '.join(choices)}", field)
    return choices[given]


def _duration(field: str, seconds: float) -> Duration:
    duration = Duration()
    try:
        duration.FromTimedelta(timedelta(seconds=seconds))
    except (OverflowError, ValueError) as error:
        raise invalid(f"{field} cannot be sent: {error}", field) from error
    return duration
