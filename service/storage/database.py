"""The database: one SQLite file in the data folder, its migrations, its transactions.

Owns the connections and the lock that keeps a second server out of the data
folder. Knows no table; the stores do. One writer at a time, any number of
readers, from any thread. No file and no network is touched inside a transaction. The SQL of
the stores is plain enough for PostgreSQL, but for a trigger in the migrations. Stops with
`close`.
"""

import errno
import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib import resources
from pathlib import Path

from service.errors import Damaged, GraftError, Internal, Reason, Unavailable, stopping
from service.ops import failpoints
from service.storage import fsync, storage_errors

Connection = sqlite3.Connection

FILE = "graft.sqlite3"
LOCK = "lock"
"""The file that the one server of a data folder holds."""
BUSY_TIMEOUT_S = 10.0
"""Longest wait while another process holds the database."""
_WRITER_TIMEOUT_S = 30.0
_IDLE_READERS = 8
_UNWRITABLE = {
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip
_WHAT_TO_DO = (
    "put the data folder back from a backup, as the runbook says, and keep the damaged one aside"
)

log = logging.getLogger(__name__)


class Database:
    """Transactions on `folder`/graft.sqlite3; the folder is made if need be.

    `on_damage` is called once when a page is found damaged: what is acknowledged from then on
    would be lost with the file, so no transaction begins any more, and the process should end.
    An `is_exclusive` one keeps every other server out of the folder. Raises Unavailable when
    another server has the folder or it cannot be written, Internal when another version of Graft
    made it, Damaged when its file is not whole.
    """

    def __init__(
        self,
        folder: Path,
        scripts: Sequence[str] | None = None,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        *,
        on_damage: Callable[[], None] = lambda: None,
        is_exclusive: bool = True,
    ) -> None:
        self._folder = folder
        self._busy_timeout_s = busy_timeout_s
        self._on_damage = on_damage
        self.is_exclusive = is_exclusive
        self._path = folder / FILE
        with _unwritable_reported(folder):
            fsync.make_folder(folder)
            self._lock_file = _lock(folder) if is_exclusive else -1
        self._writing = threading.Lock()
        self._guard = threading.Lock()
        self._readers: list[Connection] = []
        self._after_commit: list[Callable[[], None]] = []
        self._is_closed = False
        self._is_damaged = False
        with ExitStack() as opened, self._damage_reported():
            opened.callback(self._unlock)
            self._writer = opened.enter_context(closing(self._connect()))
            _check(self._writer)
            known = _shipped() if scripts is None else scripts
            if not _is_made_by(self._writer, known):
                raise Internal(
                    Reason.INTERNAL,
                    f"the data folder {folder} was made by another version of Graft: start that "
                    "version, or give this one a folder of its own",
                )
            _migrate(self._writer, known)
            opened.pop_all()

    @contextmanager
    def transaction(self, scope: str = "") -> Iterator[Connection]:
        """Runs the one write transaction: committed at the end, rolled back on any error.

        `scope` names what is serialised with what, such as "tenant:acme"; SQLite has one writer
        and does not look at it. Not to be nested. Raises Exhausted (STORAGE_FULL) when the disk
        is full, Unavailable (STORAGE_BUSY) when another process holds the database, and Damaged
        (STORAGE_DAMAGED) when its file is, or was found so before.
        """
        del scope
        if not self._writing.acquire(timeout=_WRITER_TIMEOUT_S):
            raise storage_errors.busy(_WRITER_TIMEOUT_S)
        try:
            self._check_open()
            if self._is_damaged:
                raise storage_errors.damaged()
            self._after_commit.clear()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                failpoints.reach("database.committing")
                self._writer.execute("COMMIT")
            except BaseException as error:
                # A full disk may have ended the transaction already.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                if (known := self._known(error)) is not None:
                    raise known from error
                raise
            # What is committed stays committed, whatever becomes of the notices.
            for action in self._after_commit:
                try:
                    action()
                except Exception:
                    log.exception("a notice after a transaction failed")
        finally:
            self._writing.release()

    def after_commit(self, action: Callable[[], None]) -> None:
        """Runs `action` once the running transaction is committed.

        For notices alone, which say "look again": an action must not block, touch files, or
        open a transaction, and nothing may depend on its being run. To be called inside
        `transaction()` by its thread.
        """
        self._after_commit.append(action)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yields a connection that sees one state of the database and must not write.

        Goes on while another process writes. Raises Damaged (STORAGE_DAMAGED) where the file is.
        """
        with self._guard:
            self._check_open()
            connection = self._readers.pop() if self._readers else None
        if connection is None:
            connection = self._reader()
        try:
            connection.execute("BEGIN")
            yield connection
        except Exception as error:
            # A write through here is a fault of ours, whatever the disk allows.
            if not storage_errors.is_read_only(error) and (known := self._known(error)) is not None:
                raise known from error
            raise
        finally:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            with self._guard:
                keep = not self._is_closed and len(self._readers) < _IDLE_READERS
                if keep:
                    self._readers.append(connection)
            if not keep:
                connection.close()

    def close(self) -> None:
        """Waits for the running transaction, closes, and frees the folder. Idempotent."""
        with self._writing, self._guard:
            if self._is_closed:
                return
            self._is_closed = True
            for connection in self._readers:
                connection.close()
            self._writer.close()
            self._unlock()

    def _unlock(self) -> None:
        if self._lock_file >= 0:
            os.close(self._lock_file)

    def _check_open(self) -> None:
        if self._is_closed:
            raise stopping("try again soon")

    def _reader(self) -> Connection:
        try:
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if (known := self._known(error)) is not None:
                raise known from error
            raise
        return connection

    def _connect(self) -> Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            # FULL: what was answered as stored outlives a power cut.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            # Damage is noticed when a page is read, and not spread by a write to it.
            connection.execute("PRAGMA cell_size_check = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _known(self, error: BaseException) -> GraftError | None:
        """Returns what callers get for an error of the disk or of SQLite; None for any other."""
        if storage_errors.is_damage(error):
            self._note_damage(error)
        if isinstance(error, sqlite3.Error):
            return storage_errors.of_database(error, self._folder, self._busy_timeout_s)
        return storage_errors.of_system(error) if isinstance(error, OSError) else None

    def _note_damage(self, error: BaseException) -> None:
        with self._guard:
            if self._is_damaged:
                return
            self._is_damaged = True
        log.critical(
            "the database %s is damaged (%s), and the server ends; %s",
            self._path,
            error,
            _WHAT_TO_DO,
            exc_info=error,
        )
        self._on_damage()

    @contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if storage_errors.is_damage(error):
                raise Damaged(
                    Reason.STORAGE_DAMAGED,
                    f"the database {self._path} is damaged ({error}): {_WHAT_TO_DO}",
                ) from error
            if (known := self._known(error)) is not None:
                raise known from error
            raise


def now_s(_connection: Connection) -> float:
    """Returns the database's clock, seconds since 1970: no lease is compared with another."""
    return time.time()


def marks(values: Sized) -> str:
    """Returns a question mark for each value, as a list in SQL."""
    return ", ".join("?" * len(values))


def references_to(connection: Connection, table: str) -> list[tuple[str, str]]:
    """Returns every (table, column) whose rows refer to rows of `table` by a foreign key."""
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return [
        (row["name"], key["from"])
        for row in tables
        for key in connection.execute("SELECT * FROM pragma_foreign_key_list(?)", (row["name"],))
        if key["table"] == table
    ]


def is_current(connection: Connection) -> bool:
    """Tells whether a database is as this version of Graft makes it."""
    return _mark(connection) == _mark_of(_shipped())


@contextmanager
def kept_from_servers(folder: Path) -> Iterator[None]:
    """Holds a data folder, which is made if need be; raises Unavailable where a server does."""
    fsync.make_folder(folder)
    file = _lock(folder)
    try:
        yield
    finally:
        os.close(file)


def _lock(folder: Path) -> int:
    # Held until the process ends, so a killed server leaves no stale lock.
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise Unavailable(
            Reason.STORAGE_BUSY,
            f"another server uses the data folder {folder}: stop it, or give this one a folder of "
            "its own",
        ) from None
    return file


def _shipped() -> list[str]:
    folder = resources.files("service.storage") / "migrations"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".sql"))
    numbers = [int(name.split("_")[0]) for name in names]
    assert numbers == list(range(1, len(names) + 1)), f"migrations have gaps: {names}"
    return [(folder / name).read_text("utf-8") for name in names]


