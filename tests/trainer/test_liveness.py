"""What is taken for life in a trainer that says nothing, and what for hanging."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.contract import Record
from tests.trainer.conftest import GUARD_S
from trainer import liveness
from trainer.liveness import Life, waiting
from trainer.records import Records


def tasks(folder: Path, *states: str) -> Path:
    for number, state in enumerate(states):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "stat").write_text(f"{number} (a) D (b) {state} 1 1 0")
    return folder


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands, in a process that does not compute and waits for no disk."""
    clock = [100.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(liveness, "_computed_s", lambda: 0.0)
    monkeypatch.setattr(liveness, "waits_for_disk", lambda *_: False)
    return clock


def test_what_computes_lives(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life()
    assert not life.shows()
    monkeypatch.setattr(liveness, "_computed_s", lambda: 0.01)
    assert life.shows()
    assert not life.shows()


def test_what_said_that_it_waits_lives_until_its_limit(now: list[float]) -> None:
    life = Life()
    with waiting(60), waiting(600):
        now[0] += 599
        assert life.shows()
        now[0] += 2
        assert not life.shows(), "it waits for what never comes"
    with waiting(60):
        assert life.shows()
    assert not life.shows()


def test_what_waits_for_a_disk_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not liveness.waits_for_disk(tasks(tmp_path / "idle", "S", "R"))
    assert liveness.waits_for_disk(tasks(tmp_path / "disk", "S", "D", "S"))
    assert not liveness.waits_for_disk(tmp_path / "none")
    monkeypatch.setattr(liveness, "_computed_s", lambda: 0.0)
    monkeypatch.setattr(liveness, "waits_for_disk", lambda: True)
    assert Life().shows()


def test_a_trainer_that_waits_for_a_download_sends_heartbeats_and_one_that_hangs_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "_computed_s", lambda: 0.0)
    monkeypatch.setattr(liveness, "waits_for_disk", lambda: False)
    looks, beats = threading.Semaphore(0), threading.Semaphore(0)
    shows = Life.shows

    def looked(life: Life) -> bool:
        alive = shows(life)
        looks.release()
        return alive

    class Heard(Records):
        def __init__(self) -> None:
            self._beat_s = 0.001
            self._is_changed = threading.Event()

        def send(self, record: Record) -> None:
            beats.release()
            if is_over.is_set():
                raise SystemExit

    is_over = threading.Event()
    monkeypatch.setattr(Life, "shows", looked)
    with ThreadPoolExecutor(1) as threads:
        beating = threads.submit(Heard()._beat)
        for _ in range(3):
            assert looks.acquire(timeout=GUARD_S)
        assert not beats.acquire(blocking=False)
        with waiting(2 * GUARD_S):
            assert beats.acquire(timeout=GUARD_S)
            is_over.set()
            assert isinstance(beating.exception(GUARD_S), SystemExit)
