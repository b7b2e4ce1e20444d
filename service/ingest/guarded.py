"""A file that parsers of untrusted archives read through: no huge read, no way back.

tarfile and zipfile believe what headers say: a forged one makes them read
gigabytes at once, seek backwards for ever, or list millions of entries. A pax header
of some kilobytes keeps tarfile's regular expressions busy for hours, or makes a key as
long as itself of its every byte; a list of a sparse file's holes fills the memory.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

_MAX_READ_BYTES = 2**20
_MAX_BACK_BYTES = 1024
"""tarfile steps back by one byte, and to a file's start behind its header."""
_ZIP_ENTRY_MARK = b"PK\x01\x02"
_MAX_ZIP_ENTRY_BYTES = 1024
_BLOCK_BYTES = 512
_PAX_TYPES = (b"x", b"g", b"X")
_NAME_TYPES = (b"L", b"K")
_MAX_LENGTH_DIGITS = 8
_DIGITS = re.compile(rb"[0-9]{64}")
"""No number is as long; what looks for one tries again from each of them."""


class TooLarge(Exception):  # noqa: N818
    """A bound is passed; the message says which."""


class Guarded(io.RawIOBase):
    """Reads `file`, at most up to `longest` bytes from its start.

    With `max_entries` it is a zip archive, which is read from its end and whose
    directory is read at once; without, it may only be read forward.
    """

    def __init__(
        self, file: IO[bytes] | Any, longest: int | None, max_entries: int | None = None
    ) -> None:
        super().__init__()
        self._file = file
        self._longest = longest
        self._max_entries = max_entries
        self._header_left: int | None = None
        self._kind = b""
        """Of the header that was read last, where what follows belongs to it."""

    @contextmanager
    def one_header(self) -> Iterator[None]:
        """While a tar's next header is read, with all that belongs to it: at most 1 MiB."""
        self._header_left, self._kind = _MAX_READ_BYTES, b""
        try:
            yield
        finally:
            self._header_left = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; raises ValueError for the way back where that is none to take."""
        if self._max_entries is None:
            if whence != io.SEEK_SET or offset < self.tell() - _MAX_BACK_BYTES:
                raise ValueError("a header leads backwards")
            self._check_end(offset)
        elif whence == io.SEEK_SET and offset < 0:
            raise ValueError("a header leads to before the start")
        return int(self._file.seek(offset, whence))

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes; raises ValueError for sizes that only a forged header asks for."""
        if self._max_entries is not None:
            return self._read_zip(size, self._max_entries)
        if size is None or not 0 <= size <= _MAX_READ_BYTES:
            raise ValueError("a header is larger than headers are")
        self._check_end(self.tell() + size)
        data = bytes(self._file.read(size))
        if self._header_left is not None:
            self._check_header(data, self._header_left)
        return data

    def _check_header(self, data: bytes, left: int) -> None:
        if len(data) > left:
            raise ValueError("a header is larger than headers are")
        self._header_left = left - len(data)
        kind, self._kind = self._kind, b""
        if kind in _PAX_TYPES:
            _check_pax(data)
        elif kind not in _NAME_TYPES and len(data) == _BLOCK_BYTES:
            self._kind = data[156:157]

    def _read_zip(self, size: int | None, max_entries: int) -> bytes:
        # zipfile reads the end of the file with -1, after a seek close to it.
        most = max_entries * _MAX_ZIP_ENTRY_BYTES + _MAX_READ_BYTES
        if size is None or size < 0:
            size = most
        if size > most:
            raise ValueError("its directory is larger than its entries are")
        data = bytes(self._file.read(size))
        if len(data) >= _MAX_READ_BYTES // 8 and data.count(_ZIP_ENTRY_MARK) > max_entries:
            raise TooLarge(
                f"the archive holds more than {max_entries} entries, the most allowed: send fewer "
                "images"
            )
        return data

    def _check_end(self, position: int) -> None:
        if self._longest is not None and position > self._longest + _MAX_READ_BYTES:
            raise TooLarge(
                f"the archive unpacks to more than {self._longest} bytes, its headers counted, the "
                "most allowed: send fewer or smaller images"
            )


def _check_pax(data: bytes) -> None:
    """Raises ValueError for what is not a list of records "LENGTH KEY=VALUE\\n"."""
    if _DIGITS.search(data):
        raise ValueError("a header holds a number longer than numbers are")
    at = 0
    while at < len(data) and data[at] != 0:
        space = data.find(b" ", at, at + _MAX_LENGTH_DIGITS + 1)
        if space < 0 or not data[at:space].isdigit():
            raise ValueError("a header's record has no length")
        end = at + int(data[at:space])
        equals = data.find(b"=", space + 2, end)
        if equals < 0 or data[end - 1 : end] != b"\n":
            raise ValueError("a header's record has another length than it says")
        at = end
