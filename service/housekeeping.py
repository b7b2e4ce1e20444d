"""Does what nobody waits for: collects blobs, deletes what is past its retention, trims logs.

A thread that runs its steps every `every_s`, the first time that long after the start. A step
that fails is logged and tried again the next time. Stops with `close`.
"""

import logging
import threading
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)


class Housekeeping:
    """Runs steps by name, one after the other."""

    def __init__(self, steps: Mapping[str, Callable[[], object]], every_s: float) -> None:
        self._steps = dict(steps)
        self._every_s = every_s
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
        self._thread.start()

    def run_once(self) -> None:
        """Runs every step now, in the caller's thread."""
        for name, step in self._steps.items():
            if self._is_closing.is_set():
                return
            try:
                step()
            except Exception:
                log.exception("housekeeping failed and is tried again later", extra={"step": name})

    def close(self) -> None:
        """Ends the thread; waits for the step that runs."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.wait(self._every_s):
            self.run_once()
