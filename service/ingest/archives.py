"""Unpacks tar, tar.gz and zip archives that strangers sent.

The bytes of all its plain files are appended to one, so that no name of an archive is ever one
of the disk's, and only as many bytes and files as allowed: counted while they are written, since
what an archive says of itself may be a lie. Names that lead elsewhere refuse the whole
archive; links, devices, and what is hidden or a system's are entries without bytes. Knows
nothing of images.
"""

import gzip
import os
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

import msgspec

from service.errors import InvalidInput, Reason
from service.ingest.guarded import Guarded, TooLarge
from service.ingest.layout import Entry, Kind, Name, is_noise
from service.ingest.names import parts_of, shown
from service.ingest.packs import Location

ArchiveFormat = Literal["", "tar", "tar.gz", "zip"]
"""Empty means told from the first bytes."""

FILE_BYTES = 1024
"""Counted for each file beside its bytes: its header in a pack, what fills its last block there,
and its line of the index."""
_CHUNK_BYTES = 2**18
_MAX_RATIO = 200
"""Images are compressed already; only a bomb shrinks like this."""
_RATIO_FREE_BYTES = 64 * 2**20
_HEADER_BYTES = 4096
"""Of an entry, generously; what a tar may have besides the content of its files."""
_UTF8_FLAG = 0x800
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


class Limits(msgspec.Struct, frozen=True):
    """Limits on what a dataset may cost: bytes uploaded, bytes unpacked, files.

    Each file counts FILE_BYTES beside its own.
    """

    max_upload_bytes: int
    max_unpacked_bytes: int
    max_files: int


@dataclass(frozen=True)
class _Packed:
    name: str
    kind: Kind
    open: Callable[[], IO[bytes]]


def unpack(
    archive: IO[bytes],
    into: Path,
    archive_format: ArchiveFormat,
    limits: Limits,
    check: Callable[[], None],
    check_room: Callable[[int], None],
) -> list[Entry]:
    """Unpacks into a new file; what is there after an error is to be thrown away.

    Where a name comes twice the last one counts, as tar has it. `check` is called often and
    may raise to stop, `check_room` with the bytes that are unpacked so far. Raises
    InvalidInput with ARCHIVE_UNSAFE, ARCHIVE_TOO_LARGE or ARCHIVE_UNREADABLE, or OSError.
    """
    kind = _format_of(archive, archive_format)
    packed = _zip_entries if kind == "zip" else _tar_entries
    packed_bytes = os.fstat(archive.fileno()).st_size
    try:
        with into.open("xb") as file:
            writer = _Writer(into, file, limits, packed_bytes, check, check_room)
            for entry in packed(archive, kind, limits):
                writer.take(entry)
    except TooLarge as error:
        raise InvalidInput(Reason.ARCHIVE_TOO_LARGE, str(error)) from error
    except _DAMAGED as error:
        raise _unreadable(f"the archive is damaged or truncated ({error})") from error
    return [*writer.entries.values(), *writer.replaced]


class _Writer:
    """Writes the bytes of entries one after the other, and counts what they cost."""

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        limits: Limits,
        packed_bytes: int,
        check: Callable[[], None],
        check_room: Callable[[int], None],
    ) -> None:
        self._path, self._file = path, file
        self._limits = limits
        self._check = check
        self._check_room = check_room
        self.entries: dict[Name, Entry] = {}
        self.replaced: list[Entry] = []
        self._count_entries = 0
        self._content_bytes = self._bytes = 0
        """Of files' content, and with what else they take on disk."""
        self._by_ratio = max(packed_bytes * _MAX_RATIO, _RATIO_FREE_BYTES)

    def take(self, packed: _Packed) -> None:
        self._check()
        self._count_entries += 1
        if self._count_entries > self._limits.max_files:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the archive holds more than {self._limits.max_files} files and folders, the most "
                "allowed: send fewer images",
            )
        name = parts_of(packed.name)
        if not name:
            return
        before = self.entries.get(name)
        if packed.kind is not Kind.FILE or is_noise(name):
            self.entries[name] = Entry(name, packed.kind)
        else:
            self.entries[name] = Entry(name, Kind.FILE, self._written(packed))
        if before is not None and before.kind is not Kind.FOLDER:
            self.replaced.append(Entry(name, Kind.REPLACED))

    def _written(self, packed: _Packed) -> Location:
        self._count(FILE_BYTES)
        start = self._content_bytes
        with packed.open() as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                self._content_bytes += len(chunk)
                self._count(len(chunk))
                self._file.write(chunk)
        return Location(self._path, start, self._content_bytes - start)

    def _count(self, more: int) -> None:
        self._check()
        self._bytes += more
        self._check_room(self._bytes)
        if self._bytes > self._limits.max_unpacked_bytes:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the archive unpacks to more than {self._limits.max_unpacked_bytes} bytes, the "
                f"most allowed, where each file counts {FILE_BYTES} beside its own: send fewer or "
                "smaller images",
            )
        if self._content_bytes > self._by_ratio:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the archive unpacks to more than {_MAX_RATIO} times its size, which images "
                "never do: send the images as they are",
            )


