"""The access file: what stands in it, read and checked; the only one who knows its format.

TOML, docs/access.md says how. It holds hashes of secrets and never a secret, and
its errors name keys and tell no values of them that could be one.
"""

import hashlib
import hmac
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from service.auth.principal import Caller, Quota, Role
from service.domain import check_name
from service.errors import InvalidInput

MIB: Final = 2**20
MAX_FILE_BYTES: Final = 16 * MIB
MAX_RANKINGS: Final = 2
"""Of a tenant at once: all tenants wait for one turn."""

# No "_" in an id, so that a token falls into its parts in one way only.
_ID = r"[a-z0-9][a-z0-9.-]{0,62}"
_TOKEN = re.compile(rf"graft_({_ID})_([A-Za-z0-9_-]{{20,200}})")

Signature = tuple[int, int, int, int]
"""What changes with a file: inode, size, times of modification and of change."""


class BadAccessFile(ValueError):  # noqa: N818
    """The access file cannot be used; the message says where, why and what to do."""


class TenantEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[tenants.NAME]`; what is left out has no bound, but for folders: there are none then."""

    calls_per_second: Annotated[float, msgspec.Meta(gt=0)] | None = None
    concurrent_jobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stored_mb: Annotated[int, msgspec.Meta(ge=0)] | None = None
    allowed_dirs: list[str] = []


class TokenEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[tokens]]`."""

    id: Annotated[str, msgspec.Meta(pattern=f"^{_ID}$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """Of the token's secret, lower-case hex."""
    tenant: str
    roles: Annotated[list[Role], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Token:
    """What is known of one token."""

    sha256: str = field(repr=False)
    caller: Caller

    def is_of(self, secret: str) -> bool:
        """Whether this is its secret; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest(digest(secret), self.sha256)


@dataclass(frozen=True)
class AccessList:
    """Who may come in, and what their tenants may read."""

    tokens: Mapping[str, Token]
    """By id."""
    allowed_dirs: Mapping[str, tuple[Path, ...]]
    """By tenant; resolved."""
    quotas: Mapping[str, Quota]
    """By tenant."""
    missing: tuple[str, ...] = ()
    """Folders that tenants name and that are not there; in no tenant's list. For people."""
    shared: tuple[str, ...] = ()
    """Folders that more than one tenant reads. For people."""


def split(token: str) -> tuple[str, str] | None:
    """A token's id and its secret; None for what is not shaped like a token."""
    match = _TOKEN.fullmatch(token)
    return (match[1], match[2]) if match else None


def digest(secret: str) -> str:
    """What the file holds of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def signature(found: os.stat_result) -> Signature:
    """Tells one state of a file from another."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read(path: Path, server_dirs: Sequence[Path]) -> tuple[AccessList, Signature]:
    """Reads and checks a file; `server_dirs` are the server's own folders, resolved.

    Raises BadAccessFile, and nothing else.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise BadAccessFile(
                    f"the access file {path} can be written by others than its owner (mode "
                    f"{stat.S_IMODE(found.st_mode):04o}), who could let themselves in: "
                    f"chmod go-w {path}"
                )
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadAccessFile(f"the access file {path} cannot be read: {error.strerror}") from error
    try:
        return parse(content, server_dirs), signature(found)
    except BadAccessFile as error:
        raise BadAccessFile(f"the access file {path}: {error}") from None


def parse(content: bytes, server_dirs: Sequence[Path]) -> AccessList:
    """As `read`, from a file's content."""
    if len(content) > MAX_FILE_BYTES:
        raise BadAccessFile(f"it is larger than {MAX_FILE_BYTES // MIB} MiB")
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadAccessFile(f"it is no TOML: {error}") from None
    tenants, tokens = tables(document)
    # What a file looks like while somebody writes it in place.
    if not tenants and not tokens:
        raise BadAccessFile("it is empty: give it a [tenants.NAME] and [[tokens]]")
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
            raise BadAccessFile(f"{where}: another token has this id already")
        if entry.tenant not in tenants:
            raise BadAccessFile(
                f"{where}: there is no tenant {entry.tenant!r}; add [tenants.{entry.tenant}]"
            )
        caller = Caller(
            entry.id,
            entry.tenant,
            frozenset(entry.roles),
            quotas[entry.tenant],
            token_sha256=entry.sha256,
        )
        found[entry.id] = Token(entry.sha256, caller)
    folders: dict[str, tuple[Path, ...]] = {}
    missing: list[str] = []
    for name, tenant in tenants.items():
        there = []
        for text in tenant.allowed_dirs:
            where = f"[tenants.{name}] allowed_dirs names {text!r}"
            folder = _folder(where, text, server_dirs)
            if folder is None:
                missing.append(f"{where}, which is no folder that can be read")
            else:
                there.append(folder)
        folders[name] = tuple(there)
    return AccessList(found, folders, quotas, tuple(missing), _shared(folders))


def tables(document: Mapping[str, Any]) -> tuple[dict[str, TenantEntry], list[TokenEntry]]:
    """The file's tables, each checked by itself; raises BadAccessFile."""
    strangers = sorted(document.keys() - {"tenants", "tokens"})
    if strangers:
        raise BadAccessFile(
            f"the key {strangers[0]!r} is not known; at the top there are [tenants.NAME] and "
            "[[tokens]]"
        )
    tenants, tokens = document.get("tenants", {}), document.get("tokens", [])
    if not isinstance(tenants, dict):
        raise BadAccessFile("tenants must be tables, [tenants.NAME]")
    if not isinstance(tokens, list):
        raise BadAccessFile("tokens must be an array of tables, [[tokens]]")
    entries = {}
    for name, table in tenants.items():
        try:
            check_name(name, "tenant")
        except InvalidInput as error:
            raise BadAccessFile(f"[tenants.{name[:80]}]: {error.message}") from None
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
        # The path's "$" means the table, which `where` names already.
        told = str(error).replace("`$.", "`")
        raise BadAccessFile(f"{where}: {told}; it may hold {known}") from None


def _folder(where: str, text: str, server_dirs: Sequence[Path]) -> Path | None:
    """The resolved folder; None for one that is not there, as while a share is not mounted."""
    folder = Path(text)
    if not folder.is_absolute() or "\0" in text:
        raise BadAccessFile(f"{where}, which is no absolute path of a folder")
    try:
        is_there = folder.is_dir()
        folder = folder.resolve()
    except (OSError, RuntimeError):
        # A share that is gone, or a loop of links.
        return None
    if not any(folder.is_relative_to(allowed) for allowed in server_dirs):
        raise BadAccessFile(
            f"{where}, which lies in none of the server's own folders: add it to "
            "GRAFT_ALLOWED_DIRS, or take it out here"
        )
    return folder if is_there else None


def _shared(folders: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    """Where a tenant's folder is another's too, or lies in it."""
    owner_of: dict[Path, str] = {}
    for tenant, own in folders.items():
        for folder in own:
            owner_of.setdefault(folder, tenant)
    told = []
    for tenant, own in folders.items():
        for folder in own:
            owners = (owner_of.get(above, tenant) for above in (folder, *folder.parents))
            other = next((owner for owner in owners if owner != tenant), None)
            if other is not None:
                told.append(f"[tenants.{tenant}] and [tenants.{other}] both read {str(folder)!r}")
    return tuple(told)
