"""The options of a decision, the same for `finetune` and `predict`."""

import argparse
from typing import Any

from graftml.types import Decision, Thresholds


def add(parser: Any) -> None:
    """The options, of which one kind may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--decision",
        choices=["argmax", "balanced"],
        help="what is answered: the most probable class, or by the classes' shares in the "
        "training, so that every class counts the same",
    )
    group.add_argument(
        "--threshold",
        dest="thresholds",
        action="append",
        type=_threshold,
        default=[],
        metavar="[CLASS=]P",
        help="answer with the most probable class that reaches its own, or with none: the least "
        "probability of a class, or of all others; repeatable",
    )


def read(arguments: argparse.Namespace) -> Decision | None:
    """What was asked for; None for nothing."""
    if not arguments.thresholds:
        decision: Decision | None = arguments.decision
        return decision
    named = dict(arguments.thresholds)
    others = named.pop("", None)
    return Thresholds(named, others)


def _threshold(text: str) -> tuple[str, float]:
    label, _, least = text.rpartition("=")
    try:
        return label, float(least)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither P nor CLASS=P, such as 0.5 or ants=0.8"
        ) from None
