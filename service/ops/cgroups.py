"""Reads the control groups of this process: limits of memory and CPU, and out-of-memory kills.

Reads the kernel's own files, which no disk delays; cgroup versions 1 and 2, and both at once.
Returns None for what the system does not say, never an error. `root` is the folder under which
the kernel's files lie.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")
_GROUPS = "sys/fs/cgroup"
_OWN_GROUPS = "proc/self/cgroup"
_LIMIT_FILES = ("memory.limit_in_bytes", "memory.max")
_QUOTA_FILES = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
_KILLS_FILES = ("memory.oom_control", "memory.events")
_KILLS = "oom_kill"
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_KILLED_FIRST = 1000
"""The maximum. The kernel kills the process with most memory, and adds this many thousandths
of all memory to a process's own: with less, a server with many models would be killed before
a process whose work can be repeated."""


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
    """Makes the kernel kill this process and its children before the server when memory runs out.

    Raising the score needs no privilege. Where it fails the kernel chooses by size alone.
    """
    with suppress(OSError):
        _OOM_SCORE_ADJ.write_text(str(_KILLED_FIRST))


def machine_bytes() -> int:
    """Returns the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit_bytes(root: Path = ROOT) -> int | None:
    """Returns the lowest limit of the process's groups and their parents; None without any.

    Version 1 reports "unlimited" as a number above the machine's memory, which is no limit.
    """
    limits = []
    for groups in _own_groups("memory", root):
        for group in groups:
            # Version 2 says `max` for none.
            limits += [int(text) for text in _texts(group, _LIMIT_FILES) if text.isdecimal()]
    least = min(limits, default=None)
    return least if least is not None and least < machine_bytes() else None


def quota_cores(root: Path = ROOT) -> float | None:
    """Returns the processor time that the groups and their parents allow, in cores.

    The least of their quotas, each a time that may be used in every period; None without any.
    """
    quotas = []
    for groups in _own_groups("cpu", root):
        for group in groups:
            # Version 2 says both in one line, and `max` for no quota; version 1 says -1.
            words = " ".join(_texts(group, _QUOTA_FILES)).split()
            if len(words) == 2 and all(word.isdecimal() for word in words):
                quota_us, period_us = map(int, words)
                quotas.append(quota_us / max(1, period_us))
    return min(quotas, default=None)


def kill_count(root: Path = ROOT) -> int | None:
    """Returns how many processes of its own group the kernel has killed for lack of memory.

    Counts kills for the group's limit, a parent's limit and the machine's memory alike.
    Kills in other groups do not count, although a common parent reports them too.
    """
    for own, *_ in _own_groups("memory", root):
        for text in _texts(own, _KILLS_FILES):
            for line in text.splitlines():
                name, _, count = line.partition(" ")
                if name == _KILLS and count.isdecimal():
                    return int(count)
    return None


def _own_groups(controller: str, root: Path) -> Iterator[list[Path]]:
    """Yields the process's group and its parents, for each hierarchy that may have limits."""
    try:
        lines = os.fsdecode((root / _OWN_GROUPS).read_bytes()).splitlines()
    except OSError:
        return
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, name = named.partition(":")
        # A line without a controller's name is version 2; one of version 1 may name several,
        # in another order than the folder's name does, to which each one's name is a link.
        if controllers and controller not in controllers.split(","):
            continue
        top = root / _GROUPS / (controller if controllers else "")
        own = top / name.lstrip("/")
        # A container may see the name its group has outside, and the group itself at the root.
        own = own if os.access(own, os.F_OK) else top
        yield [group for group in (own, *own.parents) if group.is_relative_to(top)]


def _texts(group: Path, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        with suppress(OSError, ValueError):
            yield (group / name).read_text().strip()
