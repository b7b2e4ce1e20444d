"""Packs: the bytes of many images in one file, a plain uncompressed tar.

A pack says only where bytes lie: which images a dataset has, in which order and classes, is
its index's to say, and several indexes may share a pack. Members are named by their sha256.
"""

import hashlib
import tarfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
"""The mark at the end of a tar; other programs may fill the last 10 KiB, which nothing needs."""


class Location(NamedTuple):
    """Bytes in a file: `size` of them from `offset` on, or all of it where `size` is -1."""

    path: Path
    offset: int = 0
    size: int = -1


class PackWriter:
    """Writes a pack, and computes the sha256 of the file meanwhile; closed at the end of `with`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, digest: str, data: bytes) -> int:
        """Appends an image; returns the offset of its bytes."""
        info = tarfile.TarInfo(digest)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._offset
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    def finish(self) -> str:
        """Ends the pack and flushes it; returns its sha256, lower-case hex."""
        self._write(_END)
        self._file.flush()
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def members(path: Path) -> Iterator[tuple[str, Location]]:
    """Yields the digest of each image of a pack, and where its bytes lie.

    Raises OSError, and ValueError for a file that is not a whole pack.
    """
    with path.open("rb") as file:
        offset = 0
        while (block := file.read(_BLOCK)) != _END[:_BLOCK]:
            try:
                info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            except tarfile.HeaderError as error:
                raise ValueError(f"it is not a pack: at byte {offset} is not a header") from error
            offset += _BLOCK
            yield info.name, Location(path, offset, info.size)
            offset += -(-info.size // _BLOCK) * _BLOCK
            file.seek(offset)


def without(
    source: Path, target: Path, left_out: Container[str], go_on: Callable[[], None]
) -> tuple[str, dict[str, int]]:
    """Writes a pack again without some of its images; returns its sha256 and the new offsets.

    `go_on` is called for each image and may raise to stop. Raises as `members`.
    """
    offsets: dict[str, int] = {}
    with source.open("rb") as file, PackWriter(target) as writer:
        for digest, at in members(source):
            go_on()
            if digest not in left_out:
                file.seek(at.offset)
                offsets[digest] = writer.add(digest, file.read(at.size))
        return writer.finish(), offsets
