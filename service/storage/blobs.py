"""Blobs: immutable files by the sha256 of their content, put before the rows that name them.

Owns the table `blobs`. Whoever stores a blob writes an intent row, then the object, then, in the
transaction that writes a row with the digest, `reference`s it; that row's foreign key says for
ever that it is needed. What no row refers to is the `Collector`'s: it deletes the row, then the
object. A row's generation, which never comes again, is part of its object's name: content that is
put again while it is being deleted is another object. So no order of steps, and no death between
two of them, deletes what a row names. Every method may be called from any thread.
"""

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.errors import Exhausted, Reason, Unavailable, unloadable
from service.ops import failpoints
from service.storage import fsync
from service.storage.database import Connection, Database, marks, now_s

_PAGE = 200
_TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
"""Errors which do not mean that the object is damaged."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blob:
    """A stored file."""

    digest: str
    """sha256 of its content, lower-case hex."""
    size_bytes: int
    generation: str = ""
    """Drawn when its row was written; with the digest it names the object."""

    @property
    def name(self) -> str:
        """Returns the object's name."""
        return f"{self.digest}-{self.generation}"


class BlobGone(Unavailable):
    """A blob that was put has been collected before it was referenced: put it again."""

    def __init__(self) -> None:
        super().__init__(
            Reason.STORAGE_BUSY,
            "what was stored was collected before it was used: try again",
            retry_after_s=1.0,
        )


class DigestMismatch(ValueError):  # noqa: N818 - named for what happened
    """The content is not what its digest says."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"the content has sha256 {actual}, not {expected}")


class BlobStore(Protocol):
    """A place for objects by name, none of which is written twice: nothing rests on conditions."""

    def put(self, name: str, path: Path, digest: str) -> None:
        """Stores a file's bytes; raises DigestMismatch for others than the digest's, or OSError."""

    def get(self, name: str, target: Path) -> str:
        """Writes an object to a new file; returns the sha256 of what was written.

        Raises FileNotFoundError where there is none, or OSError.
        """

    def path(self, name: str) -> Path | None:
        """Returns the file in which an object can be read in place; None for a remote store."""

    def size(self, name: str) -> int | None:
        """Returns an object's bytes; None where there is none."""

    def names(self) -> Iterator[str]:
        """Yields the name of every object."""

    def delete(self, name: str) -> None:
        """Deletes an object; one that is not there is fine."""

    def set_aside(self, name: str) -> None:
        """Takes a damaged object out of the way, so that the same content can be put again."""

    def sweep(self, older_than_s: float) -> int:
        """Deletes what puts that never ended left behind; returns how many."""


class BlobFolder:
    """A `BlobStore` in a local folder, which the first put makes: files `ab/NAME`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # On the same file system as what it is renamed to.
        self._temporary = folder / "tmp"
        self._damaged = folder / "damaged"

    def put(self, name: str, path: Path, digest: str) -> None:
        target = self.path(name)
        fsync.make_folder(self._temporary)
        temporary = self._temporary / secrets.token_hex(8)
        try:
            if (actual := fsync.copy(path, temporary)) != digest:
                raise DigestMismatch(digest, actual)
            failpoints.reach("blob.copied")
            fsync.make_folder(target.parent)
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
        fsync.sync_folder(target.parent)

    def get(self, name: str, target: Path) -> str:
        return fsync.copy(self.path(name), target)

    def path(self, name: str) -> Path:
        """Returns an object's file, there or not."""
        return self._folder / name[:2] / name

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self) -> Iterator[str]:
        for folder in sorted(self._folder.glob("[0-9a-f][0-9a-f]")):
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield entry.name

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        """Moves a damaged object into the folder `damaged`, for whoever wants to look at it."""
        self._damaged.mkdir(exist_ok=True)
        self.path(name).replace(self._damaged / name)

    def sweep(self, older_than_s: float) -> int:
        """Deletes temporary files that nobody has written to for so long; returns how many."""
        swept = 0
        for path in self._temporary.glob("*"):
            try:
                if time.time() - path.stat().st_mtime >= older_than_s:
                    path.unlink()
                    swept += 1
            except FileNotFoundError:
                continue  # renamed since
        return swept


class LocalBlobs(Protocol):
    """Blobs as files of this machine; see `blob_cache`."""

    def read(self, blob: Blob) -> bytes:
        """Reads a whole blob and checks it.

        Raises FileNotFoundError where there is none, DigestMismatch for a damaged one, OSError.
        """

    def files(self, blobs: Iterable[Blob]) -> AbstractContextManager[dict[str, Path]]:
        """Yields each blob's file by its digest, kept here until the end; errors as `read`."""

    def held(self) -> list[str]:
        """Returns the digests of the copies that are here."""

    def drop(self, digests: Iterable[str]) -> None:
        """Deletes copies that nobody uses now."""


