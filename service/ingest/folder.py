"""Lists folders and opens files that strangers may change meanwhile; follows no link.

A hard link is a file like any other: the operator's file system says who may make them.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from service.errors import InvalidInput, Reason, unusable_dataset
from service.ingest.layout import Entry, Kind, Name, is_noise
from service.ingest.packs import Location

MAX_FILE_BYTES = 64 * 2**20
"""Of an image."""


def walk(root: Path, max_entries: int | None = None) -> list[Entry]:
    """Lists all below a folder, in no order; what is in hidden and system folders is not.

    Raises InvalidInput (DATASET_UNUSABLE) for more than `max_entries`, or where `root` itself
    cannot be read.
    """
    found: dict[Name, Entry] = {}
    # Not by recursion: folders may be nested deeper than Python's stack.
    waiting: list[Name] = [()]
    while waiting:
        above = waiting.pop()
        try:
            inside = _listed(root, above, max_entries)
        except OSError as error:
            if not above:
                raise unusable_dataset(
                    f"the folder cannot be read ({error.strerror}): put it back, or allow the "
                    "server to read it"
                ) from error
            found[above] = Entry(above, Kind.DENIED)
            continue
        found.update((entry.name, entry) for entry in inside)
        _check_count(len(found), max_entries)
        waiting += [
            entry.name
            for entry in inside
            if entry.kind is Kind.FOLDER and not is_noise(entry.name[-1:])
        ]
    return list(found.values())


def _listed(root: Path, above: Name, max_entries: int | None) -> list[Entry]:
    found: list[Entry] = []
    path = root.joinpath(*above)
    # It may have become a link to elsewhere since its own folder was listed.
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if _path_of(handle) != path:
            raise OSError(errno.ELOOP, "it has become a link", str(path))
        with os.scandir(handle) as entries:
            for inner in entries:
                kind = _kind(inner)
                location = Location(path / inner.name) if kind is Kind.FILE else None
                found.append(Entry((*above, inner.name), kind, location))
                _check_count(len(found), max_entries)
    finally:
        os.close(handle)
    return found


def _check_count(count: int, max_entries: int | None) -> None:
    if max_entries is not None and count > max_entries:
        raise unusable_dataset(
            f"the folder holds more than {max_entries} files and folders, the most allowed: use "
            "fewer images"
        )


def _kind(entry: "os.DirEntry[str]") -> Kind:
    if entry.is_symlink():
        return Kind.LINK
    if entry.is_dir(follow_symlinks=False):
        return Kind.FOLDER
    return Kind.FILE if entry.is_file(follow_symlinks=False) else Kind.OTHER


def read_plain(at: Location, root: Path | None = None) -> bytes:
    """Reads a plain file, or its part, as `open_plain`; raises InvalidInput or OSError."""
    with open_plain(at.path, root) as file:
        size = at.size if at.size >= 0 else os.fstat(file.fileno()).st_size
        data = b""
        if size <= MAX_FILE_BYTES:
            file.seek(at.offset)
            # A whole file may have grown since.
            data = file.read(at.size if at.size >= 0 else MAX_FILE_BYTES + 1)
    if max(size, len(data)) > MAX_FILE_BYTES:
        raise InvalidInput(
            Reason.IMAGE_TOO_LARGE, f"the file is larger than {MAX_FILE_BYTES} bytes"
        )
    return data


def open_plain(path: Path, root: Path | None) -> BinaryIO:
    """Opens a plain file, below the real path `root` where one is named; follows no link to it.

    What it is shows once it is open, since it may have changed since it was listed.
    Raises InvalidInput or OSError.
    """
    # A pipe that nobody writes to would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        is_plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        # Not below the root's real path of now: it may have become a link to elsewhere.
        if not is_plain or not (root is None or _path_of(file.fileno()).is_relative_to(root)):
            raise InvalidInput(Reason.IMAGE_UNREADABLE, "it is not a plain file of this folder")
    except BaseException:
        file.close()
        raise
    return file


def _path_of(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()
