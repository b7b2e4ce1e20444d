"""Jobs that were postponed: how long each is let be, and which has waited too long.

A job is postponed when the disk has no room for it, or somebody holds what it needs.
Kept in memory alone: with the next process each begins anew. Not for threads.
"""

import math
import time
from dataclasses import dataclass

from service.jobs.settings import Settings


@dataclass
class _Wait:
    since_s: float
    until_s: float
    tries: int


class Patience:
    """The postponed jobs of one process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._waits: dict[str, _Wait] = {}

    def postpone(self, job_id: str) -> None:
        """Lets a job be for a while, longer each time."""
        now_s = time.monotonic()
        wait = self._waits.setdefault(job_id, _Wait(now_s, now_s, 0))
        wait.until_s = now_s + self._settings.postponed_s(wait.tries)
        wait.tries += 1

    def is_over(self, job_id: str) -> bool:
        """Whether a job was postponed first so long ago that it is not to be again."""
        wait = self._waits.get(job_id)
        return wait is not None and time.monotonic() - wait.since_s > self._settings.room_timeout_s

    def forget(self, job_id: str) -> None:
        """For a job that has ended; one that is not known is fine."""
        self._waits.pop(job_id, None)

    def let_be(self) -> list[str]:
        """The jobs that are not to be tried yet."""
        now_s = time.monotonic()
        return [job_id for job_id, wait in self._waits.items() if wait.until_s > now_s]

    def next_s(self) -> float:
        """How long until the next of those may be tried; endless where there is none."""
        now_s = time.monotonic()
        left_s = [wait.until_s - now_s for wait in self._waits.values() if wait.until_s > now_s]
        return min(left_s, default=math.inf)
