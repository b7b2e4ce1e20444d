"""Tokens of an access file: made, listed and revoked in the file itself.

A token's secret is returned once and kept nowhere; the file gets its hash. What else is in the
file stays, comments too. No server is needed: a running one reads the file again by itself.
"""

import datetime
import fcntl
import json
import os
import re
import secrets
import stat
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from service.auth import access_file
from service.auth.access_file import TenantEntry, TokenEntry
from service.auth.reload import BadFile
from service.domain import check_name

SECRET_BYTES = 32
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TOKEN_HEADER = re.compile(r"\s*\[\[\s*tokens\s*\]\]")
_HEADER = re.compile(r"\s*\[")
_MADE: Final = "# made "


@dataclass(frozen=True)
class NewToken:
    """A token that was just made."""

    id: str
    secret: str
    """The token as its owner sends it; shown once."""
    lines: str
    """What an access file holds of it."""


def make(
    tenant: str, roles: Sequence[str], token_id: str, expires: datetime.datetime | None
) -> NewToken:
    """Makes a token, with an id of its own where none is given.

    Raises BadFile for an id that is none, InvalidInput for a tenant that is none.
    """
    check_name(tenant, "--tenant")
    # Names may hold "_", ids may not; and there must be room for the rest.
    token_id = token_id or f"{tenant.replace('_', '-')[:48]}-{secrets.token_hex(4)}"
    secret = secrets.token_urlsafe(SECRET_BYTES)
    token = f"graft_{token_id}_{secret}"
    if access_file.split(token) is None:
        raise BadFile(
            f"--id {token_id!r} is not an id: use 1 to 63 lower-case letters, digits, '-' and '.'"
        )
    unique = list(dict.fromkeys(roles))
    return NewToken(token_id, token, _lines(token_id, secret, tenant, unique, expires))


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
            raise BadFile(
                f"{path} has no token {token_id!r}: `graft-server tokens list` shows which it has"
            )
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


def listed(path: Path) -> list[TokenEntry]:
    """Returns the tokens of an access file; raises BadFile, OSError."""
    return _tables(path, path.read_text())[1]


def has_expired(entry: TokenEntry) -> bool:
    """Tells whether a token is worth nothing any more."""
    return entry.expires is not None and entry.expires <= now()


def now() -> datetime.datetime:
    """Returns the time, in UTC."""
    return datetime.datetime.now(datetime.UTC)


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
    after = (n for n in range(start + 1, len(lines)) if _HEADER.match(lines[n]))
    end = next(after, len(lines))
    while lines[end - 1].strip() == "" or lines[end - 1].lstrip().startswith("#"):
        end -= 1
    if start > 0 and lines[start - 1].startswith(_MADE):
        start -= 1
    # One empty line of two.
    while end < len(lines) and start > 0 and not lines[start - 1].strip() + lines[end].strip():
        end += 1
    return "".join(lines[:start] + lines[end:])


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
    token_id: str, secret: str, tenant: str, roles: Sequence[str], expires: datetime.datetime | None
) -> str:
    return (
        f"{_MADE}{now().date()}\n"
        "[[tokens]]\n"
        f'id = "{token_id}"\n'
        f'sha256 = "{access_file.digest(secret)}"\n'
        f'tenant = "{tenant}"\n'
        f"roles = {json.dumps(roles)}\n"
        + (f"expires = {expires:%Y-%m-%dT%H:%M:%SZ}\n" if expires else "")
    )
