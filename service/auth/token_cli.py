"""`graft-token`: makes, lists and revokes the tokens of an access file.

A token is printed once and kept nowhere; the file gets the hash of its secret. No
server is needed: a running one reads the file again by itself.
"""

import argparse
import datetime
import fcntl
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from service.auth import access_file
from service.auth.access_file import TenantEntry, TokenEntry
from service.auth.reload import BadFile
from service.domain import check_name
from service.errors import InvalidInput

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
SECRET_BYTES = 32
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TOKEN_HEADER = re.compile(r"\s*\[\[\s*tokens\s*\]\]")
_HEADER = re.compile(r"\s*\[")
_MADE: Final = "# made "
_UNITS: Final = {"h": 1, "d": 24, "w": 7 * 24}
_MAX_HOURS: Final = 100 * 366 * 24


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None and (given.tenant is None or not given.role):
        parser.error("a new token needs --tenant and --role")
    try:
        match given.command:
            case None:
                _make(given)
            case "list":
                _list(given.file, as_json=given.json)
            case "revoke":
                revoke(given.file, given.id)
                print(f"revoked {given.id}: a running server refuses it within seconds")
    except (BadFile, InvalidInput) as error:
        print(f"graft-token: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, UnicodeDecodeError) as error:
        print(f"graft-token: {given.file}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def append(path: Path, tenant: str, token_id: str, lines: str) -> None:
    """Adds a token's lines to an access file, and the tenant where it is missing.

    The rest of the file stays as it is, comments too; a new file can be read by its
    owner alone. Raises BadFile for a file that cannot be used or has the id, OSError.
    """

    def added(before: str) -> str:
        tenants, tokens = _tables(path, before)
        if any(entry.id == token_id for entry in tokens):
            raise BadFile(f"{path} has a token {token_id!r} already: give another --id")
        parts = [before.rstrip("\n")] if before.strip() else []
        if tenant not in tenants:
            name = tenant if _BARE_KEY.fullmatch(tenant) else f'"{tenant}"'
            parts.append(f"[tenants.{name}]")
        after = "\n\n".join([*parts, lines])
        try:
            access_file.tables(tomllib.loads(after))
        except (tomllib.TOMLDecodeError, BadFile) as error:
            # Tables in a form that cannot be added to, as tokens = [].
            raise BadFile(
                f"{path} cannot be added to ({error}): write tenants as [tenants.NAME] and tokens "
                "as [[tokens]]"
            ) from None
        return after

    _edit(path, added)


def revoke(path: Path, token_id: str) -> None:
    """Deletes a token's lines from an access file; the rest stays as it is, comments too.

    Raises BadFile for a file that cannot be used or has no such token, OSError.
    """

    def deleted(before: str) -> str:
        _, tokens = _tables(path, before)
        number = next((n for n, entry in enumerate(tokens) if entry.id == token_id), None)
        if number is None:
            raise BadFile(f"{path} has no token {token_id!r}: see graft-token list --file {path}")
        after = _without_table(before, number)
        expected = tomllib.loads(before)
        del expected["tokens"][number]
        try:
            found = {"tokens": [], **tomllib.loads(after)}
        except tomllib.TOMLDecodeError:
            found = {}
        if found != expected:
            # Tables in another form than [[tokens]], or text that looks like one.
            raise BadFile(f"{path} cannot be edited here: delete the token {token_id!r} by hand")
        return after

    if not path.exists():
        raise BadFile(f"{path} does not exist")
    _edit(path, deleted)


def _make(given: argparse.Namespace) -> None:
    check_name(given.tenant, "--tenant")
    token_id = given.id or f"{_as_id(given.tenant)}-{secrets.token_hex(4)}"
    secret = secrets.token_urlsafe(SECRET_BYTES)
    token = f"graft_{token_id}_{secret}"
    if access_file.split(token) is None:
        raise BadFile(
            f"--id {token_id!r} is no id: use 1 to 63 lower-case letters, digits, '-' and '.'"
        )
    roles = list(dict.fromkeys(given.role))
    lines = _lines(token_id, secret, given.tenant, roles, given.expires_in or given.expires_on)
    if given.file:
        append(given.file, given.tenant, token_id, lines)
        print(f"added {token_id} to {given.file}; the token, shown only now:", file=sys.stderr)
        print(token)
    else:
        print(f"the token, shown only now:\n{token}\n\nfor the access file:\n\n{lines}", end="")


def _list(path: Path, *, as_json: bool) -> None:
    _, tokens = _tables(path, path.read_text())
    if as_json:
        shown = [
            {
                "id": entry.id,
                "tenant": entry.tenant,
                "roles": entry.roles,
                "expires": entry.expires.isoformat() if entry.expires else None,
                "has_expired": _has_expired(entry),
            }
            for entry in tokens
        ]
        print(json.dumps(shown, indent=2))
        return
    rows = [("ID", "TENANT", "ROLES", "EXPIRES")]
    for entry in tokens:
        expires = access_file.shown_time(entry.expires.timestamp()) if entry.expires else "never"
        if _has_expired(entry):
            expires += " (expired)"
        rows.append((entry.id, entry.tenant, ",".join(entry.roles), expires))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*map(str.ljust, row, widths), row[3]]))


