"""Whether a fake version passes its gate: by the script's figures and its words."""

from graft.v1 import fine_tuning_pb2 as pb
from graft.v1 import model_pb2


def checks(gate: pb.Gate, out: pb.VersionPublished) -> list[model_pb2.GateCheck]:
    """The conditions that were asked for, then each failure that the script names.

    Only the accuracy is compared, with the script's; the other conditions are met.
    """
    found = []
    if gate.HasField("min_accuracy"):
        value, bound = out.validation_accuracy, gate.min_accuracy
        found.append(_check("accuracy", value, bound, passed=value >= bound))
    if gate.not_worse_than:
        found.append(_check("not_worse", 1.0, 0.05))
    if gate.HasField("max_parity_difference"):
        found.append(_check("parity", 1e-6, gate.max_parity_difference))
    if gate.HasField("max_latency"):
        found.append(_check("latency", 1.0, gate.max_latency.ToMicroseconds() / 1000))
    name = found[0].name if found else "accuracy"
    return found + [model_pb2.GateCheck(name=name, detail=text) for text in out.gate_failures]


def _check(name: str, value: float, bound: float, *, passed: bool = True) -> model_pb2.GateCheck:
    detail = f"{name}: {value:g} was measured, {bound:g} was asked for"
    return model_pb2.GateCheck(name=name, passed=passed, value=value, bound=bound, detail=detail)
