"""Whether a fake version passes its gate: by the script's figures and its words."""

from collections.abc import Collection

from graftml_stubs.v1 import fine_tuning_pb2 as pb
from graftml_stubs.v1 import model_pb2

from graftml.errors import InvalidArgument, NotFound, Reason
from graftml.testing._refusals import refuse

_PASSED, _FAILED = model_pb2.GATE_VERDICT_PASSED, model_pb2.GATE_VERDICT_FAILED


def check(gate: pb.Gate, aliases: Collection[str] | None) -> None:
    """Refuses a gate that compares with nothing; `aliases` are the model's, None without one."""
    if gate.HasField("max_regression") and not gate.not_worse_than:
        raise refuse(
            InvalidArgument,
            Reason.INVALID_FIELD,
            "max_regression is set, and no version to compare with: set not_worse_than",
            "gate.max_regression",
        )
    made = ("", "latest", gate.alias)
    if aliases is not None and gate.not_worse_than not in (*made, *aliases):
        raise refuse(
            NotFound,
            Reason.ALIAS_NOT_FOUND,
            f"there is no alias {gate.not_worse_than!r}; there is {', '.join(sorted(aliases))}",
            "gate.not_worse_than",
        )


def checks(gate: pb.Gate, out: pb.VersionPublished) -> list[model_pb2.GateCheck]:
    """The conditions that were asked for, then each failure that the script names.

    Only the accuracy is compared, with the script's, and undecided where that has none; the
    other conditions are met.
    """
    found = []
    if gate.HasField("min_accuracy"):
        if out.HasField("accuracy"):
            verdict = _PASSED if out.accuracy >= gate.min_accuracy else _FAILED
            found.append(_check("accuracy", out.accuracy, gate.min_accuracy, verdict))
        else:
            may_pass = gate.when_uncertain == pb.WHEN_UNCERTAIN_PROMOTE
            undecided = model_pb2.GateCheck(
                name="accuracy",
                verdict=model_pb2.GATE_VERDICT_UNDECIDED,
                passed=may_pass,
                bound=gate.min_accuracy,
                detail="accuracy: it cannot be told, no image was measured on",
            )
            found.append(undecided)
    if gate.HasField("min_class_recall") or gate.class_recalls:
        found.append(_check("class_recall", 1.0, gate.min_class_recall))
    if gate.not_worse_than:
        most = gate.max_regression if gate.HasField("max_regression") else 0.03
        found.append(_check("not_worse", 0.0, -most))
    if gate.HasField("max_parity_difference"):
        found.append(_check("parity", 1e-6, gate.max_parity_difference))
    if gate.HasField("max_latency"):
        found.append(_check("latency", 1.0, gate.max_latency.ToMicroseconds() / 1000))
    name = found[0].name if found else "accuracy"
    return found + [
        model_pb2.GateCheck(name=name, verdict=_FAILED, detail=text) for text in out.gate_failures
    ]


def _check(
    name: str, value: float, bound: float, verdict: model_pb2.GateVerdict = _PASSED
) -> model_pb2.GateCheck:
    return model_pb2.GateCheck(
        name=name,
        verdict=verdict,
        passed=verdict == _PASSED,
        value=value,
        bound=bound,
        detail=f"{name}: {value:g} was measured, {bound:g} was asked for",
    )
