"""A real limit of memory: the kernel kills the trainer, and the server goes on answering."""

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S, register_small
from tests.e2e.faults.house import House, asked, wait_until

pytestmark = pytest.mark.e2e

TOP = Path("/sys/fs/cgroup")
MIB = 2**20
SPARE = 32 * MIB
"""Beside what the server holds: the trainer is the smaller of the two when it is killed, so that
the kernel would choose the server by size alone."""
LIMITS = ("memory.max", "memory.limit_in_bytes")
"""Of version 2 and of version 1."""


class ControlGroup:
    """A memory control group of a test's own; its processes and their children stay in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_v2 = (path / LIMITS[0]).exists()

    @property
    def prefix(self) -> tuple[str, ...]:
        """A command before another's, which then is in the group."""
        enter = f'echo $$ > "{self._path}/cgroup.procs" && exec "$@"'
        return ("sh", "-c", enter, "sh")

    def held(self) -> int:
        """Bytes that the kernel cannot take back: without what it keeps of files."""
        name, of_files = (
            ("memory.current", "file") if self._is_v2 else ("memory.usage_in_bytes", "total_cache")
        )
        return int((self._path / name).read_text()) - self._number("memory.stat", of_files)

    def limit(self, limit_bytes: int | None) -> None:
        none = "max" if self._is_v2 else "-1"
        name = LIMITS[0 if self._is_v2 else 1]
        (self._path / name).write_text(none if limit_bytes is None else str(limit_bytes))

    def swap_nothing(self) -> None:
        """A process that is swapped out is not killed."""
        file = self._path / ("memory.swap.max" if self._is_v2 else "memory.swappiness")
        if file.exists():
            file.write_text("0")

    def kill_count(self) -> int:
        return self._number("memory.events" if self._is_v2 else "memory.oom_control", "oom_kill")

    def processes(self) -> list[int]:
        found = [int(line) for line in (self._path / "cgroup.procs").read_text().split()]
        # 0 stands for a process that this one cannot see.
        return [pid for pid in found if pid]

    def remove(self) -> None:
        """Ends whoever is left in it."""
        # A process that has ended is in it until the kernel has taken it apart.
        wait_until(self._is_removed)

    def _is_removed(self) -> bool:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            self._path.rmdir()
        return not self._path.exists()

    def _number(self, file: str, name: str) -> int:
        lines = [line.split() for line in (self._path / file).read_text().splitlines()]
        return int(dict(lines)[name])


def made() -> Iterator[Path]:
    """Groups for a test, as near to this process's own as the machine lets one have them."""
    name = f"graft-test-{uuid.uuid4().hex}"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = TOP / controllers
        # Inside its own, whose limits then hold for the test too; version 2 lets no group
        # with processes have groups with limits, so there it is beside one around it.
        group = top / own.lstrip("/")
        for around in (group, *group.parents):
            if not around.is_relative_to(top):
                break
            path = around / name
            try:
                path.mkdir()
            except OSError:
                continue
            # Elsewhere it is a folder like any other, or a group without a limit.
            if any((path / file).exists() for file in LIMITS):
                yield path
            else:
                path.rmdir()


@pytest.fixture
def group() -> Iterator[ControlGroup]:
    """A group that has no limit yet, and goes with the test."""
    for path in made():
        group = ControlGroup(path)
        try:
            tried = subprocess.run(
                [*group.prefix, "true"], check=False, capture_output=True, text=True
            )
            group.limit(None)
            group.swap_nothing()
            if tried.returncode == 0 and group.kill_count() == 0:
                yield group
                return
        except (OSError, KeyError):
            continue
        finally:
            group.remove()
    pytest.skip("this user may make no control group with a limit of memory")


@pytest.fixture
def limited(tmp_path: Path, furnished: Path, group: ControlGroup) -> Iterator[House]:
    """A data folder with models, whose server is in the group and has real trainers."""
    house = House(tmp_path)
    shutil.copytree(furnished, house.data_dir)
    house.prefix = group.prefix
    yield house
    house.close()


def test_a_trainer_that_the_kernel_kills_for_memory_leaves_the_server_which_says_why(
    limited: House, group: ControlGroup, digits: Path, images: Path, tmp_path: Path
) -> None:
    few = [(digit, file) for digit in "01" for file in islice((digits / digit).iterdir(), 4)]
    client = limited.start()
    dataset = client.upload_dataset(few)
    with asked(client, next(images.glob("red/*")), "ants", "red") as answers:
        # Until it holds all that answering takes.
        wait_until(lambda: len(answers) > 3)
        limit_mib = (group.held() + SPARE) // MIB
        group.limit(limit_mib * MIB)
        job = client.fine_tune(dataset, "digits")
        with pytest.raises(graftml.JobFailed, match="attempt 3 of 3") as failed:
            job.wait(GUARD_S)
        assert failed.value.reason == "OUT_OF_MEMORY"
        told = "the system killed the trainer because memory ran out: use a smaller backbone or "
        assert told in str(failed.value)
        assert f"more memory than the {limit_mib} MiB of its control group" in str(failed.value)
        assert job.refresh().attempts == group.kill_count() == 3
        with pytest.raises(graftml.JobFailed, match="the system killed") as refused:
            client.rank_backbones(dataset, time_budget_s=GUARD_S)
        assert refused.value.reason == "OUT_OF_MEMORY"
        assert group.kill_count() == 6
        assert limited.server.process.pid in group.processes()
        group.limit(None)
        again = client.fine_tune(dataset, "digits", backbone=register_small(client, tmp_path))
        assert again.wait(GUARD_S).version == 1
        assert again.refresh().attempts == 1
        assert group.kill_count() == 6
    limited.is_sound()
