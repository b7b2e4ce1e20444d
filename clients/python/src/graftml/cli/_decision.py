"""The options of a decision, the same for `finetune` and `predict`."""

import argparse
from typing import Any

from graftml.cli import _names
from graftml.types import Decision, Thresholds


def add(parser: Any) -> None:
    """The options, of which one kind may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--decision",
        choices=["argmax", "balanced"],
        help="how to choose the answer: the most probable class (argmax), or after division by "
        "the classes' shares in training, so that every class counts the same (balanced)",
    )
    group.add_argument(
        "--threshold",
        dest="thresholds",
        action="append",
        type=_threshold,
        default=[],
        metavar="[CLASS=]P",
        help="least probability to answer with CLASS, or with any other class; if no class "
        "reaches its own, the answer is none; repeatable",
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
        return label, _names.fraction(least)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither P nor CLASS=P, such as 0.5 or ants=0.8"
        ) from None
