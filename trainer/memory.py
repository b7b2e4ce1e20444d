"""How much memory the process may use, and what becomes of it where there is too little.

Never imports torch.
"""

import sys

from service.ops import cgroups


def usable_bytes() -> int:
    """The machine's memory, or the least limit of the control groups that the process is in."""
    limit = cgroups.limit_bytes()
    return cgroups.machine_bytes() if limit is None else limit


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
