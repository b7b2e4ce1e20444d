"""What all subcommands share: exit codes, and how each is added to the one command."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

Commands = Any
"""Where a subcommand is added: what argparse's `add_subparsers` returns, whose type is private."""
Execute = Callable[[argparse.Namespace], int]


class Failed(Exception):  # noqa: N818 - named for what happened
    """Ends a command with a line that says why, and an exit code."""

    def __init__(self, why: object, code: int = EXIT_FAILED) -> None:
        super().__init__(str(why))
        self.code = code


def add(
    commands: Commands,
    name: str,
    text: str,
    execute: Execute,
    *,
    exit_codes: str,
    more: str = "",
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Adds a subcommand; `main` calls `execute` with what was given, and exits with its result.

    Flags may not be abbreviated: an abbreviation would mean another flag, or none, as soon
    as one is added.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        usage=usage,
        description=f"{text[0].upper()}{text[1:]}. {more}".strip(),
        epilog=f"Exit codes: {exit_codes}.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(execute=execute, parser=parser)
    return parser


def refuse(parser: argparse.ArgumentParser, strange: Sequence[str]) -> NoReturn:
    """Ends the process for arguments that the parser does not take, and says what may be meant."""
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(strange[0].partition("=")[0], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    parser.error(f"unrecognized arguments: {' '.join(strange)}{hint}")


def formatter(prog: str) -> argparse.HelpFormatter:
    """Lays out help in lines that have room for flags and what they mean."""
    return argparse.HelpFormatter(prog, max_help_position=30, width=100)


def reason(error: Exception) -> str:
    """Returns what to say of an error: of one of the system, which file and why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
