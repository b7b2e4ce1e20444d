"""The access file: its format (TOML, docs/how-to/access.md), read and checked.

It holds hashes of secrets and never a secret, and its errors quote no value that
could be one.
"""

import datetime
import hashlib
import hmac
import math
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from service.auth.principal import Principal, Quota, Role
from service.auth.reload import BadFile
from service.domain import check_name
from service.errors import InvalidInput

MIB: Final = 2**20
MAX_FILE_BYTES: Final = 16 * MIB
MAX_RANKINGS: Final = 2
"""Rankings of one tenant that wait or run: all tenants share one process for them."""

# No "_" in an id, so that a token can be split in one way only.
_ID = r"[a-z0-9][a-z0-9.-]{0,62}"
_TOKEN = re.compile(rf"graft_({_ID})_([A-Za-z0-9_-]{{20,200}})")


class TenantEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tenants.NAME]`. A limit that is left out is none; no `allowed_dirs` means no folders."""

    calls_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    concurrent_jobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stored_mb: Annotated[int, msgspec.Meta(ge=0)] | None = None
    allowed_dirs: list[str] = []


class TokenEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[tokens]]`."""

    id: Annotated[str, msgspec.Meta(pattern=f"^{_ID}$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """Hash of the token's secret, lower-case hex."""
    tenant: str
    roles: Annotated[list[Role], msgspec.Meta(min_length=1)]
    expires: Annotated[datetime.datetime, msgspec.Meta(tz=True)] | None = None


@dataclass(frozen=True)
class Token:
    """A token of the file."""

    sha256: str = field(repr=False)
    principal: Principal
    expires_at: float = math.inf
    """Seconds since 1970; infinite for a token without expiry."""

    def matches(self, secret: str) -> bool:
        """Tells whether this is the token's secret, in constant time."""
        return hmac.compare_digest(digest(secret), self.sha256)


@dataclass(frozen=True)
class AccessList:
    """The content of an access file."""

    tokens: Mapping[str, Token]
    """By id."""
    allowed_dirs: Mapping[str, tuple[Path, ...]]
    """By tenant; resolved."""
    quotas: Mapping[str, Quota]
    """By tenant."""
    missing: tuple[str, ...] = ()
    """Warnings about folders that tenants name and that do not exist; no tenant gets them."""
    shared: tuple[str, ...] = ()
    """Warnings about folders that more than one tenant may read."""


def split(token: str) -> tuple[str, str] | None:
    """Splits a token into its id and its secret; None if it has not the form of a token."""
    match = _TOKEN.fullmatch(token)
    return (match[1], match[2]) if match else None


