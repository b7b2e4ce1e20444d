"""Features of images, kept between jobs in one SQLite file.

A row's key is a space (whose it is, and what computed it) and an image (its digest,
and its view). Nobody finds, by rows or by time, which images other owners have.
Any number of processes may share the file. Bounded in bytes: what was not asked for
the longest leaves. Whatever is wrong with the file, jobs go on without it: a
damaged one is thrown away, and no row is given whose checksum does not fit.
"""

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np

from service.engine.head import Floats
from service.errors import Reason, Unavailable

BUSY_S = 2.0
"""Longest wait for another process's write, before the job goes on without the cache."""
_FORGET_S = 10.0
"""Longest wait to forget an image, which must not be passed over."""
_FORMAT = 1
_FRESH_S = 3600.0
"""A row that was used so lately is not noted as used again: repeated jobs write nothing."""
_ROOM = 0.9
"""Of the bound: what is left after rows left, so that they do not leave at every write."""
_ROW_BYTES = 200
"""Of a row beside its features: keys and indexes."""
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}

_SCHEMA = f"""
    BEGIN IMMEDIATE;
    CREATE TABLE IF NOT EXISTS spaces (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE IF NOT EXISTS rows (
        id INTEGER PRIMARY KEY,
        space INTEGER NOT NULL,
        image TEXT NOT NULL,
        used_s INTEGER NOT NULL,
        UNIQUE (space, image)
    );
    CREATE INDEX IF NOT EXISTS rows_by_use ON rows (used_s);
    -- Apart from the rows, so that noting a use rewrites no features.
    CREATE TABLE IF NOT EXISTS features (
        id INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, data BLOB NOT NULL
    );
    PRAGMA user_version = {_FORMAT};
    COMMIT;
"""

_FIND = """
    SELECT rows.id, image, used_s, checksum, data
    FROM rows JOIN features ON features.id = rows.id
    WHERE space = (SELECT id FROM spaces WHERE name = ?)
    AND image IN (SELECT value FROM json_each(?))
"""


