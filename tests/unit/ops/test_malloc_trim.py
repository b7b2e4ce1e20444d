"""Runs the trimmer in a process of its own, whose memory nobody else moves."""

import subprocess
import sys

import pytest

MIB = 2**20
PROGRAM = f"""
import sys, time
from pathlib import Path
from service.ops import malloc_trim

def taken():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous"):
            return int(line.split()[1]) * 1024

def burst(nbytes):
    # Small enough that malloc takes them from its heap, where those that stay keep it from
    # shrinking.
    blocks = [bytes(30_000) for _ in range(nbytes // 30_000)]
    return blocks[::100]

before = taken()
kept = burst(200 * {MIB})
freed = taken()
malloc_trim.POLL_S = 0.02 if sys.argv[1] == "watched" else 3600
watching = malloc_trim.MallocTrimmer()
deadline = time.monotonic() + 120
while sys.argv[1] == "watched" and taken() > freed / 2 and time.monotonic() < deadline:
    time.sleep(0.01)
watching.close()
print(freed - before, taken() - before)
if sys.argv[1] == "watched":
    settled = taken()
    small = burst(40 * {MIB})
    for _ in range(3):
        watching.trim()
    print(taken() - settled)
"""


@pytest.mark.parametrize("how", ["watched", "left alone"])
def test_freed_memory_goes_back_to_the_system_with_a_trimmer_alone(how: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    freed, left, *small = (int(number) for number in ended.stdout.split())
    assert freed > 100 * MIB, "malloc gave it back by itself"
    assert (left < 50 * MIB) == (how == "watched")
    # The next calls need it.
    assert all(kept > 20 * MIB for kept in small)
