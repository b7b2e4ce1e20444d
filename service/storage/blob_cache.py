"""Blobs as files of this machine.

Where the store is a folder of this machine, its own files are read in place, and nothing is
copied. Of a remote store, or a folder that is slow, the `BlobCache` keeps what was used last:
bounded in bytes, each fetched once however many ask, checked while it is fetched, once after a
start, and whenever it is read whole. A file that is damaged is a miss: it is fetched again, once.
"""

import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from service.storage import fsync
from service.storage.blobs import Blob, BlobStore, DigestMismatch


class InPlace:
    """Reads the files of a store that is a folder of this machine."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def read(self, blob: Blob) -> bytes:
        """Reads and checks a whole blob; one that is damaged is set aside."""
        content = self._path(blob).read_bytes()
        try:
            _check(content, blob.digest)
        except DigestMismatch:
            with suppress(OSError):
                self._store.set_aside(blob.name)
            raise
        return content

    @contextmanager
    def files(self, blobs: Iterable[Blob]) -> Iterator[dict[str, Path]]:
        """Yields the files themselves: whoever reads one checks it."""
        found = {blob.digest: self._path(blob) for blob in blobs}
        for path in found.values():
            path.stat()
        yield found

    def held(self) -> list[str]:
        """Returns nothing: there are no copies."""
        return []

    def drop(self, digests: Iterable[str]) -> None:
        """Does nothing, since nothing is held."""

    def _path(self, blob: Blob) -> Path:
        path = self._store.path(blob.name)
        assert path is not None, "the store is remote"
        return path


class BlobCache:
    """The blobs that this machine used last, at most `max_bytes` of what nobody uses now."""

    def __init__(self, store: BlobStore, folder: Path, max_bytes: int) -> None:
        """Starts with what an earlier process left in `folder`, which is this process' alone."""
        self._store = store
        self._folder = folder
        self._max_bytes = max_bytes
        self._guard = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Bytes by digest, the least recently used first."""
        self._unchecked: set[str] = set()
        """Digests of files of an earlier process that nobody has used since."""
        self._in_use: Counter[str] = Counter()
        self._fetching: dict[str, Future[None]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in folder.iterdir():
            if path.suffix:
                path.unlink()  # was being fetched
            else:
                found.append((path.stat().st_mtime, path.name, path.stat().st_size))
        self._sizes.update((name, size) for _, name, size in sorted(found))
        self._unchecked.update(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        with self._guard:
            return sum(self._sizes.values())

    def read(self, blob: Blob) -> bytes:
        """Reads a whole blob and checks it; one that is damaged here is fetched again, once."""
        with self.files([blob]) as files:
            content = files[blob.digest].read_bytes()
        try:
            _check(content, blob.digest)
        except DigestMismatch:
            self._drop(blob.digest)
        else:
            return content
        with self.files([blob]) as files:
            content = files[blob.digest].read_bytes()
        _check(content, blob.digest)
        return content

    @contextmanager
    def files(self, blobs: Iterable[Blob]) -> Iterator[dict[str, Path]]:
        """Yields the files of blobs, fetched where they are not here; they stay until the end.

        Raises FileNotFoundError, DigestMismatch when the store's own object is damaged, OSError.
        """
        wanted = {blob.digest: blob for blob in blobs}
        with self._guard:
            self._in_use.update(wanted.keys())
        try:
            for blob in wanted.values():
                self._have(blob)
            yield {digest: self._folder / digest for digest in wanted}
        finally:
            with self._guard:
                self._in_use -= Counter(wanted.keys())
                self._evict()

    def held(self) -> list[str]:
        """Returns the digests of all that is here."""
        with self._guard:
            return list(self._sizes)

    def drop(self, digests: Iterable[str]) -> None:
        """Deletes files that are here and that nobody uses now."""
        for digest in digests:
            with self._guard:
                if not self._in_use[digest]:
                    self._delete(digest)

    def _have(self, blob: Blob) -> None:
        digest = blob.digest
        if not self._is_whole(blob):
            self._drop(digest)
        with self._guard:
            if digest in self._sizes:
                self._sizes.move_to_end(digest)
                return
            fetching = self._fetching.get(digest)
            is_mine = fetching is None
            if fetching is None:
                fetching = self._fetching[digest] = Future()
        if not is_mine:
            fetching.result()
            return
        try:
            size = self._fetch(blob)
        except BaseException as error:
            with self._guard:
                del self._fetching[digest]
            fetching.set_exception(error)
            raise
        with self._guard:
            del self._fetching[digest]
            self._sizes[digest] = size
            self._evict()
        fetching.set_result(None)

    def _is_whole(self, blob: Blob) -> bool:
        """Tells whether a file that is here is not obviously damaged; True where there is none."""
        path = self._folder / blob.digest
        with self._guard:
            if blob.digest not in self._sizes:
                return True
            is_checked = blob.digest not in self._unchecked
        try:
            if path.stat().st_size != blob.size_bytes:
                return False
            if not is_checked and fsync.digest_of(path) != blob.digest:
                return False
        except OSError:
            return False
        with self._guard:
            self._unchecked.discard(blob.digest)
        return True

    def _fetch(self, blob: Blob) -> int:
        actual = ""
        # The first may have been damaged on its way.
        for _ in range(2):
            temporary = self._folder / f"{blob.digest}.{secrets.token_hex(4)}"
            try:
                actual = self._store.get(blob.name, temporary)
                if actual == blob.digest:
                    temporary.rename(self._folder / blob.digest)
                    return (self._folder / blob.digest).stat().st_size
            finally:
                temporary.unlink(missing_ok=True)
        raise DigestMismatch(blob.digest, actual)

    def _drop(self, digest: str) -> None:
        with self._guard:
            self._delete(digest)

    def _delete(self, digest: str) -> None:
        self._sizes.pop(digest, None)
        self._unchecked.discard(digest)
        # Whoever has it open reads on.
        (self._folder / digest).unlink(missing_ok=True)

    def _evict(self) -> None:
        spare = [digest for digest in self._sizes if not self._in_use[digest]]
        nbytes = sum(self._sizes[digest] for digest in spare)
        for digest in spare:
            if nbytes <= self._max_bytes:
                return
            nbytes -= self._sizes.pop(digest)
            (self._folder / digest).unlink(missing_ok=True)


def _check(content: bytes, digest: str) -> None:
    if (actual := sha256(content).hexdigest()) != digest:
        raise DigestMismatch(digest, actual)
