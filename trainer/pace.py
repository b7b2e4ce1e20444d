"""Measures the pace of a stage, and how long it may still take."""

import time
from collections import deque
from collections.abc import Callable

_WINDOW_S = 30.0
"""Seconds that the pace is measured over: the first images may all come from the cache."""
_LEAST_S = 1.0
"""Shorter measurements say nothing."""


class Pace:
    """Measures how fast units (steps, images) are done; not safe from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])

    def reached(self, done: int) -> None:
        """Notes that `done` units are done, counted from the start."""
        now = self._clock()
        self._marks.append((now, done))
        # The oldest mark kept is the last one that lies before the window.
        while len(self._marks) > 2 and now - self._marks[1][0] >= _WINDOW_S:
            self._marks.popleft()

    @property
    def unit_s(self) -> float | None:
        """Returns the seconds that a unit took lately; None while that is not known."""
        (began, before), (now, done) = self._marks[0], self._marks[-1]
        if done <= before or now - began < _LEAST_S:
            return None
        return (now - began) / (done - before)

    def remaining_s(self, left: int) -> float | None:
        """Returns the seconds that `left` further units take; None while that is not known."""
        unit_s = self.unit_s
        return None if unit_s is None else left * unit_s
