"""Finds the images that a command names: files, folders, lists of paths, standard input."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from graftml._images import MAX_IMAGE_BYTES
from graftml.cli._output import Usage
from graftml.errors import InvalidArgument, Reason, invalid

STDIN: Final = "-"

SUFFIXES: Final = frozenset({
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg",
    ".png", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Of the formats that the service reads; of a folder's files, these are images."""


@dataclass(frozen=True)
class ImageFile:
    """An image that was named, or what keeps it from being read."""

    path: str
    problem: OSError | None = None

    def read(self) -> bytes | InvalidArgument:
        """Returns the image's bytes, or why there are none."""
        try:
            if self.problem is not None:
                raise self.problem
            if self.path == STDIN:
                data = sys.stdin.buffer.read(MAX_IMAGE_BYTES + 1)
            else:
                with Path(self.path).open("rb") as file:
                    data = file.read(MAX_IMAGE_BYTES + 1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return invalid(why, reason=Reason.IMAGE_UNREADABLE)
        if len(data) > MAX_IMAGE_BYTES:
            return invalid(
                f"it takes more than the {MAX_IMAGE_BYTES // 2**20} MiB that can be sent: scale "
                "it down",
                reason=Reason.IMAGE_TOO_LARGE,
            )
        return data


class ImageFiles:
    """Finds images as they are asked for, and counts the files in folders that are none."""

    def __init__(self) -> None:
        self.other_files = 0
        """Files in folders whose suffix is not an image's; hidden ones are passed over."""

    def of(self, paths: list[str], listed_in: str | None) -> Iterator[ImageFile]:
        """Returns the images of files and folders, then those that a file lists.

        Raises Usage where a path that was named does not exist, before anything is read.
        """
        if not paths and listed_in is None:
            raise Usage("name images: files, folders, - for one on standard input, or --files-from")
        if [*paths, listed_in].count(STDIN) > 1:
            raise Usage("- is standard input, which can be read once")
        for path in paths:
            if path != STDIN and not Path(path).exists():
                raise Usage(_missing(path))
        listed: Iterable[str] = () if listed_in is None else _lines(listed_in)
        return self._found(paths, listed)

    def _found(self, paths: list[str], listed: Iterable[str]) -> Iterator[ImageFile]:
        for path in paths:
            yield from [ImageFile(path)] if path == STDIN else self._at(path)
        for path in listed:
            yield from self._at(path)

    def _at(self, path: str) -> Iterator[ImageFile]:
        if not Path(path).is_dir():
            # Here - is a file like any other.
            yield ImageFile(f"./{path}" if path == STDIN else path)
            return
        problems: list[OSError] = []
        for folder, folders, files in os.walk(path, onerror=problems.append):
            yield from _unread(problems)
            # In an order that does not depend on the file system.
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if name.startswith("."):
                    continue
                if Path(name).suffix.lower() in SUFFIXES:
                    yield ImageFile(str(Path(folder, name)))
                else:
                    self.other_files += 1
        yield from _unread(problems)


def _missing(path: str) -> str:
    if "://" in path:
        return f"{path} is not fetched: fetch it first, such as with curl, and name the file or -"
    return f"{path}: no such file or folder"


def _unread(problems: list[OSError]) -> Iterator[ImageFile]:
    while problems:
        error = problems.pop(0)
        yield ImageFile(str(error.filename), error)


def _lines(path: str) -> Iterator[str]:
    """Yields the paths in a file, one a line; blank lines are passed over."""
    if path == STDIN:
        yield from _paths(sys.stdin.buffer)
    else:
        with Path(path).open("rb") as file:
            yield from _paths(file)


def _paths(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        text = os.fsdecode(line.rstrip(b"\r\n"))
        if text.strip():
            yield text
