"""The clock of server and trainers jumps for all they ask, gRPC and SQLite too, by libfaketime.

Skipped where that library is not: distributions call its package faketime.
"""

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, asked, wait_until

pytestmark = pytest.mark.e2e

HOUR = timedelta(hours=1)
DEADLINE_S = 3.0
LIBRARIES = sorted(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1"))


class Clock:
    """What the clock is off by, for every process that was started with it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    def jump(self, seconds: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)

    @property
    def prefix(self) -> list[str]:
        return [
            "env",
            f"LD_PRELOAD={LIBRARIES[0]}",
            f"FAKETIME_TIMESTAMP_FILE={self._file}",
            "FAKETIME_NO_CACHE=1",
            # A jump of the clock is none of the time since the start.
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "NO_FAKE_STAT=1",
        ]


@pytest.fixture
def clock(home: House, tmp_path: Path) -> Clock:
    if not LIBRARIES:
        pytest.skip("libfaketime is not installed")
    clock = Clock(tmp_path / "clock")
    home.prefix = clock.prefix
    return clock


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_when_the_systems_clock_jumps_calls_under_way_are_answered_and_deadlines_hold(
    home: House, images: Path, clock: Clock, seconds: int
) -> None:
    client = home.start()
    dataset = client.upload_dataset(images)
    waiting = client.fine_tune(dataset, "flies", labels={"stand_in": "waits"})
    lasted_s: list[float] = []
    begun = threading.Event()

    def watch() -> None:
        started = time.monotonic()
        try:
            for _ in waiting.events(timeout_s=DEADLINE_S):
                begun.set()
        except graftml.DeadlineExceeded:
            lasted_s.append(time.monotonic() - started)
        finally:
            begun.set()

    watching = threading.Thread(target=watch, daemon=True)
    with asked(client, images / "red" / "0.png", "ants", "red") as answers:
        # Late, so that the clock jumps well before the deadline.
        watching.start()
        begun.wait(GUARD_S)
        clock.jump(seconds)
        before = len(answers)
        wait_until(lambda: len(answers) > before + 10)
    watching.join(GUARD_S)
    # An hour late would be after that, and an hour early before its time.
    assert [lasted > 0.9 * DEADLINE_S for lasted in lasted_s] == [True]
    waiting.cancel()
    with pytest.raises(graftml.JobCancelled):
        waiting.wait(GUARD_S)
    after = client.fine_tune(dataset, "bees")
    assert after.wait(GUARD_S).version == 1
    assert [job.job_id for job in client.list_jobs(model="bees")] == [after.job_id]
    created = after.refresh().create_time
    assert created is not None
    off = created - datetime.now(UTC)
    # One that would have been before what was stored already comes just after it.
    assert (off > HOUR / 2) == (seconds > 0)
    home.is_sound()
