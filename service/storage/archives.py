"""Unpacks tar, tar.gz and zip archives that strangers sent.

Only plain files are written, only below the folder given, and only as many
bytes and files as allowed: counted while they are written, since what an
archive says of itself may be a lie. Names are checked before anything is
written for them; links, devices and names that lead elsewhere refuse the whole
archive. Hidden files and `__MACOSX` are left out. Knows nothing of images.
"""

import errno
import gzip
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from service.errors import InvalidInput, Reason
from service.storage import durable
from service.storage.entry_names import is_left_out, parts_of, shown
from service.storage.guarded import Guarded, TooLarge

ArchiveFormat = Literal["", "tar", "tar.gz", "zip"]
"""Empty means told from the first bytes."""

_CHUNK_BYTES = 2**18
_FOLDER_BYTES = 4096
"""What a folder takes on disk, at least."""
_MAX_RATIO = 200
"""Images are compressed already; only a bomb shrinks like this."""
_RATIO_FREE_BYTES = 64 * 2**20
_HEADER_BYTES = 4096
"""Of an entry, generously; what a tar may have besides the content of its files."""
_MAX_GLOBAL_RECORDS = 64
"""Of pax headers for all entries: tarfile copies them to each."""
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    # What the parsers raise for headers that make no sense.
    ValueError,
    OverflowError,
    LookupError,
    RuntimeError,
    NotImplementedError,
    struct.error,
)


@dataclass(frozen=True)
class Limits:
    """What a dataset may cost."""

    max_upload_bytes: int
    max_unpacked_bytes: int
    max_files: int


@dataclass(frozen=True)
class _Entry:
    name: str
    is_folder: bool
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    into: Path,
    archive_format: ArchiveFormat,
    limits: Limits,
    check: Callable[[], None],
    check_room: Callable[[int], None] | None = None,
) -> None:
    """Unpacks into an empty folder; what is there after an error is to be thrown away.

    `check` is called often and may raise to stop, `check_room` with the bytes that are
    unpacked so far. Raises InvalidInput with
    ARCHIVE_UNSAFE, ARCHIVE_TOO_LARGE or ARCHIVE_UNREADABLE, or Exhausted
    (STORAGE_FULL).
    """
    kind = _format_of(archive, archive_format)
    entries = _zip_entries if kind == "zip" else _tar_entries
    writer = _Writer(into, limits, archive.stat().st_size, check, check_room)
    try:
        with durable.full_disk_told():
            for entry in entries(archive, kind, limits):
                writer.take(entry)
    except TooLarge as error:
        raise InvalidInput(Reason.ARCHIVE_TOO_LARGE, str(error)) from error
    except _DAMAGED as error:
        raise _unreadable(f"the archive is damaged or truncated ({error})") from error


class _Writer:
    """Writes entries below a folder and counts what they cost."""

    def __init__(
        self,
        into: Path,
        limits: Limits,
        packed_bytes: int,
        check: Callable[[], None],
        check_room: Callable[[int], None] | None,
    ) -> None:
        self._into = into
        self._limits = limits
        self._check = check
        self._check_room = check_room
        self._made = 0
        """Entries, and folders that none of them was."""
        self._bytes = 0
        self._by_ratio = max(packed_bytes * _MAX_RATIO, _RATIO_FREE_BYTES)

    def take(self, entry: _Entry) -> None:
        self._check()
        self._count_one()
        parts = parts_of(entry.name)
        if not parts or is_left_out(parts):
            return
        target = self._into.joinpath(*parts)
        try:
            if entry.is_folder:
                self._make_folder(target, is_entry=True)
                return
            self._make_folder(target.parent)
            # Where a name comes twice the last one counts, as tar has it.
            with entry.open() as reader, target.open("wb") as writer:
                while chunk := reader.read(_CHUNK_BYTES):
                    self._count(len(chunk))
                    writer.write(chunk)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _unreadable(
                f"{shown(entry.name)} is a file and a folder at once, or lies below a file"
            ) from None
        except OSError as error:
            # The store's own folder may lie deep, and some file systems take less than most.
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise _unreadable(
                f"{shown(entry.name)} is a longer name than this server's disk takes: shorten it"
            ) from None

    def _make_folder(self, folder: Path, *, is_entry: bool = False) -> None:
        if folder.is_dir():
            return
        # Each by itself: a name of many parts costs as many folders.
        self._make_folder(folder.parent)
        if not is_entry:
            self._count_one()
        self._count(_FOLDER_BYTES)
        folder.mkdir()

    def _count_one(self) -> None:
        self._made += 1
        if self._made > self._limits.max_files:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the archive holds more than {self._limits.max_files} files and folders, the most "
                "allowed: send fewer images",
            )

    def _count(self, more: int) -> None:
        self._check()
        self._bytes += more
        if self._check_room is not None:
            self._check_room(self._bytes)
        if self._bytes > self._limits.max_unpacked_bytes:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the archive unpacks to more than {self._limits.max_unpacked_bytes} bytes, the "
                "most allowed: send fewer or smaller images",
            )
        if self._bytes > self._by_ratio:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the archive unpacks to more than {_MAX_RATIO} times its size, which images "
                "never do: send the images as they are",
            )


