"""How much memory the process may use, and what becomes of it where there is too little.

Never imports torch.
"""

import sys
from contextlib import suppress
from pathlib import Path

from service import control_groups

_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_KILLED_FIRST = 1000
"""The highest there is. The kernel kills who has most memory, and adds to it this many
thousandths of all memory: with less, a server with many models would go before a trainer,
whose job is tried again."""


def usable_bytes() -> int:
    """The machine's memory, or the least limit of the control groups that the process is in."""
    limit = control_groups.limit_bytes()
    return control_groups.machine_bytes() if limit is None else limit


def be_killed_first() -> None:
    """Has the kernel kill this process, and what it starts, before the server for want of memory.

    Raising this needs no privilege. Where it cannot be done the kernel chooses by size alone.
    """
    with suppress(OSError):
        _OOM_SCORE_ADJ.write_text(str(_KILLED_FIRST))


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
