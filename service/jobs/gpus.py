"""Shares the machine's GPUs out among trainers: each gets one, and sees no other."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable that says which GPUs CUDA shows to a process; an empty one shows none."""


class Gpus:
    """Counts how many trainers each GPU has. Safe from any thread.

    `names` are as CUDA_VISIBLE_DEVICES has them, in CUDA's order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # The service itself computes on the first one: that is lent last.
        self._lent = dict.fromkeys([*names[1:], *names[:1]], 0)
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[str]:
        """Yields the name of the GPU with the fewest trainers; "" where there is none."""
        if not self._lent:
            yield ""
            return
        with self._lock:
            name = min(self._lent, key=self._lent.__getitem__)
            self._lent[name] += 1
        try:
            yield name
        finally:
            with self._lock:
                self._lent[name] -= 1
