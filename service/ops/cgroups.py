"""Reads the memory control groups of this process: its limit, and whom the kernel killed there.

These are the kernel's own files, which no disk holds up; versions 1 and 2, and both at once.
What cannot be read is None, never an error.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")
_KILLS_FILES = ("memory.oom_control", "memory.events")
_KILLS = "oom_kill"
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_KILLED_FIRST = 1000
"""The highest there is. The kernel kills whoever has most memory, and adds to it this many
thousandths of all memory: with less, a server with many models would go before a process
whose work can be done again."""


_MIB = 2**20


class OomWatch:
    """Says why a process was killed by SIGKILL that was started after this was made."""

    def __init__(self) -> None:
        self._before = kill_count()

    def why_killed(self, remedy: str) -> str:
        """Explains a trainer's end by SIGKILL to its caller; `remedy` is what to use instead.

        Certain where the kernel has killed a process of the group since, a trainer in all
        likelihood; else a guess, which says so.
        """
        now = kill_count()
        if self._before is None or now is None or now <= self._before:
            return (
                "the trainer was killed (SIGKILL), as the system does when memory runs out: "
                f"{remedy}, or give the server more memory, unless somebody killed it"
            )
        limit = limit_bytes()
        of_what = "" if limit is None else f" than the {limit / _MIB:.0f} MiB of its control group"
        return (
            "the system killed the trainer because memory ran out: "
            f"{remedy}, or give the server more memory{of_what}"
        )


def be_killed_first() -> None:
    """Has the kernel kill this process, and what it starts, before the server for want of memory.

    Raising this needs no privilege. Where it cannot be done the kernel chooses by size alone.
    """
    with suppress(OSError):
        _OOM_SCORE_ADJ.write_text(str(_KILLED_FIRST))


def machine_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_bytes() -> int | None:
    """The least limit of the process's groups and those around them; None without any.

    One that is not below the machine's memory is none: so version 1 says that there is none.
    """
    limits = []
    for group, top in _own_groups():
        for each in (group, *group.parents):
            if not each.is_relative_to(top):
                break
            # Version 2 says `max` for none.
            limits += [int(text) for text in _texts(each, _LIMIT_FILES) if text.isdecimal()]
    least = min(limits, default=None)
    return least if least is not None and least < machine_bytes() else None


def kill_count() -> int | None:
    """How many processes of its own group the kernel has killed for want of memory.

    For whatever memory it was: the group's, one's around it or the machine's. Those of other
    groups do not count, though a group around them told of them, too.
    """
    for group, _ in _own_groups():
        for text in _texts(group, _KILLS_FILES):
            for line in text.splitlines():
                name, _, count = line.partition(" ")
                if name == _KILLS and count.isdecimal():
                    return int(count)
    return None


def _own_groups() -> Iterator[tuple[Path, Path]]:
    """The process's group and the top of its hierarchy, for each that may bound memory."""
    try:
        lines = os.fsdecode(_OWN_GROUPS.read_bytes()).splitlines()
    except OSError:
        return
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, name = named.partition(":")
        # Without a named controller it is version 2.
        if controllers not in ("", "memory"):
            continue
        top = _GROUPS / controllers
        own = top / name.lstrip("/")
        # A container may see its group's name as outside and the group itself at the top.
        yield (own if os.access(own, os.F_OK) else top), top


def _texts(group: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        with suppress(OSError, ValueError):
            yield (group / name).read_text().strip()
