"""What the trainer tells its parent, and how it hears that it should end.

Owns standard output: records go to the one that the process was started with,
and whatever else is printed, by any library, goes to standard error. Ends the
process itself (exit code STOPPED) when the parent is gone or on SIGTERM; what
lies half-written in the output folder is the parent's to throw away.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from service.jobs.contract import ExitCode, Heartbeat, Order, Record, encode

HEARTBEAT_S = 5.0

Send = Callable[[Record], None]


class Records:
    """The pipe to the parent. Safe from any thread."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def print_to(self, log: Path) -> None:
        """Sends what is printed beside records to a file from now on."""
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        os.dup2(2, 1)

    def send(self, record: Record) -> None:
        """Sends one record; ends the process when nobody reads them any more."""
        line = encode(record) + b"\n"
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._pipe, line) :]
        except BrokenPipeError:
            stop()

    def keep_alive(self) -> None:
        """Sends a heartbeat every 5 s, and listens for the parent's end."""
        signal.signal(signal.SIGTERM, lambda *_: stop())
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()

    def _beat(self) -> None:
        never = threading.Event()
        while not never.wait(HEARTBEAT_S):
            self.send(Heartbeat())


def read_order() -> Order:
    """Waits for the one line that says what to do; ends the process when the parent is gone."""
    line = b""
    # A byte at a time and unbuffered: what follows the line is for `_wait_for_parent`.
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            stop()
        line += byte
    order: Order = msgspec.json.decode(line, type=Order)
    return order


def stop() -> None:
    """Ends the process at once: a thread in native code would hold up anything gentler."""
    os._exit(ExitCode.STOPPED)


def _wait_for_parent() -> None:
    while os.read(0, 4096):
        pass
    stop()
