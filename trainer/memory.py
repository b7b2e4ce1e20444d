"""How much memory the process may use, and how a lack of it shows. Never imports torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def usable_bytes() -> int:
    """The machine's memory, or the least limit of the control groups that the process is in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits()])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the GPU's or the machine's."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    # On a CPU torch says so in words alone.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "can't allocate memory" in text
    )


def _limits() -> Iterator[int]:
    """Bytes, of the process's groups and those around them; `max` stands for none."""
    try:
        groups = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Without a named controller it is version 2.
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        top = _GROUPS / controllers
        # A container may see its group's name as outside and the group itself at the top.
        own = top / name.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            with suppress(OSError, ValueError):
                yield int((group / file).read_text())
