"""The database: one SQLite file in the data folder, its migrations, its transactions.

Owns the connections and the lock that keeps a second server out of the data
folder. Knows no table; the stores do. One writer at a time, any number of
readers, from any thread. Once the file is found damaged no transaction begins: what
would be acknowledged then is lost when it is restored. The SQL of the stores is plain
enough for PostgreSQL, but for a trigger and a cast in the migrations. Stops with `close`.
"""

import errno
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

from service.errors import Damaged, GraftError, Internal, NotFound, Reason, Unavailable
from service.ops import failpoints
from service.storage import disk_errors, durable

Connection = sqlite3.Connection

BUSY_TIMEOUT_S = 10.0
"""Longest wait while another process holds the database."""
_WRITER_TIMEOUT_S = 30.0
_IDLE_READERS = 8
_LOOK_AGAIN_S = 60.0
"""Between looks through the file for what surprising errors may come of."""
_WHAT_TO_DO = (
    "put the data folder back from a backup, as the runbook says, and keep the damaged one aside"
)

log = logging.getLogger(__name__)


class Database:
    """Transactions on `folder`/graft.sqlite3; the folder is made if need be.

    Raises Unavailable when another server holds the folder or it cannot be written,
    Internal when a newer Graft wrote the database, Damaged when its file is not whole.
    """

    def __init__(
        self,
        folder: Path,
        scripts: Sequence[str] | None = None,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self._folder = folder
        self._busy_timeout_s = busy_timeout_s
        self._path = folder / "graft.sqlite3"
        with _unwritable_told(folder):
            durable.make_folder(folder)
            self._lock_file = _lock(folder)
        self._writing = threading.Lock()
        self._guard = threading.Lock()
        self._readers: list[Connection] = []
        self._after_commit: list[Callable[[], None]] = []
        self._after_rollback: list[Callable[[], None]] = []
        self._is_closed = False
        self._is_damaged = False
        self._look_again_s = 0.0
        try:
            with self._damage_told():
                self._writer = self._connect()
                try:
                    _check(self._writer)
                    _migrate(self._writer, _shipped() if scripts is None else scripts)
                    self._file = _identity(self._path)
                except BaseException:
                    self._writer.close()
                    raise
        except BaseException:
            os.close(self._lock_file)
            raise

    @property
    def is_damaged(self) -> bool:
        """Whether the file was found damaged since it was opened; once it was, it stays so."""
        return self._is_damaged

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """The one write transaction: committed at the end, rolled back on any error.

        Not to be nested. Raises Exhausted (STORAGE_FULL) when the disk is full, Unavailable
        (STORAGE_BUSY) when another process holds the database, and Damaged (STORAGE_DAMAGED)
        when its file is, or was found so before.
        """
        if not self._writing.acquire(timeout=_WRITER_TIMEOUT_S):
            raise disk_errors.busy(_WRITER_TIMEOUT_S)
        try:
            self._check_open()
            self._check_file()
            if self._is_damaged:
                raise disk_errors.damaged()
            self._after_commit.clear()
            self._after_rollback.clear()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                failpoints.reach("database.committing")
                self._writer.execute("COMMIT")
            except BaseException as error:
                # A full disk may have ended the transaction already.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                _follow_up(self._after_rollback)
                if (told := self._told(error, self._writer)) is not None:
                    raise told from error
                raise
            # What is committed stays committed, whatever becomes of the follow-up.
            _follow_up(self._after_commit)
        finally:
            self._writing.release()

    def after_commit(self, action: Callable[[], None]) -> None:
        """Runs `action` once the running transaction is committed, before any other begins.

        To be called inside `transaction()` by its thread. `action` must not open
        a transaction of its own.
        """
        self._after_commit.append(action)

    def after_rollback(self, action: Callable[[], None]) -> None:
        """As `after_commit`, when the transaction fails: what it did outside of the database."""
        self._after_rollback.append(action)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the database and must not write.

        Goes on while another process writes. Raises Damaged (STORAGE_DAMAGED) where the file
        is; what can be read of a damaged one is still answered.
        """
        self._check_file()
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
            if disk_errors.is_read_only(error):
                raise
            if (told := self._told(error, connection)) is not None:
                raise told from error
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
        """Waits for the running transaction, closes, and frees the folder. Twice is harmless."""
        with self._writing, self._guard:
            if self._is_closed:
                return
            self._is_closed = True
            for connection in self._readers:
                connection.close()
            self._writer.close()
            os.close(self._lock_file)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable(
                Reason.SHUTTING_DOWN, "the service is stopping: try again soon", retry_after_s=5.0
            )

    def _check_file(self) -> None:
        # SQLite goes on with a file that has no name any more, and what it takes then is lost
        # with the process; and a reader would make a new one.
        if _identity(self._path) == self._file:
            return
        self._note_damage(sqlite3.DatabaseError("it was removed, replaced or emptied"))
        raise disk_errors.damaged()

    def _reader(self) -> Connection:
        try:
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if (told := self._told(error)) is not None:
                raise told from error
            raise
        return connection

    def _connect(self) -> Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
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

    def _told(
        self, error: BaseException, connection: Connection | None = None
    ) -> GraftError | None:
        is_own = isinstance(error, GraftError)
        if connection and not is_own and not isinstance(error, sqlite3.Error | OSError):
            # What a store decodes may fail for reasons of its own.
            self._suspect(error, connection)
        elif disk_errors.is_damage(error):
            self._note_damage(error)
        # What else goes wrong in a damaged file comes of that, and nothing is surely not there.
        if self._is_damaged and isinstance(error, Exception):
            return disk_errors.damaged() if not is_own or isinstance(error, NotFound) else None
        if isinstance(error, sqlite3.Error):
            return disk_errors.of_database(error, self._folder, self._busy_timeout_s)
        return disk_errors.of_system(error) if isinstance(error, OSError) else None

    def _suspect(self, error: BaseException, connection: Connection) -> None:
        """Looks whether what a row cannot be comes of damage that SQLite passed over."""
        # One that may be SQLite's own words is looked into each time.
        is_due = disk_errors.is_damage(error) or time.monotonic() >= self._look_again_s
        if not isinstance(error, Exception) or not is_due:
            return
        self._look_again_s = time.monotonic() + _LOOK_AGAIN_S
        try:
            _check(connection)
        except (sqlite3.Error, UnicodeDecodeError) as found:
            if disk_errors.is_damage(found):
                self._note_damage(found)

    def _note_damage(self, error: BaseException) -> None:
        with self._guard:
            if self._is_damaged:
                return
            self._is_damaged = True
        log.error(
            "the database %s is damaged (%s): nothing is stored any more, models in memory are "
            "served on; %s",
            self._path,
            error,
            _WHAT_TO_DO,
            exc_info=error,
        )

    @contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if disk_errors.is_damage(error):
                raise Damaged(
                    Reason.STORAGE_DAMAGED,
                    f"the database {self._path} is damaged ({error}): {_WHAT_TO_DO}",
                ) from error
            if (told := self._told(error)) is not None:
                raise told from error
            raise


def known_format() -> int:
    """The format that this Graft brings a database to."""
    return len(_shipped())


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; None where there is none, or nothing in it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None


def _follow_up(actions: Sequence[Callable[[], None]]) -> None:
    for action in actions:
        try:
            action()
        except Exception:
            log.exception("a step after a transaction failed")


def _lock(folder: Path) -> int:
    # Held until the process ends, so a killed server leaves no stale lock.
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
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


def _migrate(connection: Connection, scripts: Sequence[str]) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(scripts):
        raise Internal(
            Reason.INTERNAL,
            f"the database has format {version}, this Graft knows up to {len(scripts)}: run the "
            "newer Graft that wrote it, or restore a backup",
        )
    for number, script in enumerate(scripts[version:], version + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;"
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
def _unwritable_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise Unavailable(
            Reason.STORAGE_BUSY,
            f"the data folder {folder} cannot be written ({error.strerror}): give it to the user "
            "that the server runs as, or mount it writable",
        ) from error
