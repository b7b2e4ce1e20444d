"""Whether a trainer that says nothing is alive: it computes, or it waits for what ends.

One that hangs, in a lock or for what never comes, uses no processor time. Waits that
use none either are no hanging: those for a disk, which the system tells, and those that
are announced with `waiting`, up to their limit. Waiting for a GPU counts as computing,
since CUDA spins where a process has one context, as a trainer has; one whose kernels
never end is ended by its job's time limit. Never imports torch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ALIVE_S = 0.002
"""Processor time between two looks, below which nothing goes on."""
_TASKS = Path("/proc/self/task")
_UNINTERRUPTIBLE = "D"

_waits: dict[object, float] = {}
"""Until when each may last, of time.monotonic."""


@contextmanager
def waiting(limit_s: float) -> Iterator[None]:
    """Around what may wait for others, such as a network: no hanging until `limit_s` passed."""
    key = object()
    _waits[key] = time.monotonic() + limit_s
    try:
        yield
    finally:
        del _waits[key]


class Life:
    """Looks again and again, always from the same thread, whose own time does not count."""

    def __init__(self) -> None:
        self._before_s = _computed_s()

    def shows(self) -> bool:
        """Whether the process computed since the last look, or waits for what ends now."""
        before_s, self._before_s = self._before_s, _computed_s()
        return self._before_s - before_s >= _ALIVE_S or _is_waiting() or waits_for_disk()


def waits_for_disk(tasks: Path = _TASKS) -> bool:
    """Whether a thread is in a wait that nothing may interrupt, as for a disk or NFS."""
    for stat in tasks.glob("*/stat"):
        try:
            told = stat.read_text(errors="replace")
        except OSError:
            continue  # it ended
        # After the thread's name, which may hold brackets.
        if told.rpartition(")")[2].split()[:1] == [_UNINTERRUPTIBLE]:
            return True
    return False


def _is_waiting() -> bool:
    now = time.monotonic()
    return any(now < until for until in list(_waits.values()))


def _computed_s() -> float:
    """Processor time of all threads but the one that asks."""
    return time.process_time() - time.thread_time()
