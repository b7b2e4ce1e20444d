"""Named points where a test may do damage: kill, hang, fill the disk, move the clock.

Nothing happens at a point unless `arm` was told so, which the service does for
its setting `test_faults` and hands on to its trainers. A plan is `ACTION@POINT`,
several of them separated by `;`. `ACTION@POINT#3` acts the third time that the
point is reached; `ACTION@POINT!FILE` acts once for all processes that are given
the same file, which says afterwards that it has. The point `*` is every point.

Actions: `kill` (SIGKILL to this process), `hang` (no further, for ever), `full`
(ENOSPC), `memory` (MemoryError), `clock+60` and `clock-60` (time.time is that many
seconds off from then on).
"""

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "GRAFT_TEST_FAULTS"
"""The environment variable of the setting, a trainer's too."""

_PLAN = re.compile(
    r"(?P<action>kill|hang|full|memory|clock(?P<seconds>[+-]\d+))@(?P<point>\*|[a-z_.]+)"
    r"(#(?P<count>\d+))?(!(?P<file>.+))?"
)


@dataclass
class _Fault:
    act: Callable[[], None]
    left: int
    file: Path | None


_armed: dict[str, list[_Fault]] = {}
_guard = threading.Lock()


def arm(plan: str) -> None:
    """Takes a plan in the place of the one before; raises ValueError for one that is none."""
    armed: dict[str, list[_Fault]] = {}
    for text in plan.split(";"):
        if not text:
            continue
        found = _PLAN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no ACTION@POINT, such as kill@job.claimed")
        file = Path(found["file"]) if found["file"] else None
        fault = _Fault(_action(found["action"]), int(found["count"] or 1), file)
        armed.setdefault(found["point"], []).append(fault)
    _armed.clear()
    _armed.update(armed)


def reach(point: str) -> None:
    """Says that this point is reached."""
    if not _armed:
        return
    with _guard:
        found = [*_armed.get(point, ()), *_armed.get("*", ())]
        for fault in found:
            fault.left -= 1
        due = [fault for fault in found if fault.left == 0]
    for fault in due:
        if fault.file is None or _is_first(fault.file):
            fault.act()


def _is_first(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _action(name: str) -> Callable[[], None]:
    if name.startswith("clock"):
        seconds = int(name.removeprefix("clock"))
        return lambda: _move_clock(seconds)
    return {"kill": _kill, "hang": _hang, "full": _full, "memory": _memory}[name]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    _hang()


def _hang() -> None:
    threading.Event().wait()


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _memory() -> None:
    raise MemoryError


def _move_clock(seconds: int) -> None:
    true_time, true_time_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + seconds * 1_000_000_000
