"""Runs `graft-server` and `python -m service`: one command with subcommands."""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from service.commands import backup, check, doctor, run, tokens
from service.commands.command import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Failed,
    formatter,
    reason,
    refuse,
)
from service.config import BadConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that is named; returns the exit code."""
    parser = command_line()
    given, strange = parser.parse_known_args(arguments)
    if strange:
        refuse(getattr(given, "parser", parser), strange)
    if given.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    try:
        return int(given.execute(given))
    except BadConfig as error:
        why, code = str(error), EXIT_USAGE
    except Failed as error:
        why, code = str(error), error.code
    except OSError as error:
        why, code = reason(error), EXIT_FAILED
    except KeyboardInterrupt:
        why, code = "interrupted", EXIT_INTERRUPTED
    print(f"graft-server: {why}", file=sys.stderr)
    return code


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="graft-server",
        description="Serves image classifiers and fine-tunes new ones on request.",
        epilog="`graft-server COMMAND --help` tells what a command takes, and its exit codes.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    version = metadata.version("graftml-server")
    parser.add_argument("--version", action="version", version=f"graft-server {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in (run, check, backup, tokens, doctor):
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
