"""Decisions, from messages and to them; knows no model's classes."""

from graftml_stubs.v1 import decision_pb2 as pb

from service.domain import Decision, check_threshold_count
from service.errors import InvalidInput, bad_field
from service.ingest.labels import canonical, check_given


def read(given: pb.Decision, field: str = "decision") -> Decision:
    """Reads a request's field; raises InvalidInput for a decision that names no rule."""
    match given.WhichOneof("rule"):
        case "argmax":
            return Decision()
        case "balanced":
            return Decision(rule="balanced")
        case "thresholds":
            return _thresholds(given.thresholds, field)
    raise bad_field(field, f"{field} names no rule: set argmax, balanced or thresholds")


def _thresholds(given: pb.Thresholds, field: str) -> Decision:
    at = f"{field}.thresholds"
    if not given.classes and not given.HasField("others"):
        raise bad_field(at, f"{at} names no threshold: set classes or others, or choose argmax")
    check_threshold_count(len(given.classes), field)
    for label in given.classes:
        try:
            check_given(label, is_labelled=True)
        except InvalidInput as error:
            raise bad_field(f"{at}.classes", error.message) from None
    found = Decision(
        rule="thresholds",
        thresholds={canonical(label): least for label, least in sorted(given.classes.items())},
        default_threshold=given.others,
    )
    found.check(field)
    return found


def message(given: Decision) -> pb.Decision:
    """Converts a decision to the message that would ask for it."""
    if given.rule == "balanced":
        return pb.Decision(balanced=pb.Balanced())
    if given.rule == "thresholds":
        # Of the thresholds that nobody named, 0 says the same as none.
        others = given.default_threshold or None
        return pb.Decision(thresholds=pb.Thresholds(classes=given.thresholds, others=others))
    return pb.Decision(argmax=pb.Argmax())