def _has_expired(entry: TokenEntry) -> bool:
    return entry.expires is not None and entry.expires <= _now()


def _tables(path: Path, content: str) -> tuple[dict[str, TenantEntry], list[TokenEntry]]:
    try:
        return access_file.tables(tomllib.loads(content))
    except (tomllib.TOMLDecodeError, BadFile) as error:
        raise BadFile(f"{path}: {error}") from None


def _without_table(content: str, number: int) -> str:
    """Deletes the lines of the [[tokens]] table with this number, counted from 0.

    Comments stay, but for those between its lines and the line on when it was made.
    """
    lines = content.splitlines(keepends=True)
    headers = [n for n, line in enumerate(lines) if _TOKEN_HEADER.match(line)]
    if number >= len(headers):
        return content
    start = headers[number]
    end = next(_next_headers(lines, start), len(lines))
    while lines[end - 1].strip() == "" or lines[end - 1].lstrip().startswith("#"):
        end -= 1
    if start > 0 and lines[start - 1].startswith(_MADE):
        start -= 1
    # One empty line of two.
    while end < len(lines) and start > 0 and not lines[start - 1].strip() + lines[end].strip():
        end += 1
    return "".join(lines[:start] + lines[end:])


def _next_headers(lines: Sequence[str], start: int) -> Iterator[int]:
    return (n for n in range(start + 1, len(lines)) if _HEADER.match(lines[n]))


def _edit(path: Path, change: Callable[[str], str]) -> None:
    """Replaces a file's content as a whole or not at all; one process at a time."""
    # A link may be how a server finds it; what it points to is what changes.
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # The folder, since the file is another one after each change.
        fcntl.flock(folder, fcntl.LOCK_EX)
        found = path.stat() if path.exists() else None
        before = path.read_text() if found else ""
        _replace(path, change(before), found)
        os.fsync(folder)
    finally:
        os.close(folder)


def _replace(path: Path, content: str, found: os.stat_result | None) -> None:
    """Renames a new file into place, with the old one's owner and mode; a new one is private."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(content)
            file.flush()
            if found:
                # Before the mode, so that nobody else can read it in between.
                os.fchown(handle, found.st_uid, found.st_gid)
                os.fchmod(handle, stat.S_IMODE(found.st_mode))
            os.fsync(handle)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _lines(
    token_id: str,
    secret: str,
    tenant: str,
    roles: Sequence[str],
    expires: datetime.datetime | None,
) -> str:
    return (
        f"{_MADE}{_now().date()}\n"
        "[[tokens]]\n"
        f'id = "{token_id}"\n'
        f'sha256 = "{access_file.digest(secret)}"\n'
        f'tenant = "{tenant}"\n'
        f"roles = {json.dumps(roles)}\n"
        + (f"expires = {expires:%Y-%m-%dT%H:%M:%SZ}\n" if expires else "")
    )


def _as_id(tenant: str) -> str:
    # Names may hold "_", ids may not; and there must be room for the rest.
    return tenant.replace("_", "-")[:48]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _expires_in(text: str) -> datetime.datetime:
    match = re.fullmatch(r"([1-9][0-9]{0,5})([hdw])", text)
    hours = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < hours <= _MAX_HOURS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time of at most 100 years: write a number and h, d or w, as in 90d"
        )
    return _now() + datetime.timedelta(hours=hours)


def _expires_on(text: str) -> datetime.datetime:
    try:
        day = datetime.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
        expires = day + datetime.timedelta(days=1)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write it as 2027-01-31") from None
    if expires <= _now():
        raise argparse.ArgumentTypeError(f"{text} is over: give a day to come")
    return expires


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graft-token",
        description="Makes a token for a Graft server, and the lines for its access file.",
        epilog="The token goes to whoever calls (GRAFT_TOKEN of the graft command); the file gets "
        "only a hash. A running server notices changes of its file by itself.",
    )
    parser.add_argument("--tenant", help="whose data it is to see")
    parser.add_argument(
        "--role",
        action="append",
        choices=["predict", "train", "admin"],
        help="what it may do; may be given several times",
    )
    parser.add_argument("--id", help="its name in logs; made up where left out")
    parser.add_argument("--file", type=Path, help="the access file to add it to; made if missing")
    expiry = parser.add_mutually_exclusive_group()
    expiry.add_argument(
        "--expires-in", type=_expires_in, metavar="TIME", help="as in 12h, 90d or 52w"
    )
    expiry.add_argument(
        "--expires-on",
        type=_expires_on,
        metavar="DATE",
        help="its last day, in UTC, as in 2027-01-31; without either it never expires",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="{list,revoke}", help="instead of making a token"
    )
    listing = commands.add_parser("list", help="list the tokens of an access file")
    listing.add_argument("--json", action="store_true", help="for programs")
    revoking = commands.add_parser("revoke", help="delete a token from an access file")
    revoking.add_argument("id", metavar="ID", help="the token's id, as list shows it")
    for command in (listing, revoking):
        command.add_argument("--file", type=Path, required=True, help="the access file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
