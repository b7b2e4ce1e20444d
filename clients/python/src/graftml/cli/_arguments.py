"""What the command line understands; knows the commands, talks to no server."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from graftml import __version__
from graftml._channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_S
from graftml.cli import (
    _backbones,
    _completion,
    _datasets,
    _finetune,
    _health,
    _jobs,
    _models,
    _predict,
    _rank,
)
from graftml.cli._output import Usage

__all__ = ["Arguments", "Usage", "parse"]

Arguments = argparse.Namespace

_EPILOG = """\
exit codes: 0 success, 1 the service refused or cannot be reached, 2 wrong usage,
3 a job failed or was cancelled, 4 a version did not pass its gate, 5 the server
is not serving (health), 130 interrupted
environment: GRAFT_SERVER is the default of --server, GRAFT_TOKEN the bearer token"""


_SYNONYMS = {"show": "get", "describe": "get", "info": "get", "remove": "delete", "rm": "delete"}
"""What other commands call these."""


def parse(argv: Sequence[str], environment: Mapping[str, str]) -> Arguments:
    """Reads the arguments; `run` is the command's function. Exits for --help and wrong usage."""
    arguments, strange = _parser().parse_known_args(argv)
    if strange:
        arguments.parser.refuse(strange)
    defaults = {
        "json": False,
        "quiet": False,
        "server": environment.get("GRAFT_SERVER") or DEFAULT_TARGET,
        "timeout": DEFAULT_TIMEOUT_S,
        "tls": False,
        "tls_ca": None,
        "tls_cert": None,
        "tls_key": None,
        "token": environment.get("GRAFT_TOKEN") or None,
    }
    for name, value in defaults.items():
        if not hasattr(arguments, name):
            setattr(arguments, name, value)
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise Usage("--tls-cert and --tls-key must be given together")
    return arguments


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what may have been meant."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As its parent's; keeps what was given, for the message."""
        self._given = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises Usage."""
        if message.startswith("the following arguments are required"):
            # One of them may have been mistyped, and that is found out after this.
            known = [option for action in self._actions for option in action.option_strings]
            options = [word.partition("=")[0] for word in self._given if word.startswith("--")]
            if strange := [option for option in options if option not in known]:
                self.refuse(strange)
        raise Usage(f"{message} (see {self.prog} --help)")

    def refuse(self, strange: Sequence[str]) -> NoReturn:
        """Raises Usage for arguments that it does not take."""
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"{strange[0]!r} is not an argument of this command{_meant(strange[0], known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        word = _SYNONYMS.get(str(value), str(value))
        hint = _meant(word, choices) or f": it must be one of {', '.join(choices)}"
        raise argparse.ArgumentError(action, f"there is no {str(value)!r}{hint}")


def _meant(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given.partition("=")[0], known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _parser() -> argparse.ArgumentParser:
    # Without defaults, so that they may stand before and after the command.
    everywhere = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = everywhere.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", help="write JSON lines to standard output")
    group.add_argument("--quiet", "-q", action="store_true", help="show no progress")
    group.add_argument(
        "--server", metavar="HOST:PORT", help=f"the server's address; default: {DEFAULT_TARGET}"
    )
    group.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help=f"deadline of each call in seconds; default: {DEFAULT_TIMEOUT_S:g}",
    )
    group.add_argument("--tls", action="store_true", help="connect with TLS")
    group.add_argument("--tls-ca", metavar="FILE", help="authority to trust, PEM; implies --tls")
    group.add_argument(
        "--tls-cert",
        metavar="FILE",
        help="client certificate for a server that asks for one, PEM; implies --tls",
    )
    group.add_argument("--tls-key", metavar="FILE", help="private key of --tls-cert, PEM")

    parser = _Parser(
        prog="graft",
        description="Fine-tune image classifiers and predict with them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[everywhere],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graft {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for room in (
        _finetune,
        _rank,
        _predict,
        _health,
        _jobs,
        _models,
        _datasets,
        _backbones,
        _completion,
    ):
        room.add(_Commands(commands, everywhere, parser))
    return parser


class _Commands:
    """Adds commands that take what is understood everywhere."""

    def __init__(
        self, commands: Any, everywhere: argparse.ArgumentParser, parser: argparse.ArgumentParser
    ) -> None:
        self._commands, self._everywhere = commands, everywhere
        self.parser = parser
        """The parser of the command that these belong to, which takes options of its own."""

    def add(self, name: str, text: str, run: Any, **more: Any) -> argparse.ArgumentParser:
        """A command; `run(client, arguments, output)` returns the exit code."""
        parser: argparse.ArgumentParser = self._commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[self._everywhere],
            allow_abbrev=False,
            **more,
        )
        parser.set_defaults(run=run, parser=parser)
        return parser

    def group(self, name: str, text: str, run: Any) -> "_Commands":
        """A command with commands of its own; alone it does what `run` does."""
        parser = self.add(name, text, run)
        return _Commands(parser.add_subparsers(metavar="ACTION"), self._everywhere, parser)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value
