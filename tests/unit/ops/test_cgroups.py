"""What the kernel tells of this process's memory groups, in both of its ways."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.ops import cgroups
from service.ops.cgroups import OomWatch, kill_count, limit_bytes, machine_bytes

Lay = Callable[..., Path]
V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}"
V2 = "low 0\nhigh 9\nmax 31\noom 5\noom_kill {}\noom_group_kill 0"

GUESS = (
    "the trainer was killed (SIGKILL), as the system does when memory runs out: use less, or "
    "give the server more memory, unless somebody killed it"
)
CERTAIN = (
    "the system killed the trainer because memory ran out: use less, or give the server more memory"
)


@pytest.fixture
def lay(tmp_path: Path) -> Lay:
    """Lays out the kernel's files: the process's own groups, and what is in them."""

    def lay(own: str | bytes, files: dict[str, str]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        written = own if isinstance(own, bytes) else own.encode()
        (tmp_path / "proc/self/cgroup").write_bytes(written)
        for name, text in files.items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return lay


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/graft/job\n", {"graft/job/memory.events": V2.format(3)}, 3),
        ("0::/graft\n", {"memory.events": V2.format(9), "graft/memory.events": V2.format(2)}, 2),
        ("0::/as/seen/outside\n", {"memory.events": V2.format(4)}, 4),
        ("5:cpu:/\n4:memory:/job\n0::/\n", {"memory/job/memory.oom_control": V1.format(7)}, 7),
        ("4:memory:/a:b\n", {"memory/a:b/memory.oom_control": V1.format(0)}, 0),
    ],
    ids=["version 2", "a group around it", "in a container", "version 1", "colon in a name"],
)
def test_the_killed_of_its_own_group_are_counted(
    lay: Lay, own: str, files: dict[str, str], expected: int
) -> None:
    assert kill_count(lay(own, files)) == expected


@pytest.mark.parametrize(
    ("own", "files"),
    [
        # Its own group is there and tells nothing: the one around it is not asked.
        ("0::/graft\n", {"memory.events": V2.format(9), "graft/memory.max": "max"}),
        # Kernels before 4.13.
        ("4:memory:/\n", {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0"}),
        ("0::/\n", {"memory.events": "oom_kill\noom_kill many\n"}),
        ("0::/\n", {}),
        ("5:cpu:/\n", {"memory.events": V2.format(1)}),
        ("nothing of the kind\n\n", {}),
        (b"0::/\xff\xfe\n", {}),
        ("", {}),
    ],
)
def test_what_cannot_be_told_is_none(lay: Lay, own: str | bytes, files: dict[str, str]) -> None:
    root = lay(own, files)
    assert kill_count(root) is None
    assert limit_bytes(root) is None


def test_a_machine_without_control_groups_tells_nothing(tmp_path: Path) -> None:
    assert (kill_count(tmp_path), limit_bytes(tmp_path)) == (None, None)


def test_files_that_cannot_be_read_are_as_those_that_are_not_there(lay: Lay) -> None:
    root = lay("0::/graft\n", {"graft/memory.max": "1000", "graft/memory.events": V2.format(1)})
    for name in ("memory.max", "memory.events"):
        (root / "sys/fs/cgroup/graft" / name).write_bytes(b"oom_kill \xff\xfe")
    assert (kill_count(root), limit_bytes(root)) == (None, None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"graft/job/memory.max": "900", "graft/memory.max": "1000"}, 900),
        ({"graft/job/memory.max": "max", "graft/memory.max": "1000"}, 1000),
        ({"graft/job/memory.max": "0", "graft/memory.max": "max"}, 0),
        ({"graft/job/memory.max": "max", "graft/memory.max": str(2**63 - 4096)}, None),
        ({"memory.max": "800"}, 800),
        ({"memory/job/memory.limit_in_bytes": "700", "graft/job/memory.max": "max"}, 700),
    ],
)
def test_the_least_limit_of_the_groups_around_it_is_told(
    lay: Lay, files: dict[str, str], expected: int | None
) -> None:
    assert limit_bytes(lay("5:cpu:/\n4:memory:/job\n0::/graft/job\n", files)) == expected


def test_the_machines_memory_is_what_the_kernel_says() -> None:
    assert machine_bytes() > 2**28
    assert machine_bytes() % os.sysconf("SC_PAGE_SIZE") == 0


@pytest.mark.parametrize(
    ("counts", "limit", "told"),
    [
        ((2, 3), None, CERTAIN),
        ((0, 1), 800 * 2**20, f"{CERTAIN} than the 800 MiB of its control group"),
        ((2, 2), 800 * 2**20, GUESS),
        # It was moved to another group meanwhile.
        ((2, 1), None, GUESS),
        ((None, 3), None, GUESS),
        ((2, None), None, GUESS),
        ((None, None), None, GUESS),
    ],
)
def test_why_a_process_was_killed_is_certain_only_where_the_kernels_count_rose(
    counts: tuple[int | None, int | None],
    limit: int | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: Iterator[int | None] = iter(counts)
    monkeypatch.setattr(cgroups, "kill_count", lambda: next(left))
    monkeypatch.setattr(cgroups, "limit_bytes", lambda: limit)
    assert OomWatch().why_killed("use less") == told
