"""`graft-server tokens`: makes, lists and revokes the tokens of an access file."""

import argparse
import datetime
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from service import settings
from service.auth import access_file, tokens
from service.auth.reload import BadFile
from service.commands import command
from service.errors import InvalidInput

_SETTINGS = ("access_file",)
_CODES = "0 done, 1 the file cannot be read or written, 2 it cannot be done so"
_UNITS: Final = {"h": 1, "d": 24, "w": 7 * 24}
_MAX_HOURS: Final = 100 * 366 * 24


def add(commands: command.Commands) -> None:
    """Adds the subcommand, with those of its own."""
    parser = command.add(
        commands,
        "tokens",
        "make, list and revoke the tokens of an access file",
        execute=lambda _: _help(parser),
        more="A running server reads the file again within seconds.",
        exit_codes=_CODES,
    )
    own = parser.add_subparsers(metavar="COMMAND", title="commands")
    making = command.add(
        own,
        "create",
        "make a token, and add it to the access file",
        _create,
        more="The token is printed once and kept nowhere; the file gets its hash. Without a file, "
        "the lines for one are printed.",
        exit_codes=_CODES,
    )
    making.add_argument("--tenant", required=True, help="whose data it is to see")
    making.add_argument(
        "--role", action="append", required=True, choices=["predict", "train", "admin"],
        help="what it may do; may be given several times",
    )  # fmt: skip
    making.add_argument("--id", default="", help="its name in logs; made up where left out")
    expiry = making.add_mutually_exclusive_group()
    expiry.add_argument(
        "--expires-in", type=_expires_in, metavar="TIME", help="as in 12h, 90d or 52w"
    )
    expiry.add_argument(
        "--expires-on", type=_expires_on, metavar="DATE",
        help="its last day, in UTC, as in 2027-01-31; without either it never expires",
    )  # fmt: skip
    listing = command.add(
        own,
        "list",
        "show ids, tenants, roles and expiry of the tokens, never a secret",
        _list,
        exit_codes=_CODES,
    )
    listing.add_argument("--json", action="store_true", help="for programs")
    revoking = command.add(
        own,
        "revoke",
        "delete a token from the access file",
        _revoke,
        more="Its comments and all else stay as they are.",
        exit_codes=_CODES,
    )
    revoking.add_argument("id", metavar="ID", help="the token's id, as list shows it")
    for each in (making, listing, revoking):
        settings.add_flags(each, _SETTINGS)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return command.EXIT_USAGE


def _create(given: argparse.Namespace) -> int:
    file = _file(given)
    with _reported(file):
        made = tokens.make(given.tenant, given.role, given.id, given.expires_in or given.expires_on)
        if file is None:
            print(f"the token, shown only now:\n{made.secret}\n\nfor the access file:\n")
            print(made.lines, end="")
        else:
            tokens.append(file, given.tenant, made.id, made.lines)
            print(f"added {made.id} to {file}; the token, shown only now:", file=sys.stderr)
            print(made.secret)
    return command.EXIT_OK


def _list(given: argparse.Namespace) -> int:
    file = _needed_file(given)
    with _reported(file):
        _show(tokens.listed(file), as_json=given.json)
    return command.EXIT_OK


def _revoke(given: argparse.Namespace) -> int:
    file = _needed_file(given)
    with _reported(file):
        tokens.revoke(file, given.id)
    print(f"revoked {given.id}: a running server refuses it within seconds")
    return command.EXIT_OK


@contextmanager
def _reported(file: Path | None) -> Iterator[None]:
    """Ends the command for what cannot be done with a file."""
    try:
        yield
    except (BadFile, InvalidInput) as error:
        raise command.Failed(error, command.EXIT_USAGE) from None
    except OSError as error:
        # Whatever file of ours it was: this one is known.
        raise command.Failed(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise command.Failed(f"{file}: {error}") from None


def _file(given: argparse.Namespace) -> Path | None:
    return settings.load_only(_SETTINGS, vars(given), os.environ).access_file


def _needed_file(given: argparse.Namespace) -> Path:
    file = _file(given)
    if file is None:
        raise command.Failed("say which file: --access-file, or GRAFT_ACCESS_FILE", 2)
    return file


def _show(entries: list[access_file.TokenEntry], *, as_json: bool) -> None:
    if as_json:
        shown = [
            {
                "id": entry.id,
                "tenant": entry.tenant,
                "roles": entry.roles,
                "expires": entry.expires.isoformat() if entry.expires else None,
                "has_expired": tokens.has_expired(entry),
            }
            for entry in entries
        ]
        print(json.dumps(shown, indent=2))
        return
    rows = [("ID", "TENANT", "ROLES", "EXPIRES")]
    for entry in entries:
        expires = access_file.shown_time(entry.expires.timestamp()) if entry.expires else "never"
        if tokens.has_expired(entry):
            expires += " (expired)"
        rows.append((entry.id, entry.tenant, ",".join(entry.roles), expires))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*map(str.ljust, row, widths), row[3]]))


def _expires_in(text: str) -> datetime.datetime:
    match = re.fullmatch(r"([1-9][0-9]{0,5})([hdw])", text)
    hours = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < hours <= _MAX_HOURS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time of at most 100 years: write a number and h, d or w, as in 90d"
        )
    return tokens.now() + datetime.timedelta(hours=hours)


def _expires_on(text: str) -> datetime.datetime:
    try:
        day = datetime.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
        expires = day + datetime.timedelta(days=1)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a date: write it as 2027-01-31"
        ) from None
    if expires <= tokens.now():
        raise argparse.ArgumentTypeError(f"{text} is over: give a day to come")
    return expires
