"""Returns memory that was freed, and that malloc keeps, to the system.

After a burst of large requests the C library holds hundreds of MiB of free memory, in
holes between blocks in use, and would hold them for ever. Stops with `MallocTrimmer.close`.
"""

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

POLL_S: Final = 15.0
KEEP_FREE_BYTES: Final = 64 * 2**20
"""Free memory up to this is kept: the next calls need it, and would pay a page fault each."""


class _Mallinfo2(ctypes.Structure):
    """The counters of glibc's heaps (mallinfo2(3)); bytes, except for two counts."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


class MallocTrimmer:
    """Polls every 15 s on a thread of its own; does nothing with a C library other than glibc."""

    def __init__(self) -> None:
        self._is_closed = threading.Event()
        self._lowest_bytes = 0
        """Lowest anonymous memory since the last trim."""
        self._libc = ctypes.CDLL(None)
        self._thread: threading.Thread | None = None
        if hasattr(self._libc, "mallinfo2") and hasattr(self._libc, "malloc_trim"):
            self._libc.mallinfo2.restype = _Mallinfo2
            self._thread = threading.Thread(target=self._poll, name="malloc-trim", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def trim(self) -> None:
        """Trims malloc's heaps if they hold more than 64 MiB of free memory."""
        used = _anonymous_bytes()
        self._lowest_bytes = min(self._lowest_bytes, used)
        # mallinfo2 still counts as free what was already returned: look at the system's count too.
        has_grown = used > self._lowest_bytes + KEEP_FREE_BYTES
        if has_grown and self._libc.mallinfo2().fordblks > KEEP_FREE_BYTES:
            # Takes some 0.3 s per GiB, during which other threads' allocations may wait.
            self._libc.malloc_trim(0)
            self._lowest_bytes = _anonymous_bytes()

    def _poll(self) -> None:
        while not self._is_closed.wait(POLL_S):
            # Fails when no file can be opened: try again at the next poll.
            with suppress(OSError):
                self.trim()


def _anonymous_bytes() -> int:
    """Returns the process's resident memory that belongs to no file."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
