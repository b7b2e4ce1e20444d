"""From a caller's arguments to the service's messages. Pure.

What only the service can judge is left to it; refused here is what cannot be
put into a message at all, or would be misread.
"""

import uuid
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from graft import types
from graft.errors import invalid
from graft.v1 import fine_tuning_pb2 as pb

W = TypeVar("W")

_DEVICES = {"auto": pb.DEVICE_UNSPECIFIED, "cpu": pb.DEVICE_CPU, "cuda": pb.DEVICE_CUDA}
_RECIPES = {"auto": pb.RECIPE_AUTO, "classic": pb.RECIPE_CLASSIC}
_PRECISIONS = {
    "auto": pb.PRECISION_UNSPECIFIED,
    "fp32": pb.PRECISION_FP32,
    "bf16": pb.PRECISION_BF16,
    "fp16": pb.PRECISION_FP16,
}
_METHODS: dict[str, type[types.FeatureBased] | type[types.ModelBased]] = {
    "feature_based": types.FeatureBased,
    "model_based": types.ModelBased,
}
_GENERAL = {
    "backbone",
    "weights",
    "method",
    "validation_fraction",
    "seed",
    "time_budget_s",
    "device",
    "labels",
    "request_id",
}


def fine_tune(
    data: str | types.ServerPath, name: str, options: types.FineTuneOptions
) -> pb.FineTuneRequest:
    """`data` is the id of a dataset or a path on the server."""
    known = types.FineTuneOptions.__optional_keys__
    for key in options:
        if key not in known:
            raise invalid(f"fine_tune takes no {key}: it takes {', '.join(sorted(known))}", key)
    budget_s = options.get("time_budget_s")
    request = pb.FineTuneRequest(
        model=name,
        backbone=options.get("backbone", "auto"),
        weights=options.get("weights", ""),
        validation_fraction=options.get("validation_fraction"),
        seed=options.get("seed"),
        time_budget=None if budget_s is None else _duration(budget_s),
        device=_choice("device", options.get("device", "auto"), _DEVICES),
        labels=options.get("labels", {}),
        request_id=options.get("request_id") or str(uuid.uuid4()),
    )
    if isinstance(data, types.ServerPath):
        request.server_path.path = str(data.path)
    else:
        request.dataset_id = data
    match method(options):
        case types.FeatureBased() as feature_based:
            request.feature_based.CopyFrom(pb.FeatureBased(l2=feature_based.l2))
        case types.ModelBased() as model_based:
            request.model_based.CopyFrom(_model_based(model_based))
    return request


def method(options: types.FineTuneOptions) -> types.FeatureBased | types.ModelBased:
    """The method with the hyperparameters that stand beside its name."""
    beside: dict[str, Any] = {
        key: value
        for key, value in options.items()
        if key not in _GENERAL and value not in (None, "")
    }
    given = options.get("method", "feature_based")
    if not isinstance(given, str):
        if beside:
            raise invalid(
                f"{', '.join(beside)} stand beside a {type(given).__name__}: give them to it",
                "method",
            )
        return given
    kind = _choice("method", given, _METHODS)
    strange = [key for key in beside if key not in kind.__dataclass_fields__]
    if strange:
        raise invalid(
            f"{', '.join(strange)} is no hyperparameter of {given}: it has "
            f"{', '.join(kind.__dataclass_fields__)}",
            strange[0],
        )
    return kind(**beside)


def _model_based(method: types.ModelBased) -> pb.ModelBased:
    return pb.ModelBased(
        recipe=_choice("recipe", method.recipe, _RECIPES),
        epochs=method.epochs,
        batch_size=method.batch_size,
        learning_rate=method.learning_rate,
        momentum=method.momentum,
        weight_decay=method.weight_decay,
        label_smoothing=method.label_smoothing,
        train_from_stage=method.train_from_stage,
        freeze_batch_norm=method.freeze_batch_norm,
        early_stopping_patience=method.early_stopping_patience,
        precision=_choice("precision", method.precision, _PRECISIONS),
    )


def states(given: Any) -> list[pb.JobState]:
    """Job states by name, in any case."""
    numbers: dict[str, Any] = {
        str(state): pb.JobState.Value(f"JOB_STATE_{state}")
        for state in types.JobState
        if state is not types.JobState.UNKNOWN
    }
    names = [given] if isinstance(given, str) else given
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


def _choice(field: str, given: str, choices: dict[str, W]) -> W:
    if given not in choices:
        raise invalid(f"{field} is {given!r}: it must be one of {', '.join(choices)}", field)
    return choices[given]


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