class FeatureCache:
    """One file, opened at its first use; may be shared by threads.

    Finds and keeps the rows of `owner` alone. `note` gets a sentence for people when
    the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        owner: str = "",
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._note = note
        self._clock = clock
        self._owner = f"{owner}/" if owner else ""
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._is_off = False

    def get(self, space: str, images: Sequence[str]) -> dict[str, Floats]:
        """The features that are kept, float32 [d], by image; those of others are absent."""
        found: dict[str, Floats] = {}
        space = self._owner + space
        with self._usable() as connection:
            if connection is None:
                return {}
            stale: list[tuple[int, int]] = []
            now = int(self._clock())
            rows = connection.execute(_FIND, (space, json.dumps(list(images))))
            for row, image, used_s, checksum, data in rows:
                if _checksum(space, image, data) != checksum:
                    continue  # computed again, and written over
                found[image] = np.frombuffer(data, dtype="<f4")
                if now - used_s > _FRESH_S:
                    stale.append((now, row))
            if stale:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.executemany("UPDATE rows SET used_s = ? WHERE id = ?", stale)
        return found

    def put(self, space: str, features: Mapping[str, Floats]) -> None:
        """Keeps features, float32 [d], by image, in one transaction."""
        space = self._owner + space
        rows = [(p, np.ascontiguousarray(f, "<f4").tobytes()) for p, f in features.items()]
        room = self._max_bytes * _ROOM
        fitting = []
        for image, data in rows:
            room -= len(data) + _ROW_BYTES
            if room < 0:
                break
            fitting.append((image, data))
        if not fitting:
            return
        with self._usable() as connection:
            if connection is None:
                return
            now = int(self._clock())
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("INSERT OR IGNORE INTO spaces (name) VALUES (?)", (space,))
                (space_id,) = connection.execute(
                    "SELECT id FROM spaces WHERE name = ?", (space,)
                ).fetchone()
                self._make_room(connection, sum(len(data) + _ROW_BYTES for _, data in fitting))
                for image, data in fitting:
                    (row,) = connection.execute(
                        "INSERT INTO rows (space, image, used_s) VALUES (?, ?, ?)"
                        " ON CONFLICT DO UPDATE SET used_s = excluded.used_s RETURNING id",
                        (space_id, image, now),
                    ).fetchone()
                    connection.execute(
                        "INSERT OR REPLACE INTO features (id, checksum, data) VALUES (?, ?, ?)",
                        (row, _checksum(space, image, data), data),
                    )

    def close(self) -> None:
        """Closes the file; later calls find and keep nothing."""
        with self._lock:
            self._is_off = True
            self._disconnect()

    def _make_room(self, connection: sqlite3.Connection, coming: int) -> None:
        page, count, free = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        used = page * (count - free)
        if used + coming <= self._max_bytes:
            return
        (rows,) = connection.execute("SELECT COUNT(*) FROM rows").fetchone()
        excess = used + coming - self._max_bytes * _ROOM
        leaving = min(rows, int(rows * excess / used) + 1)
        ids = connection.execute(
            "SELECT id FROM rows ORDER BY used_s, id LIMIT ?", (leaving,)
        ).fetchall()
        connection.executemany("DELETE FROM rows WHERE id = ?", ids)
        connection.executemany("DELETE FROM features WHERE id = ?", ids)

    @contextmanager
    def _usable(self) -> Iterator[sqlite3.Connection | None]:
        """The connection, or None where there is none; ends its use when it fails."""
        with self._lock:
            connection = None
            try:
                connection = self._connected()
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
            try:
                yield connection
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)

    def _connected(self) -> sqlite3.Connection | None:
        if self._is_off or self._connection is not None:
            return self._connection
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        self._connection = connection
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _FORMAT:
            if version != 0:
                raise _OtherFormat(f"its format is {version}, not {_FORMAT}")
            self._write_ahead(connection)
            connection.executescript(_SCHEMA)
        # A cache: what the last moments before a power cut wrote may be lost.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {min(self._max_bytes, 2**26)}")
        return connection

    def _write_ahead(self, connection: sqlite3.Connection) -> None:
        """So that readers wait for no writer; two that open a new file at once take turns."""
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                # SQLite itself does not wait here.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    def _give_up(self, error: Exception) -> None:
        self._is_off = True
        self._disconnect()
        code = getattr(error, "sqlite_errorcode", None)
        if isinstance(error, _OtherFormat) or (code is not None and code & 0xFF in _DAMAGED):
            for suffix in ("", "-wal", "-shm"):
                # Another process may have been faster; one that may not, leaves it.
                with suppress(OSError):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            self._note(
                f"the cache of features was damaged and was thrown away ({error}): features are "
                "computed again"
            )
            return
        self._note(f"the cache of features cannot be used ({error}): the job goes on without it")

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


class _OtherFormat(sqlite3.Error):
    pass


def forget(path: Path, owner: str, image_digest: str) -> None:
    """Deletes the features of an image and of its views that an owner keeps in a file.

    Where there is no file, or one that is damaged and will be thrown away, there is nothing to
    forget. Raises Unavailable (STORAGE_BUSY) where jobs hold the file for too long.
    """
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=_FORGET_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            spaces = connection.execute("SELECT id, name FROM spaces").fetchall()
            connection.execute("BEGIN IMMEDIATE")
            for space, name in spaces:
                # What is before the owner's slash in the first word.
                if name.partition(" ")[0].rpartition("/")[0] != owner:
                    continue
                ids = connection.execute(
                    "DELETE FROM rows WHERE space = ? AND image >= ? AND image < ? RETURNING id",
                    (space, image_digest, f"{image_digest}!"),
                ).fetchall()
                connection.executemany("DELETE FROM features WHERE id = ?", ids)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        if (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF in _DAMAGED:
            return
        raise Unavailable(
            Reason.STORAGE_BUSY,
            f"the cache of features cannot be changed just now ({error}): try again",
            retry_after_s=_FORGET_S,
        ) from error


# Over the key too: a row under another's name is as wrong as one with wrong bits.
def _checksum(space: str, image: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(f"{space}\0{image}".encode()))
