"""What malloc keeps, in a process of its own, whose memory nobody else moves."""

import subprocess
import sys

import pytest

MIB = 2**20
PROGRAM = f"""
import sys, time
from pathlib import Path
from service import free_memory

def taken():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous"):
            return int(line.split()[1]) * 1024

free_memory.LOOK_EVERY_S = 0.02
before = taken()
# Small enough that malloc takes them from its heap, where those that stay keep it from shrinking.
blocks = [bytes(30_000) for _ in range(200 * {MIB} // 30_000)]
kept = blocks[::100]
del blocks
after = taken()
if sys.argv[1] == "watched":
    watching = free_memory.FreeMemory()
    deadline = time.monotonic() + 10
    while taken() > after / 2 and time.monotonic() < deadline:
        pass
    watching.close()
print(after - before, taken() - before)
"""


@pytest.mark.parametrize("how", ["watched", "left alone"])
def test_what_was_freed_goes_back_to_the_system_where_somebody_looks(how: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    freed, left = (int(number) for number in ended.stdout.split())
    assert freed > 100 * MIB, "malloc gave it back by itself"
    assert (left < 50 * MIB) == (how == "watched")
