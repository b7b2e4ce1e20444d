"""A file that parsers of untrusted archives read through: no huge read, no way back.

tarfile and zipfile believe what headers say: a forged one makes them read
gigabytes at once, seek backwards for ever, or list millions of entries.
"""

import io
from typing import IO, Any

_MAX_READ_BYTES = 2**20
_MAX_BACK_BYTES = 1024
"""tarfile steps back by one byte, and to a file's start behind its header."""
_ZIP_ENTRY_MARK = b"PK\x01\x02"
_MAX_ZIP_ENTRY_BYTES = 1024


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

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True, though not everywhere."""
        return True

    def tell(self) -> int:
        """The position from the start."""
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
        return bytes(self._file.read(size))

    def _read_zip(self, size: int | None, max_entries: int) -> bytes:
        # zipfile reads the end of the file with -1, after a seek close to it.
        data = bytes(
            self._file.read(
                max_entries * _MAX_ZIP_ENTRY_BYTES + _MAX_READ_BYTES
                if size is None or size < 0
                else size
            )
        )
        if len(data) >= _MAX_READ_BYTES // 8 and data.count(_ZIP_ENTRY_MARK) > max_entries:
            raise TooLarge(
                f"the archive holds more than {max_entries} entries, the most allowed: send fewer "
                "pictures"
            )
        return data

    def _check_end(self, position: int) -> None:
        if self._longest is not None and position > self._longest + _MAX_READ_BYTES:
            raise TooLarge(
                f"the archive unpacks to more than {self._longest} bytes, its headers counted, the "
                "most allowed: send fewer or smaller pictures"
            )
