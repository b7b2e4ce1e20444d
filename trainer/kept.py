"""Keeps arrays that are computed once and read often: in memory up to a limit, then on disk."""

import os
import shutil
import tempfile
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trainer import memory

MEMORY_BYTES = 2 * 2**30
"""Limit on what is kept in memory of one kind."""
FILE_BYTES = 16 * 2**30
"""Limit on the file of one kind."""
_PART = 0.25
"""Of the memory that the process may use, for all kinds together."""
_FREE_PART = 0.5
"""Of the disk's free space when a file is begun: its limit, where that is less."""


class Kept:
    """Keeps arrays by their keys; beyond `memory_bytes` in a file without a name.

    What is beyond the file's limit is not kept. The file ends with the process, however that
    ends. Safe from any thread.
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None) -> None:
        self._free = memory_bytes
        self._held: dict[Hashable, npt.NDArray[Any]] = {}
        self._written: dict[Hashable, tuple[int, int, np.dtype[Any], tuple[int, ...]]] = {}
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._file_bytes = 0
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
        """Keeps an array, where there is room."""
        array = np.ascontiguousarray(array)
        with self._lock:
            if self._free >= array.nbytes:
                self._free -= array.nbytes
                self._held[key] = array
                return
            if not self._has_file(array.nbytes):
                return
            offset = self._end
            self._end += array.nbytes
        if self._wrote(array, offset):
            self._written[key] = offset, array.nbytes, array.dtype, array.shape

    def close(self) -> None:
        """Gives the space back."""
        self._held.clear()
        self._written.clear()
        if self._file is not None:
            self._file.close()

    def _has_file(self, more: int) -> bool:
        if self._file is None:
            try:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
                free = shutil.disk_usage(self._file.fileno()).free
            except OSError:
                return False
            self._file_bytes = min(FILE_BYTES, int(free * _FREE_PART))
        return self._end + more <= self._file_bytes

    def _wrote(self, array: npt.NDArray[Any], offset: int) -> bool:
        assert self._file is not None
        try:
            return os.pwrite(self._file.fileno(), array.data, offset) == array.nbytes
        except OSError:
            # A full disk: it is computed each time, which is slow and right.
            return False


def memory_share(kinds: int = 1) -> int:
    """Returns the bytes that each of some kinds of arrays may take in memory."""
    return min(MEMORY_BYTES, int(memory.usable_bytes() * _PART) // kinds)