def _format_of(archive: Path, said: ArchiveFormat) -> Literal["tar", "tar.gz", "zip"]:
    with archive.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    found: ArchiveFormat = ""
    if start[:2] == b"\x1f\x8b":
        found = "tar.gz"
    elif start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        found = "zip"
    elif start[257:262] == b"ustar" or (said in ("", "tar") and _is_old_tar(start)):
        found = "tar"
    if not found:
        raise _unreadable("the bytes are no tar, tar.gz or zip archive: send one of these")
    if said and said != found:
        raise _unreadable(f"the archive was said to be a {said} and is a {found}: say what it is")
    return found


def _is_old_tar(block: bytes) -> bool:
    # From before "ustar"; the header's checksum tells it from anything else.
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _tar_entries(archive: Path, kind: str, limits: Limits) -> Iterator[_Entry]:
    with archive.open("rb") as packed:
        plain = gzip.GzipFile(fileobj=packed) if kind == "tar.gz" else packed
        # Bounds what is read for entries that are skipped, too.
        longest = limits.max_unpacked_bytes + limits.max_files * _HEADER_BYTES + 2**20
        stream = Guarded(plain, longest)
        with stream.one_header():  # the first, which it reads at once
            tar = tarfile.open(fileobj=stream, mode="r:", encoding="utf-8")  # noqa: SIM115
        with tar:
            while (info := _next(tar, stream)) is not None:
                if info.size < 0:
                    raise tarfile.ReadError("an entry has a size below 0")
                if not (info.isreg() or info.isdir()):
                    raise _unsafe(info.name, "is a link, a device or a pipe")
                if info.issparse():
                    raise _unreadable(
                        f"{shown(info.name)} is a sparse file: pack it without --sparse"
                    )
                yield _Entry(info.name, info.isdir(), partial(_content, tar, info))
            # tarfile takes a damaged header in the middle for the end.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without an end mark")
            # To the end, so that gzip compares its checksum.
            while stream.read(_CHUNK_BYTES):
                pass


def _next(tar: tarfile.TarFile, stream: Guarded) -> tarfile.TarInfo | None:
    with stream.one_header():
        info = tar.next()
    # Or it remembers them all.
    tar.members.clear()  # type: ignore[attr-defined]
    if len(tar.pax_headers) > _MAX_GLOBAL_RECORDS:
        raise tarfile.ReadError("its global headers are too many")
    return info


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "a plain file has content"
    return file


def _zip_entries(archive: Path, _kind: str, limits: Limits) -> Iterator[_Entry]:
    with archive.open("rb") as packed:
        stream = Guarded(packed, None, max_entries=limits.max_files)
        with zipfile.ZipFile(stream) as container:
            for info in container.infolist():
                # `filename` ends at a NUL; the name that was sent may not.
                name = info.orig_filename
                mode = info.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _unsafe(name, "is a link, a device or a pipe")
                if info.flag_bits & 0x1:
                    raise _unreadable(f"{shown(name)} is encrypted: send it without a password")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise _unreadable(
                        f"{shown(name)} is packed in a way that is not read here: use deflate"
                    )
                yield _Entry(name, name.endswith("/"), partial(container.open, info))


def _unsafe(name: str, what: str) -> InvalidInput:
    return InvalidInput(
        Reason.ARCHIVE_UNSAFE, f"{shown(name)} {what}: send plain files and folders alone"
    )


def _unreadable(what: str) -> InvalidInput:
    return InvalidInput(Reason.ARCHIVE_UNREADABLE, what)
