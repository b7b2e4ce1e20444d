"""Memory that was freed and that malloc keeps: given back to the system.

After a flood of large requests the C library holds hundreds of MiB that nobody uses,
in holes below what is used, and would for ever. Stops with `FreeMemory.close`.
"""

import ctypes
import threading
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

    def _watch(self) -> None:
        # Half a second a GiB, in which who allocates may wait; next to nothing where little
        # was used since the last time.
        while not self._is_closed.wait(LOOK_EVERY_S):
            if self._libc.mallinfo2().fordblks > MOST_FREE_BYTES:
                self._libc.malloc_trim(0)
