"""Files that outlive a power cut: written under another name, flushed, then renamed."""

import ctypes
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.storage import storage_errors

_CHUNK_BYTES = 2**20
_libc = ctypes.CDLL(None, use_errno=True)


def copy(source: Path, target: Path) -> str:
    """Copies a file, flushes it, and returns the sha256 of what was written."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """The sha256 of a file, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(folder: Path) -> None:
    """Makes a folder, and those around it, that outlive a power cut with what is flushed in them.

    One that is there stays as it is.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder: after it, a rename in there is final."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """Flushes everything below a folder.

    By one syncfs(2), since a flush per image takes minutes for a large dataset.
    """
    if not hasattr(_libc, "syncfs"):
        os.sync()
        return
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(file) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(file)


@contextmanager
def full_disk_told() -> Iterator[None]:
    """Turns the OSError of a full disk into Exhausted (STORAGE_FULL).

    And that of a read-only one into Unavailable (STORAGE_BUSY).
    """
    try:
        yield
    except OSError as error:
        if (told := storage_errors.of_system(error)) is None:
            raise
        raise told from error
