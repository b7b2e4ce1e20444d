import errno
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.ops import failpoints

GUARD_S = 300.0


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def acts(point: str) -> bool:
    try:
        failpoints.reach(point)
    except MemoryError:
        return True
    return False


def test_nothing_happens_where_nothing_is_armed() -> None:
    assert not acts("job.claimed")


def test_a_fault_acts_at_its_point_alone_and_once() -> None:
    failpoints.arm("memory@job.claimed")
    assert not acts("job.created")
    assert [acts("job.claimed") for _ in range(3)] == [True, False, False]


def test_a_fault_with_a_number_acts_the_time_that_it_names() -> None:
    failpoints.arm("memory@job.claimed#3")
    assert [acts("job.claimed") for _ in range(4)] == [False, False, True, False]


def test_a_star_counts_every_point() -> None:
    failpoints.arm("memory@*#3")
    assert [acts(point) for point in ("a", "b", "a", "b")] == [False, False, True, False]


def test_a_file_lets_a_fault_act_once_for_all_who_share_it(tmp_path: Path) -> None:
    file = tmp_path / "done"
    failpoints.arm(f"memory@job.claimed!{file}")
    assert acts("job.claimed")
    assert file.exists()
    failpoints.arm(f"memory@job.claimed!{file}")
    assert not acts("job.claimed")


def test_a_fault_whose_file_is_taken_away_acts_again_and_not_before_its_count(
    tmp_path: Path,
) -> None:
    file = tmp_path / "done"
    failpoints.arm(f"memory@a#2!{file}")
    assert [acts("a") for _ in range(3)] == [False, True, False]
    file.unlink()
    assert [acts("a") for _ in range(2)] == [True, False]


def test_a_plan_may_hold_several_faults_of_one_point() -> None:
    failpoints.arm("memory@a;full@a#2;memory@b")
    assert acts("a")
    with pytest.raises(OSError, match="No space") as full:
        failpoints.reach("a")
    assert full.value.errno == errno.ENOSPC
    assert acts("b")


def test_a_new_plan_takes_the_place_of_the_old_one() -> None:
    failpoints.arm("memory@a")
    failpoints.arm("memory@b")
    assert not acts("a")


@pytest.mark.parametrize("plan", ["kill", "kill@", "burn@a", "kill@a#x", "clock@a", "kill@A"])
def test_a_plan_that_is_none_is_refused_and_the_old_one_stays(plan: str) -> None:
    failpoints.arm("memory@a")
    with pytest.raises(ValueError, match="ACTION@POINT"):
        failpoints.arm(plan)
    assert acts("a")


def test_the_clock_moves_by_as_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", time.time)
    monkeypatch.setattr(time, "time_ns", time.time_ns)
    before = time.time()
    failpoints.arm("clock-3600@a")
    failpoints.reach("a")
    assert -3601 < time.time() - before < -3600 + GUARD_S
    assert abs(time.time() - time.time_ns() / 1e9) < GUARD_S


def test_a_hang_goes_no_further() -> None:
    failpoints.arm("hang@a")
    past = threading.Event()

    def run() -> None:
        failpoints.reach("a")
        past.set()

    threading.Thread(target=run, daemon=True).start()
    assert not past.wait(0.05)


def test_a_kill_ends_the_process_at_once() -> None:
    program = (
        "from service.ops import failpoints; failpoints.arm('kill@a'); failpoints.reach('a'); "
        "print('on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, timeout=GUARD_S
    )
    assert (done.returncode, done.stdout) == (-9, b"")


def test_a_plan_that_is_none_ends_the_start_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from service.__main__ import main

    assert main(["run", "--failpoints=kill"]) == 2
    assert "--failpoints: 'kill' is no ACTION@POINT" in capsys.readouterr().err