class Blobs:
    """All blobs."""

    def __init__(
        self,
        database: Database,
        store: BlobStore,
        local: LocalBlobs,
        on_damaged: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_damaged` is called once whenever one is found damaged or missing that was not."""
        self._database = database
        self._store = store
        self._local = local
        self._on_damaged = on_damaged
        self._damaged: set[str] = set()
        """Digests of those that could not be read last."""

    def put(self, path: Path, digest: str = "") -> Blob:
        """Copies one file in, as `put_all`."""
        return self.put_all([(path, digest)])[0]

    def put_all(self, files: Iterable[tuple[Path, str]]) -> list[Blob]:
        """Copies files in, each with its sha256 where it is known ("" where not); in their order.

        One that is there already is not copied again. Raises DigestMismatch, Exhausted
        (STORAGE_FULL) when the disk is full, Unavailable (STORAGE_BUSY) or OSError.
        """
        with fsync.full_disk_told():
            found = [
                (path, Blob(digest or fsync.digest_of(path), path.stat().st_size))
                for path, digest in files
            ]
            intended = self._intend([blob for _, blob in found])
            failpoints.reach("blob.intended")
            for path, blob in found:
                intent = intended[blob.digest]
                if self._store.size(intent.name) != blob.size_bytes:
                    self._store.put(intent.name, path, blob.digest)
                    failpoints.reach("blob.stored")
        return [intended[blob.digest] for _, blob in found]

    def find(self, digest: str) -> Blob | None:
        """Returns a blob that was put before, to be referenced again; None where it has gone."""
        with self._database.transaction() as connection:
            row = connection.execute(
                "UPDATE blobs SET touched_s = ?, doomed_s = NULL WHERE digest = ? RETURNING *",
                (now_s(connection), digest),
            ).fetchone()
        if row is None:
            return None
        blob = _blob(row)
        return blob if self._store.size(blob.name) == blob.size_bytes else None

    def reference(self, connection: Connection, blobs: Iterable[Blob]) -> None:
        """Makes sure, in the transaction that writes rows with their digests, that blobs stay.

        They are those that `put` or `find` returned. Raises BlobGone when one of them has been
        collected since: it is to be put again.
        """
        for blob in dict.fromkeys(blobs):
            row = connection.execute(
                "UPDATE blobs SET touched_s = ?, doomed_s = NULL"
                " WHERE digest = ? AND generation = ? RETURNING digest",
                (now_s(connection), blob.digest, blob.generation),
            ).fetchone()
            if row is None:
                raise BlobGone

    def are_there(self, digests: Iterable[str]) -> set[str]:
        """Returns those of these whose objects are in the store."""
        return {
            blob.digest
            for blob in self._located(digests)
            if self._store.size(blob.name) is not None
        }

    def read(self, digest: str, kind: str) -> bytes:
        """Reads a whole blob, checked; `kind` names it in errors, such as "backbone".

        Raises Damaged (MODEL_UNLOADABLE) when it is missing or damaged, Unavailable
        (STORAGE_BUSY) when it cannot be read just now, or Exhausted (OUT_OF_MEMORY).
        """
        with self._readable(kind, {digest}):
            located = self._located([digest])
            if not located:
                raise FileNotFoundError
            return self._local.read(located[0])

    @contextmanager
    def files(self, digests: Iterable[str], kind: str = "data") -> Iterator[dict[str, Path]]:
        """Yields the files of blobs on this machine, which stay until the end; errors as `read`."""
        wanted = set(digests)
        with ExitStack() as kept:
            with self._readable(kind, wanted):
                blobs = self._located(wanted)
                if len(blobs) < len(wanted):
                    raise FileNotFoundError
                files = kept.enter_context(self._local.files(blobs))
            yield files

    def trim(self) -> None:
        """Deletes this machine's copies of blobs that have been collected."""
        held = self._local.held()
        for start in range(0, len(held), _PAGE):
            page = held[start : start + _PAGE]
            self._local.drop({*page} - {blob.digest for blob in self._located(page)})

    def _located(self, digests: Iterable[str]) -> list[Blob]:
        wanted = list(dict.fromkeys(digests))
        query = f"SELECT * FROM blobs WHERE digest IN ({marks(wanted)})"  # nosec B608  # noqa: S608 - marks
        with self._database.read() as connection:
            return [_blob(row) for row in connection.execute(query, wanted)]

    def _intend(self, blobs: Iterable[Blob]) -> dict[str, Blob]:
        """Writes rows for blobs that are to be put; returns them by digest, with generations."""
        with self._database.transaction() as connection:
            now = now_s(connection)
            rows = [
                connection.execute(
                    "INSERT INTO blobs (digest, size_bytes, generation, touched_s)"
                    " VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE"
                    " SET touched_s = excluded.touched_s, doomed_s = NULL RETURNING *",
                    (blob.digest, blob.size_bytes, secrets.token_hex(4), now),
                ).fetchone()
                for blob in blobs
            ]
        return {row["digest"]: _blob(row) for row in rows}

    @contextmanager
    def _readable(self, kind: str, digests: Collection[str]) -> Iterator[None]:
        try:
            yield
            self._damaged.difference_update(digests)
        except FileNotFoundError as error:
            self._note_damaged(kind, digests, error)
            raise unloadable(kind, "is missing") from error
        except DigestMismatch as error:
            self._note_damaged(kind, digests, error)
            raise unloadable(kind, "is damaged: its content is not what was stored") from error
        except MemoryError as error:
            raise Exhausted(
                Reason.OUT_OF_MEMORY, f"there is no memory to read the {kind}: try again"
            ) from error
        except OSError as error:
            if error.errno in _TRANSIENT:
                raise Unavailable(
                    Reason.STORAGE_BUSY,
                    f"the {kind} could not be read just now ({error.strerror}): try again",
                    retry_after_s=1.0,
                ) from error
            self._note_damaged(kind, digests, error)
            raise unloadable(kind, f"cannot be read ({error.strerror})") from error

    def _note_damaged(self, kind: str, digests: Collection[str], error: Exception) -> None:
        # Once, though every call for it finds it again.
        if not self._damaged.issuperset(digests):
            self._damaged.update(digests)
            self._on_damaged()
            log.error(
                "a stored %s cannot be read",
                kind,
                exc_info=error,
                extra={"digests": sorted(digests)},
            )


def _blob(row: Any) -> Blob:
    return Blob(row["digest"], row["size_bytes"], row["generation"])