def _format_of(archive: IO[bytes], said: ArchiveFormat) -> Literal["tar", "tar.gz", "zip"]:
    start = archive.read(tarfile.BLOCKSIZE)
    archive.seek(0)
    found: ArchiveFormat = ""
    if start[:2] == b"\x1f\x8b":
        found = "tar.gz"
    elif start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        found = "zip"
    elif start[257:262] == b"ustar" or (said in ("", "tar") and _is_old_tar(start)):
        found = "tar"
    if not found:
        raise _unreadable("the bytes are not a tar, tar.gz or zip archive: send one of these")
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


def _tar_entries(packed: IO[bytes], kind: str, limits: Limits) -> Iterator[_Packed]:
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
            if info.issparse():
                raise _unreadable(f"{shown(info.name)} is a sparse file: pack it without --sparse")
            yield _Packed(info.name, _kind(info), partial(_content, tar, info))
        # tarfile takes a damaged header in the middle for the end.
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it ends without an end mark")
        # To the end, so that gzip compares its checksum.
        while stream.read(_CHUNK_BYTES):
            pass


def _kind(info: tarfile.TarInfo) -> Kind:
    if info.isreg():
        return Kind.FILE
    if info.isdir():
        return Kind.FOLDER
    return Kind.LINK if info.issym() or info.islnk() else Kind.OTHER


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


def _zip_entries(packed: IO[bytes], _kind: str, limits: Limits) -> Iterator[_Packed]:
    stream = Guarded(packed, None, max_entries=limits.max_files)
    with zipfile.ZipFile(stream) as container:
        for info in container.infolist():
            name = _zip_name(info)
            if info.flag_bits & 0x1:
                raise _unreadable(f"{shown(name)} is encrypted: send it without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _unreadable(
                    f"{shown(name)} is packed in a way that is not read here: use deflate"
                )
            yield _Packed(name, _zip_kind(info, name), partial(container.open, info))


def _zip_kind(info: zipfile.ZipInfo, name: str) -> Kind:
    match stat.S_IFMT(info.external_attr >> 16):
        case 0 | stat.S_IFREG | stat.S_IFDIR:
            return Kind.FOLDER if name.endswith("/") else Kind.FILE
        case stat.S_IFLNK:
            return Kind.LINK
    return Kind.OTHER


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Returns an entry's name with '/' between folders, as Windows does not always write it.

    Raises InvalidInput for folders in letters of an encoding that the archive does not name.
    """
    # `filename` ends at a NUL; the name that was sent may not.
    name = info.orig_filename
    if info.flag_bits & _UTF8_FLAG or name.isascii():
        return name.replace("\\", "/")
    # zipfile takes the bytes for the code page of the first PCs; macOS writes UTF-8 unflagged.
    raw = name.encode("cp437")
    try:
        return raw.decode().replace("\\", "/")
    except UnicodeDecodeError:
        pass
    folders, slash, file = name.rpartition("/")
    if not folders.isascii() or "\\" in name:
        raise _unreadable(
            f"the name {shown(name)} is in an encoding that the archive does not name: pack the "
            "images with names in UTF-8, or with plain letters"
        )
    return f"{folders}{slash}{file}"


def _unreadable(what: str) -> InvalidInput:
    return InvalidInput(Reason.ARCHIVE_UNREADABLE, what)
