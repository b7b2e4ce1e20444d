"""Counts the cores that this process may use, and says what kind of processor they are of.

Reads the kernel's own files, which no disk delays. `root` is the folder under which they lie,
and `cpus` are the logical CPUs that the process may run on; both are for tests.
"""

import math
import os
import platform
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.ops import cgroups

_SIBLINGS = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_FACTS = "proc/cpuinfo"
_FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_bf16", "amx_fp16", "amx_int8", "asimdhp", "asimddp", "sve", "i8mm", "bf16",
)  # fmt: skip
"""Instructions that decide how fast a backbone runs in a precision, as the kernel names them."""


@dataclass(frozen=True)
class CpuInfo:
    """A processor, and how much of it this process may use."""

    model: str
    """Its name with family and model number, since virtual machines give many the same name."""
    flags: tuple[str, ...]
    """Instructions that decide how fast a backbone runs, as the kernel names them."""
    cpus: int
    """Logical CPUs that the process may run on, by its affinity and its cpuset."""
    physical_cores: int
    """Cores that these belong to: hyper-threads share one."""
    quota: float | None
    """Processor time that the control groups allow, in cores; None without a limit."""
    available_cores: int
    """Threads that may compute at once, 1 at least."""

    @property
    def cores(self) -> dict[str, float]:
        """Counts of cores by kind: `logical`, `physical`, `available`, and `quota` if any."""
        counts: dict[str, float] = {
            "logical": self.cpus,
            "physical": self.physical_cores,
            "available": self.available_cores,
        }
        return counts if self.quota is None else {**counts, "quota": self.quota}

    def __str__(self) -> str:
        quota = "" if self.quota is None else f", quota {self.quota:g}"
        return (
            f"{self.model} ({' '.join(self.flags)}), {self.available_cores} of "
            f"{self.physical_cores} cores{quota}"
        )


def available_cores(root: Path = cgroups.ROOT, cpus: Collection[int] | None = None) -> int:
    """Returns how many threads may compute at once, 1 at least.

    No more than there are cores among the CPUs that the process may run on, and than use its
    quota up: the kernel stops all threads of a group that has done so until the next period.
    A fraction of a core counts as one, which else would lie idle.
    """
    return _threads(_physical_cores(root, cpus), cgroups.quota_cores(root))


def describe(root: Path = cgroups.ROOT, cpus: Collection[int] | None = None) -> CpuInfo:
    """Describes the processor and how much of it the process may use now.

    Whoever runs the process may change affinity and quota at any time.
    """
    cpus = os.sched_getaffinity(0) if cpus is None else cpus
    cores, quota = _physical_cores(root, cpus), cgroups.quota_cores(root)
    facts = _facts(root)
    has = set(facts.get("flags", facts.get("Features", "")).split())
    return CpuInfo(
        model=_model(facts),
        flags=tuple(flag for flag in _FLAGS if flag in has),
        cpus=len(cpus),
        physical_cores=cores,
        quota=quota,
        available_cores=_threads(cores, quota),
    )


def _threads(cores: int, quota: float | None) -> int:
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _physical_cores(root: Path, cpus: Collection[int] | None) -> int:
    cores = set()
    for cpu in os.sched_getaffinity(0) if cpus is None else cpus:
        core = str(cpu)
        with suppress(OSError, ValueError):
            core = (root / _SIBLINGS.format(cpu)).read_text().strip()
        cores.add(core)
    return len(cores)


def _facts(root: Path) -> dict[str, str]:
    """Returns what the kernel says of the first processor, by its words."""
    facts = {}
    with suppress(OSError, ValueError), (root / _FACTS).open() as file:
        # A machine may have hundreds, and each takes the kernel a while.
        for line in file:
            name, colon, value = line.partition(":")
            if not colon:
                break
            facts[name.strip()] = value.strip()
    return facts


def _model(facts: dict[str, str]) -> str:
    # ARM's have numbers alone.
    name = facts.get("model name", platform.machine())
    numbers = ("cpu family", "model", "CPU implementer", "CPU part")
    return ", ".join([name, *(f"{word} {facts[word]}" for word in numbers if word in facts)])
