"""`graft-token`: makes a token, and its lines for the access file.

Prints the token once and keeps it nowhere; the file gets the hash of its secret.
Needs no server: a running one reads the file again by itself.
"""

import argparse
import datetime
import fcntl
import os
import re
import secrets
import stat
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from service.auth import access_file
from service.auth.access_file import BadAccessFile
from service.domain import check_name
from service.errors import InvalidInput

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
SECRET_BYTES = 32
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes one token; returns the exit code."""
    given = _parser().parse_args(arguments)
    roles = list(dict.fromkeys(given.role))
    try:
        check_name(given.tenant, "--tenant")
        token_id = given.id or f"{_as_id(given.tenant)}-{secrets.token_hex(4)}"
        secret = secrets.token_urlsafe(SECRET_BYTES)
        token = f"graft_{token_id}_{secret}"
        if access_file.split(token) is None:
            raise BadAccessFile(
                f"--id {token_id!r} is no id: use 1 to 63 lower-case letters, digits, '-' and '.'"
            )
        lines = _lines(token_id, secret, given.tenant, roles)
        if given.file:
            append(given.file, given.tenant, token_id, lines)
            print(f"added {token_id} to {given.file}; the token, shown only now:", file=sys.stderr)
            print(token)
        else:
            print(f"the token, shown only now:\n{token}\n\nfor the access file:\n\n{lines}", end="")
    except (BadAccessFile, InvalidInput) as error:
        print(f"graft-token: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, UnicodeDecodeError) as error:
        print(f"graft-token: {given.file}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def append(path: Path, tenant: str, token_id: str, lines: str) -> None:
    """Adds a token to an access file, and the tenant where it is missing; whole or not at all.

    What stands in the file stays as it is, comments too; a new file can be read by
    its owner alone. Raises BadAccessFile for a file that is no good, or has the id.
    """
    # A link may be how a server finds it; what it points to is what changes.
    path = path.resolve()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # Not the file, which is another one after each change.
        fcntl.flock(folder, fcntl.LOCK_EX)
        found = path.stat() if path.exists() else None
        before = path.read_text() if found else ""
        _replace(path, _added(path, before, tenant, token_id, lines), found)
        os.fsync(folder)
    finally:
        os.close(folder)


def _added(path: Path, before: str, tenant: str, token_id: str, lines: str) -> str:
    try:
        tenants, tokens = access_file.tables(tomllib.loads(before))
    except (tomllib.TOMLDecodeError, BadAccessFile) as error:
        raise BadAccessFile(f"{path}: {error}") from None
    if any(entry.id == token_id for entry in tokens):
        raise BadAccessFile(f"{path} has a token {token_id!r} already: give another --id")
    parts = [before.rstrip("\n")] if before.strip() else []
    if tenant not in tenants:
        name = tenant if _BARE_KEY.fullmatch(tenant) else f'"{tenant}"'
        parts.append(f"[tenants.{name}]")
    after = "\n\n".join([*parts, lines])
    # Where tables stand in a form that cannot be added to (tokens = []), this finds it out.
    try:
        access_file.tables(tomllib.loads(after))
    except (tomllib.TOMLDecodeError, BadAccessFile) as error:
        raise BadAccessFile(
            f"{path} cannot be added to ({error}): write tenants as [tenants.NAME] and tokens as "
            "[[tokens]]"
        ) from None
    return after


def _replace(path: Path, content: str, found: os.stat_result | None) -> None:
    """Puts a file in another's place, with its owner and mode; a new one is its maker's alone."""
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


def _lines(token_id: str, secret: str, tenant: str, roles: Sequence[str]) -> str:
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"# made {today}\n"
        "[[tokens]]\n"
        f'id = "{token_id}"\n'
        f'sha256 = "{access_file.digest(secret)}"\n'
        f'tenant = "{tenant}"\n'
        f"roles = [{', '.join(f'{role!r}' for role in roles)}]\n".replace("'", '"')
    )


def _as_id(tenant: str) -> str:
    # Names may hold "_", ids may not; and there must be room for the rest.
    return tenant.replace("_", "-")[:48]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graft-token",
        description="Makes a token for a Graft server, and the lines for its access file.",
        epilog="The token goes to whoever calls (GRAFT_TOKEN of the graft command); the file gets "
        "only a hash. To take a token back, delete its lines; a running server notices.",
    )
    parser.add_argument("--tenant", required=True, help="whose data it is to see")
    parser.add_argument(
        "--role",
        required=True,
        action="append",
        choices=["predict", "train", "admin"],
        help="what it may do; may be given several times",
    )
    parser.add_argument("--id", help="its name in logs; made up where left out")
    parser.add_argument("--file", type=Path, help="the access file to add it to; made if missing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
