"""What errors of the disk and of SQLite mean to callers: full, held, damaged, not to be written.

Everything else stays as it was, and leaves as INTERNAL.
"""

import errno
import os
import secrets
import sqlite3
from pathlib import Path

from service.errors import Damaged, Exhausted, GraftError, Reason, Unavailable

PASSING = {Reason.STORAGE_FULL, Reason.STORAGE_BUSY}
"""What is worth waiting for: the same may be done later."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_PRIMARY = 0xFF
"""SQLite's codes are this byte; what is above says more of the same."""
_NO_TEXT = "Could not decode to UTF-8"
"""How the module sqlite3 begins what it says, without a code, of text that nobody wrote."""
_PROBE_BYTES = 2**16
_RETRY_AFTER_S = 30.0


def of_system(error: OSError) -> GraftError | None:
    """The error that callers get, where it is one of theirs."""
    if error.errno in _FULL:
        return full()
    if error.errno == errno.EROFS:
        return _read_only()
    if error.errno == errno.ETIMEDOUT:
        return Unavailable(
            Reason.STORAGE_BUSY,
            "a file system did not answer in time, as one of a network that is down: try again",
            retry_after_s=_RETRY_AFTER_S,
        )
    return None


def of_database(error: sqlite3.Error, folder: Path, waited_s: float) -> GraftError | None:
    """The error that callers get, where it is one of theirs; may try whether there is room."""
    if is_damage(error):
        return damaged()
    code = _code(error)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return busy(waited_s)
    if code == sqlite3.SQLITE_FULL:
        return full()
    if is_read_only(error):
        return _read_only()
    # SQLite does not say what the system said: of a quota it says this, and of a log that
    # cannot grow.
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return _probe(folder)
    return None


def is_damage(error: BaseException) -> bool:
    """Whether the database's file is not what was written, or the disk cannot read it back."""
    # With a name of the schema that is not a text, the module sqlite3 cannot say what SQLite says.
    return isinstance(error, UnicodeDecodeError) or (
        _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        or _whole_code(error) == sqlite3.SQLITE_IOERR_CORRUPTFS
        or str(error).startswith(_NO_TEXT)
    )


def is_read_only(error: BaseException) -> bool:
    """Whether a write was refused as such."""
    return _code(error) == sqlite3.SQLITE_READONLY


def full() -> Exhausted:
    """The disk of the data folder has no room."""
    return Exhausted(
        Reason.STORAGE_FULL, "the disk of the data folder is full: make room and try again"
    )


def busy(waited_s: float) -> Unavailable:
    """Somebody else writes, and did not end."""
    return Unavailable(
        Reason.STORAGE_BUSY,
        f"the database was held for {waited_s:.3g} s, by another process or a long change: try "
        "again",
        retry_after_s=waited_s,
    )


def damaged() -> Damaged:
    """The database's file is not what was written; waiting does not fix it."""
    return Damaged(
        Reason.STORAGE_DAMAGED,
        "the server's database is damaged: nothing can be stored, or looked up reliably, before "
        "its operator has restored it as the runbook says; the server ends",
    )


def _code(error: BaseException) -> int:
    return _whole_code(error) & _PRIMARY


def _whole_code(error: BaseException) -> int:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code


def _read_only() -> Unavailable:
    return Unavailable(
        Reason.STORAGE_BUSY,
        "the data folder is read-only: nothing can be stored before its operator makes it "
        "writable again; what is published is served on",
        retry_after_s=_RETRY_AFTER_S,
    )


def _probe(folder: Path) -> GraftError | None:
    path = folder / f"probe-{secrets.token_hex(4)}"
    try:
        with path.open("xb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return of_system(error)
    finally:
        path.unlink(missing_ok=True)
    return None
