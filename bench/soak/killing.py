"""The part of the soak that kills trainers, and notes which: nothing else excuses a crash."""

import random
import threading
import time
from contextlib import suppress

import psutil

from bench.soak.book import Book, Kill
from bench.soak.served import Served, job_of

_LOOKS = 300
_LOOK_EVERY_S = 0.05
_SETTLED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


class Killer:
    """Kills the trainers of one server."""

    def __init__(self, served: Served, book: Book, stop: threading.Event, seed: int) -> None:
        self._served = served
        self._book = book
        self._stop = stop
        self._random = random.Random(seed)

    def step(self) -> None:
        """Kills one at work, if there comes one; else one that waits."""
        waiting: list[psutil.Process] = []
        for _ in range(_LOOKS):
            found = [(each, job_of(each)) for each in self._served.trainers()]
            self._random.shuffle(found)
            for trainer, job in found:
                if job and self._book.doom(job):
                    self._stop.wait(self._random.uniform(0, 0.3))
                    self._kill(trainer, job)
                    return
            # Never one whose job was killed once: a second time would fail it.
            waiting = [each for each, job in found if not job]
            if self._stop.wait(_LOOK_EVERY_S):
                return
        if waiting:
            self._kill(self._random.choice(waiting), "")

    def _kill(self, trainer: psutil.Process, job: str) -> None:
        with suppress(psutil.NoSuchProcess):
            # Nothing must change between the look and the kill.
            trainer.suspend()
            if _stopped(trainer) and job_of(trainer) == job:
                has_result = bool(job) and self._served.has_result(job)
                self._book.killed(Kill(trainer.pid, job, time.time(), has_result))
                trainer.kill()
            else:
                trainer.resume()


def _stopped(trainer: psutil.Process) -> bool:
    while (status := trainer.status()) not in _SETTLED:
        time.sleep(0.001)
    return status == psutil.STATUS_STOPPED
