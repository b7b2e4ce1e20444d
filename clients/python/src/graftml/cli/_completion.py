"""`graft completion`: what a shell needs to complete the command, written by shtab."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from graftml import Client
from graftml.cli._output import Output, Usage

_FILES = {"DATA", "FILE", "PATH"}
"""Placeholders of what is a path here."""


def add(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add(
        "completion",
        "Write a completion script for a shell",
        partial(run, commands.parser),
        epilog="For bash: graft completion bash > ~/.local/share/bash-completion/completions/graft",
    )
    parser.add_argument("shell", metavar="SHELL", choices=["bash", "zsh", "tcsh"])


def run(
    parser: argparse.ArgumentParser,
    _client: Client,
    arguments: argparse.Namespace,
    _output: Output,
) -> int:
    """Writes the script for the command that a parser describes."""
    try:
        import shtab  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise Usage(
            "completion needs the package shtab: pip install 'graftml[completion]'"
        ) from error
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
