"""Memory that was freed and that malloc keeps: given back to the system.

After a flood of large requests the C library holds hundreds of MiB that nobody uses,
in holes below what is used, and would for ever. Stops with `FreeMemory.close`.
"""

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

LOOK_EVERY_S: Final = 15.0
MOST_FREE_BYTES: Final = 64 * 2**20
"""Less is let be: the next calls need it, and would pay a fault for each page."""


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heaps (mallinfo(3)); bytes but for the two counts."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


class FreeMemory:
    """A thread that looks every 15 s; nothing where the C library is another than glibc."""

    def __init__(self) -> None:
        self._is_closed = threading.Event()
        self._least = 0
        """What was taken in all after the last look that gave anything back, or since."""
        self._libc = ctypes.CDLL(None)
        self._thread: threading.Thread | None = None
        if hasattr(self._libc, "mallinfo2") and hasattr(self._libc, "malloc_trim"):
            self._libc.mallinfo2.restype = _Mallinfo2
            self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def look(self) -> None:
        """Gives back what was freed, where it is much."""
        taken = _taken()
        self._least = min(self._least, taken)
        # What malloc calls free it calls so when it has been given back, too.
        is_much = taken > self._least + MOST_FREE_BYTES
        if is_much and self._libc.mallinfo2().fordblks > MOST_FREE_BYTES:
            # Some 0.3 s a GiB, in which who allocates may wait.
            self._libc.malloc_trim(0)
            self._least = _taken()

    def _watch(self) -> None:
        while not self._is_closed.wait(LOOK_EVERY_S):
            # With no file to be opened there is another look.
            with suppress(OSError):
                self.look()


def _taken() -> int:
    """Bytes of memory that is of no file."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
