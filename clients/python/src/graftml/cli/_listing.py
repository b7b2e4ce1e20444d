"""What lists have in common: filters, how many are shown, and the table."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

from graftml.cli import _names
from graftml.cli._output import Output

T = TypeVar("T")

_SHOWN = 50
"""Of a list, to people who have not said how many."""

NOT_GIVEN = argparse.SUPPRESS
"""The default of a list's options: one that stands before `list` must not be lost after it."""


def add(
    commands: Any, name: str, text: str, listed: str, run: Any, *filters: Callable[[Any], None]
) -> Any:
    """Adds a command that lists, with `list` below it; returns where others are added."""
    group = commands.group(name, text, run)
    for parser in (group.parser, group.add("list", listed, run)):
        for add_filter in filters:
            add_filter(parser)
        add_limits(parser)
    return group


def add_limits(parser: Any) -> None:
    """Adds the options that say how many are shown."""
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument(
        "--limit",
        type=_count,
        default=NOT_GIVEN,
        metavar="N",
        help=f"show at most N; default: {_SHOWN}, with --json all",
    )
    limits.add_argument("--all", action="store_true", default=NOT_GIVEN, help="show all")


def add_labels(parser: Any) -> None:
    """Adds the filter by labels."""
    parser.add_argument(
        "--label",
        action="append",
        type=_names.label,
        default=NOT_GIVEN,
        metavar="KEY=VALUE",
        help="only those with this label (finetune --label); repeatable, for all of several",
    )


def add_name(parser: Any) -> None:
    """Adds the filter by the beginning of the name."""
    parser.add_argument(
        "--name", default=NOT_GIVEN, metavar="PREFIX", help="only names that begin with PREFIX"
    )


def given(arguments: argparse.Namespace, option: str, default: T) -> T:
    """Returns what was given for a list's option, or the default."""
    value: T = getattr(arguments, option, default)
    return value


def show(
    values: Iterable[Any],
    columns: Sequence[str],
    row: Callable[[Any], list[object]],
    arguments: argparse.Namespace,
    output: Output,
    *,
    kinds: str,
    is_prose: bool = False,
) -> int:
    """Shows as many as are wanted, and says when there are more; returns the exit code."""
    unbounded = output.is_json or given(arguments, "all", False)
    limit = given(arguments, "limit", None if unbounded else _SHOWN)
    remaining = iter(values)
    output.items(islice(remaining, limit), columns, row, kinds=kinds, is_prose=is_prose)
    if limit is not None and not output.is_json and next(remaining, None) is not None:
        output.note(f"there are more {kinds} than these {limit}: see --limit and --all")
    return 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)
