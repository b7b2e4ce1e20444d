"""Arrays that are computed once and read often: in memory as far as a bound goes, then on disk."""

import os
import tempfile
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trainer import memory

MEMORY_BYTES = 2 * 2**30
"""The most that is kept in memory of one kind."""
_PART = 0.25
"""Of the memory that the process may use, for all kinds together."""


class Kept:
    """Arrays by their keys; beyond `memory_bytes` in a file without a name.

    The file ends with the process, however that ends. Safe from any thread.
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None) -> None:
        self._free = memory_bytes
        self._held: dict[Hashable, npt.NDArray[Any]] = {}
        self._written: dict[Hashable, tuple[int, int, np.dtype[Any], tuple[int, ...]]] = {}
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> npt.NDArray[Any] | None:
        """Returns an array, or None where it was never put or found no room."""
        if (held := self._held.get(key)) is not None:
            return held
        if (at := self._written.get(key)) is None:
            return None
        assert self._file is not None
        offset, size, dtype, shape = at
        return np.frombuffer(os.pread(self._file.fileno(), size, offset), dtype).reshape(shape)

    def put(self, key: Hashable, array: npt.NDArray[Any]) -> None:
        """Keeps an array, unless the disk is full."""
        array = np.ascontiguousarray(array)
        with self._lock:
            has_room = self._free >= array.nbytes
            offset = self._end
            if has_room:
                self._free -= array.nbytes
            else:
                self._end += array.nbytes
        if has_room:
            self._held[key] = array
        elif self._wrote(array, offset):
            self._written[key] = offset, array.nbytes, array.dtype, array.shape

    def close(self) -> None:
        """Gives the space back."""
        self._held.clear()
        self._written.clear()
        if self._file is not None:
            self._file.close()

    def _wrote(self, array: npt.NDArray[Any], offset: int) -> bool:
        try:
            with self._lock:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            return os.pwrite(self._file.fileno(), array.data, offset) == array.nbytes
        except OSError:
            # A full disk: it is computed each time, which is slow and right.
            return False


def memory_share(kinds: int = 1) -> int:
    """Returns the bytes that each of some kinds of arrays may take in memory."""
    return min(MEMORY_BYTES, int(memory.usable_bytes() * _PART) // kinds)
