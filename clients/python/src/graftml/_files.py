"""Reads files that callers give, and says what a text is that they gave in the place of a path.

Never shows more than the beginning of what was given: it may be megabytes of base64. Writes files
that appear whole or not at all.
"""

import errno
import inspect
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from graftml._display import escaped
from graftml.errors import invalid

_SHOWN: Final = 60
_LONGEST_PATH: Final = 4096
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}=*\s*")
_ENCODED_STARTS: Final = (
    "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "AAAA", "Qk", "UEsDB", "H4sI",
)  # fmt: skip
"""Of JPEG, PNG, GIF, WebP, TIFF, AVIF and HEIC, BMP, zip and gzip, as base64."""
_LONGEST_NAME: Final = 255
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def read_path(path: str | os.PathLike[str], where: str) -> bytes:
    """Reads a file. Raises an OSError that names `where`, or InvalidArgument for no path."""
    with opening(path, where):
        return Path(path).read_bytes()


@contextmanager
def opening(path: str | os.PathLike[str], where: str) -> Iterator[None]:
    """Makes errors about a path say which one it is, or what it is instead of a path."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(path)
        if isinstance(path, str) and (seems := _what_instead(text)) is not None:
            raise invalid(f"{where}: {seems}", where) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(error.errno, f"{error.strerror} ({where})", text) from error
        raise invalid(f"{where}: {shown(text)} is no path ({error})", where) from error


def read_open(file: Any, where: str) -> bytes:
    """Reads what is left of an open file, as one image. Raises InvalidArgument."""
    data = file.read()
    if inspect.iscoroutine(data):
        data.close()
        raise invalid(
            f"{where}: the read() of a {type(file).__name__} is asynchronous: give the bytes, "
            "with await file.read()",
            where,
        )
    if isinstance(data, str):
        raise invalid(f"{where}: the file is opened as text: open it with open(path, 'rb')", where)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise invalid(f"{where}: its read() gives a {type(data).__name__}, not bytes", where)
    if not len(data):
        raise invalid(
            f"{where}: nothing is left to read of it: go back to its beginning with file.seek(0)",
            where,
        )
    return bytes(data)


def is_open_file(given: object) -> bool:
    """Tells whether an object can be read, as what `open` and `io.BytesIO` return."""
    return callable(getattr(given, "read", None))


def plain(name: str) -> str:
    """Escapes what cannot be sent or shown of a file's name, for names that are only shown."""
    return escaped(name)[:_LONGEST_NAME]


def shown(text: str) -> str:
    """Returns the beginning of a text, quoted."""
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _what_instead(text: str) -> str | None:
    if text.startswith("data:"):
        return (
            f"{shown(text)} is a data URI: decode what follows its comma with base64.b64decode, "
            "and give the bytes"
        )
    if _URL.match(text):
        return f"{shown(text)} is a URL, which is not fetched: fetch it, and give the bytes"
    is_no_name = max(map(len, text.split("/"))) > _LONGEST_NAME
    if _BASE64.fullmatch(text) and (text.startswith(_ENCODED_STARTS) or is_no_name):
        return (
            f"{shown(text)} looks like base64: decode it with base64.b64decode, and give the bytes"
        )
    if len(text) > _LONGEST_PATH:
        return f"{shown(text)} is longer than any path: give the bytes of an image file"
    return None


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Writes beside `path`, and renames when all went well; nothing is left otherwise.

    Raises OSError that names `path` or its folder, never the file beside it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder: name a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _renamed(error, path.parent) from error
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == name:
            raise _renamed(error, path) from error
        raise


def _renamed(error: OSError, path: Path) -> OSError:
    # OSError itself chooses the class of the number.
    return OSError(error.errno, error.strerror, str(path))


def _umask() -> int:
    # There is no asking without setting; a file made by another thread in between is private.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
