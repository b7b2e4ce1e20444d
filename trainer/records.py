"""What the trainer tells its parent, and how it hears that it should end.

Owns standard output: records go to the one that the process was started with,
and whatever else is printed, by any library, goes to standard error. Ends the
process itself (exit code STOPPED) when the parent is gone or on SIGTERM; what
lies half-written in the output folder is the parent's to throw away.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from service.contract import HEARTBEAT_S, ExitCode, Heartbeat, Order, Record, encode
from trainer.liveness import Life

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)

Send = Callable[[Record], None]


class Records:
    """The pipe to the parent. Safe from any thread."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._pipe = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._beat_s = HEARTBEAT_S
        self._is_changed = threading.Event()

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
        """Sends heartbeats while `liveness` sees life, and listens for the parent's end.

        One that hangs sends none; one that computes for ever is ended by the job's time
        limit.
        """
        signal.signal(signal.SIGTERM, lambda *_: stop())
        # The thread below waits while native code holds the interpreter, and the next server
        # may give the job to another trainer by then.
        if hasattr(_libc, "prctl"):
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()

    def beat_every(self, seconds: float) -> None:
        """Changes the time between heartbeats, 5 s until then."""
        self._beat_s = seconds
        self._is_changed.set()

    def _beat(self) -> None:
        life = Life()
        while True:
            if self._is_changed.wait(self._beat_s):
                self._is_changed.clear()
                continue
            if life.shows():
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