def _mark(connection: Connection) -> tuple[int, int]:
    """Returns how many migrations made a database, and a checksum of these."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (checksum,) = connection.execute("PRAGMA application_id").fetchone()
    return version, checksum


def _mark_of(scripts: Sequence[str]) -> tuple[int, int]:
    # Neither comments nor white space change a schema. The pragma takes 31 bits.
    words = re.sub(r"--.*", "", "\n".join(scripts)).split()
    return len(scripts), zlib.crc32(" ".join(words).encode()) & 0x7FFFFFFF


def _is_made_by(connection: Connection, scripts: Sequence[str]) -> bool:
    """Tells whether the first of these scripts, or none yet, made a database."""
    mark = _mark(connection)
    return mark == _mark_of(scripts[: mark[0]])


def _migrate(connection: Connection, scripts: Sequence[str]) -> None:
    version, _ = _mark(connection)
    for number, script in enumerate(scripts[version:], version + 1):
        _, checksum = _mark_of(scripts[:number])
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\n"
                f"PRAGMA application_id = {checksum};\nCOMMIT;"
            )
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        log.info("database migrated to format %d", number)
        failpoints.reach("database.migrated")


def _check(connection: Connection) -> None:
    # A start is the time to learn of it: later it would fail one call and not the next.
    # Half a second for a gigabyte that is in the page cache.
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        error = sqlite3.DatabaseError(found.replace("\n", " "))
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error


@contextmanager
def _unwritable_reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise Unavailable(
            Reason.STORAGE_BUSY,
            f"the data folder {folder} cannot be written ({error.strerror}): give it to the user "
            "that the server runs as, mount it writable, or name another with --data-dir",
        ) from error
