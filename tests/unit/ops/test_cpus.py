"""What the kernel tells of the processor, and of how much of it is this process's."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.ops.cpus import CpuInfo, available_cores, describe

Lay = Callable[[dict[str, str]], Path]

X86 = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor @ 2.00GHz
flags\t\t: fpu sse4_1 avx2 fma avx512f amx_bf16 avx512_vnni
bugs\t\t: spectre_v1: all

processor\t: 1
model name\t: another
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
FOUR_CORES_OF_TWO_THREADS = {
    f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 4},{cpu % 4 + 4}"
    for cpu in range(8)
}


@pytest.fixture
def lay(tmp_path: Path) -> Lay:
    """Lays out the kernel's files; returns the folder in which they lie."""

    def lay(files: dict[str, str]) -> Path:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return lay


def groups(own: str, files: dict[str, str]) -> dict[str, str]:
    return {
        "proc/self/cgroup": own,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }


def v1(folder: str, quota_us: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota_us), f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [(range(8), 4), ([0, 4], 1), ([1, 2, 6], 2), ([7], 1)],
    ids=["all", "a core's two threads", "two cores", "one thread"],
)
def test_hyper_threads_of_one_core_count_once(lay: Lay, cpus: list[int], expected: int) -> None:
    assert available_cores(lay(FOUR_CORES_OF_TWO_THREADS), cpus) == expected


def test_a_cpu_of_which_the_kernel_tells_nothing_is_a_core(tmp_path: Path) -> None:
    assert available_cores(tmp_path, range(3)) == 3


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/graft/job", {"graft/job/cpu.max": "max 100000", "graft/cpu.max": "max 100000"}, None),
        ("0::/graft/job", {"graft/job/cpu.max": "max 1", "graft/cpu.max": "20000 10000"}, 2),
        (
            "0::/graft/job",
            {"graft/job/cpu.max": "300000 100000", "graft/cpu.max": "100000 100000"},
            1,
        ),
        ("0::/as/seen/outside", {"cpu.max": "150000 100000"}, 1.5),
        ("4:cpu,cpuacct:/\n0::/", v1("cpu", -1), None),
        ("4:cpuacct,cpu:/job", {**v1("cpu/job", 350_000), **v1("cpu", 150_000)}, 1.5),
        ("4:cpu:/a/b", {**v1("cpu/a/b", -1), **v1("cpu/a", 50_000), **v1("cpu", -1)}, 0.5),
        ("5:memory:/job\n", v1("memory/job", 50_000), None),
        ("3:cpuset:/job\n", v1("cpuset/job", 50_000), None),
        ("0::/", {"cpu.max": "half 100000"}, None),
        ("0::/", {"cpu.max": ""}, None),
        ("4:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "50000"}, None),
    ],
)
def test_the_quota_is_the_least_of_the_groups_around_the_process(
    lay: Lay, own: str, files: dict[str, str], quota: float | None
) -> None:
    root = lay({**FOUR_CORES_OF_TWO_THREADS, **groups(own, files)})
    assert describe(root, range(8)).quota == quota


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("1000", 1), ("50000", 1), ("100000", 1), ("110000", 2), ("200000", 2), ("900000", 4)],
)
def test_a_part_of_a_core_counts_as_one(lay: Lay, quota: str, expected: int) -> None:
    limited = groups("0::/", {"cpu.max": f"{quota} 100000"})
    root = lay({**FOUR_CORES_OF_TWO_THREADS, **limited})
    assert available_cores(root, range(8)) == expected


def test_affinity_binds_where_it_is_narrower_than_the_quota(lay: Lay) -> None:
    limited = groups("0::/", {"cpu.max": "300000 100000"})
    root = lay({**FOUR_CORES_OF_TWO_THREADS, **limited})
    assert available_cores(root, [2, 6]) == 1


def test_a_processor_is_described_by_what_decides_its_speed(lay: Lay) -> None:
    limited = groups("0::/", {"cpu.max": "150000 100000"})
    root = lay({"proc/cpuinfo": X86, **FOUR_CORES_OF_TWO_THREADS, **limited})
    found = describe(root, [0, 1, 2, 4])
    model = "Intel(R) Xeon(R) Processor @ 2.00GHz, cpu family 6, model 143"
    flags = ("avx2", "fma", "avx512f", "avx512_vnni", "amx_bf16")
    assert found == CpuInfo(model, flags, 4, 3, 1.5, 2)
    assert str(found) == f"{model} ({' '.join(flags)}), 2 of 3 cores, quota 1.5"
    assert found.cores == {"logical": 4, "physical": 3, "quota": 1.5, "available": 2}


def test_an_arm_processor_has_numbers_for_a_name(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    found = describe(lay({"proc/cpuinfo": ARM}), [0])
    assert found.model == "aarch64, CPU implementer 0x41, CPU part 0xd40"
    assert found.flags == ("asimddp", "i8mm")
    assert "quota" not in found.cores


def test_this_process_has_what_its_affinity_leaves_it() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert (describe().cpus, available_cores()) == (1, 1)
    finally:
        os.sched_setaffinity(0, before)
