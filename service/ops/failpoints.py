"""Failpoints: named places in the code where a test kills, hangs or starves the process.

Nothing happens at a failpoint unless `arm` got a plan for it, from the setting `failpoints`,
which the service passes on to its trainers. A plan is `ACTION@POINT`, several of them
separated by `;`. `ACTION@POINT#3` acts the third time that the point is reached;
`ACTION@POINT!FILE` acts once in all processes that are given the same file, which it
creates when it acts; whoever takes the file away has it act again. The point `*` matches
every point.

Actions: `kill` (SIGKILL to this process), `hang` (blocks the thread for ever), `full`
(raises OSError ENOSPC), `memory` (raises MemoryError), `clock+60` and `clock-60` (shift
time.time by that many seconds from then on).
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

VARIABLE = "GRAFT_FAILPOINTS"
"""The setting's environment variable, also for trainers and readers of datasets."""

_PLAN = re.compile(
    r"(?P<action>kill|hang|full|memory|clock(?P<seconds>[+-]\d+))@(?P<point>\*|[a-z_.]+)"
    r"(#(?P<count>\d+))?(!(?P<file>.+))?"
)


@dataclass
class _Action:
    act: Callable[[], None]
    left: int
    """Times that the point has still to be reached."""
    file: Path | None


_armed: dict[str, list[_Action]] = {}
_guard = threading.Lock()


def arm(plan: str) -> None:
    """Replaces the plan; raises ValueError for a text that is not a plan."""
    armed: dict[str, list[_Action]] = {}
    for text in plan.split(";"):
        if not text:
            continue
        found = _PLAN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no ACTION@POINT, such as kill@job.claimed")
        file = Path(found["file"]) if found["file"] else None
        action = _Action(_act(found["action"]), int(found["count"] or 1), file)
        armed.setdefault(found["point"], []).append(action)
    _armed.clear()
    _armed.update(armed)


def reach(point: str) -> None:
    """Acts if the plan has an action for this point."""
    if not _armed:
        return
    with _guard:
        found = [*_armed.get(point, ()), *_armed.get("*", ())]
        for action in found:
            action.left -= 1
        due = [each for each in found if each.left == 0 or (each.left < 0 and each.file)]
    for action in due:
        if action.file is None or _is_first(action.file):
            action.act()


def _is_first(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _act(name: str) -> Callable[[], None]:
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