def digest(secret: str) -> str:
    """Hashes a secret as the file holds it: SHA-256 in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def shown_time(seconds: float) -> str:
    """Formats seconds since 1970 for people, in UTC."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def read(path: Path, server_dirs: Sequence[Path]) -> AccessList:
    """Reads and checks a file; `server_dirs` are the server's own folders, resolved.

    Raises BadFile, and nothing else.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise BadFile(
                    f"the access file {path} can be written by others than its owner (mode "
                    f"{stat.S_IMODE(mode):04o}), who could let themselves in: chmod go-w {path}"
                )
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadFile(f"the access file {path} cannot be read: {error.strerror}") from error
    try:
        return parse(content, server_dirs)
    except BadFile as error:
        raise BadFile(f"the access file {path}: {error}") from None


def parse(content: bytes, server_dirs: Sequence[Path]) -> AccessList:
    """Checks the content of a file, as `read` does; raises BadFile."""
    if len(content) > MAX_FILE_BYTES:
        raise BadFile(f"it is larger than {MAX_FILE_BYTES // MIB} MiB")
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFile(f"it is not TOML: {error}") from None
    tenants, tokens = tables(document)
    # As a file is while somebody writes it in place.
    if not tenants and not tokens:
        raise BadFile("it is empty: give it a [tenants.NAME] and [[tokens]]")
    quotas = {
        name: Quota(
            entry.calls_per_second,
            entry.concurrent_jobs,
            None if entry.stored_mb is None else entry.stored_mb * MIB,
            rankings=(
                MAX_RANKINGS
                if entry.concurrent_jobs is None
                else min(MAX_RANKINGS, entry.concurrent_jobs)
            ),
        )
        for name, entry in tenants.items()
    }
    found: dict[str, Token] = {}
    for number, entry in enumerate(tokens, 1):
        where = f"[[tokens]] number {number}, id {entry.id!r}"
        if entry.id in found:
            raise BadFile(f"{where}: another token has this id already")
        if entry.tenant not in tenants:
            raise BadFile(
                f"{where}: there is no tenant {entry.tenant!r}; add [tenants.{entry.tenant}]"
            )
        principal = Principal(
            entry.id,
            entry.tenant,
            frozenset(entry.roles),
            quotas[entry.tenant],
            token_sha256=entry.sha256,
        )
        expires_at = entry.expires.timestamp() if entry.expires else math.inf
        found[entry.id] = Token(entry.sha256, principal, expires_at)
    folders: dict[str, tuple[Path, ...]] = {}
    missing: list[str] = []
    for name, tenant in tenants.items():
        existing = []
        for text in tenant.allowed_dirs:
            where = f"[tenants.{name}] allowed_dirs names {text!r}"
            folder = _folder(where, text, server_dirs)
            if folder is None:
                missing.append(f"{where}, which is not a folder that can be read")
            else:
                existing.append(folder)
        folders[name] = tuple(existing)
    return AccessList(found, folders, quotas, tuple(missing), _shared(folders))


def tables(document: Mapping[str, Any]) -> tuple[dict[str, TenantEntry], list[TokenEntry]]:
    """Checks each of the file's tables by itself; raises BadFile."""
    unknown = sorted(document.keys() - {"tenants", "tokens"})
    if unknown:
        raise BadFile(
            f"the key {unknown[0]!r} is not known; at the top there are [tenants.NAME] and "
            "[[tokens]]"
        )
    tenants, tokens = document.get("tenants", {}), document.get("tokens", [])
    if not isinstance(tenants, dict):
        raise BadFile("tenants must be tables, [tenants.NAME]")
    if not isinstance(tokens, list):
        raise BadFile("tokens must be an array of tables, [[tokens]]")
    entries = {}
    for name, table in tenants.items():
        try:
            check_name(name, "tenant")
        except InvalidInput as error:
            raise BadFile(f"[tenants.{name[:80]}]: {error.message}") from None
        entries[name] = _convert(table, TenantEntry, f"[tenants.{name}]")
    return entries, [
        _convert(table, TokenEntry, f"[[tokens]] number {number}")
        for number, table in enumerate(tokens, 1)
    ]


Entry = TypeVar("Entry", TenantEntry, TokenEntry)


def _convert(table: object, kind: type[Entry], where: str) -> Entry:
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        known = ", ".join(kind.__struct_fields__)
        # The path's "$" is the table, which `where` names already.
        problem = str(error).replace("`$.", "`")
        if problem.endswith("`expires`"):
            problem += ", as in expires = 2027-01-31T00:00:00Z"
        raise BadFile(f"{where}: {problem}; it may hold {known}") from None


def _folder(where: str, text: str, server_dirs: Sequence[Path]) -> Path | None:
    """Resolves a folder; None if it does not exist, as while a share is not mounted."""
    folder = Path(text)
    if not folder.is_absolute() or "\0" in text:
        raise BadFile(f"{where}, which is not an absolute path of a folder")
    try:
        exists = folder.is_dir()
        folder = folder.resolve()
    except (OSError, RuntimeError):
        # A share that is gone, or a loop of links.
        return None
    if not any(folder.is_relative_to(allowed) for allowed in server_dirs):
        raise BadFile(
            f"{where}, which lies in none of the server's own folders: add it to "
            "GRAFT_ALLOWED_DIRS, or take it out here"
        )
    return folder if exists else None


def _shared(folders: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    """Lists the folders of tenants that are another tenant's too, or lie in one."""
    owner_of: dict[Path, str] = {}
    for tenant, own in folders.items():
        for folder in own:
            owner_of.setdefault(folder, tenant)
    found = []
    for tenant, own in folders.items():
        for folder in own:
            owners = (owner_of.get(above, tenant) for above in (folder, *folder.parents))
            other = next((owner for owner in owners if owner != tenant), None)
            if other is not None:
                found.append(f"[tenants.{tenant}] and [tenants.{other}] both read {str(folder)!r}")
    return tuple(found)
