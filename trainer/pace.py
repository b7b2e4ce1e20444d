"""Measures the pace of a stage, and how long it may still take."""

import math
import time
from collections import deque
from collections.abc import Callable

from service.contract import Progressed

_WINDOW_S = 30.0
"""Seconds that the pace is measured over: the first images may all come from the cache."""
_LEAST_S = 1.0
"""Shorter measurements say nothing."""
_BEFORE_THE_END = 0.999


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


class OutOfTimeError(Exception):
    """Raised where all epochs were asked for, and the deadline has no room for them."""

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"{needed_s:.0f} s are needed")
        self.needed_s = needed_s
        """Of all epochs, what was spent already included."""


class Epochs:
    """Tells how far a training is, and for how many epochs a deadline has room.

    Each has `steps` steps, then something is measured. Times are of `time.monotonic()`. Where
    it `is_whole`, all epochs are needed, and no time for them is an error.
    """

    def __init__(self, deadline: float | None, now: float, *, is_whole: bool) -> None:
        self.deadline = deadline
        self.steps = 1
        self.step_s: float | None = None
        """Seconds a step of the last epoch; before the first, as planned."""
        self.judging_s = 0.0
        """Seconds that measuring takes in an epoch."""
        self._is_whole, self._began, self._spent_before_s = is_whole, now, 0.0
        self._pace, self._fraction = Pace(), 0.0

    def go_on(self, spent_s: float) -> None:
        """Counts what an earlier attempt spent."""
        self._spent_before_s = spent_s
        if self.deadline is not None:
            self.deadline -= spent_s

    def spent_s(self, now: float) -> float:
        """Returns the seconds that were spent, by earlier attempts too."""
        return self._spent_before_s + now - self._began

    def begin(self) -> None:
        """Begins an epoch."""
        self._pace = Pace()

    def reached(self, step: int) -> None:
        """Notes that `step` steps of the epoch are done."""
        self._pace.reached(step)

    def room(self, done: int, epochs: int, epoch_s: float, now: float) -> int:
        """Counts the epochs that there is time for of `epochs`, `done` ones included; 1 at least.

        Raises OutOfTimeError where all are needed.
        """
        if self.deadline is None:
            return epochs
        room = max(1, done + max(0, int((self.deadline - now) / epoch_s)))
        if self._is_whole and room < epochs:
            raise OutOfTimeError(self.spent_s(now) + (epochs - done) * epoch_s)
        return min(room, epochs)

    def progress(self, epoch: int, epochs: int, step: int, detail: str, now: float) -> Progressed:
        """Describes where `step` steps of `epoch` are done, of `epochs`."""
        step_s = self._pace.unit_s or self.step_s
        learning_s = self.steps * (step_s or 1.0)
        learning_part = learning_s / (learning_s + self.judging_s)
        done = epoch - 1 + learning_part * step / max(1, self.steps)
        # Never back, though the parts are measured ever better, and never 1 before the end.
        self._fraction = max(self._fraction, min(done / epochs, _BEFORE_THE_END))
        left_s = None
        if step_s is not None:
            left_s = (self.steps - step) * step_s + self.judging_s
            left_s += (epochs - epoch) * (self.steps * step_s + self.judging_s)
            # The epochs that find no time are cut.
            over_s = math.inf if self.deadline is None else self.deadline - now
            left_s = max(0.0, min(left_s, over_s))
        return Progressed(
            "training",
            self._fraction,
            detail,
            step=(epoch - 1) * self.steps + step,
            steps=epochs * self.steps,
            remaining_s=left_s,
        )

    def ended(self, epochs: int) -> Progressed:
        """Describes the end."""
        steps = epochs * self.steps
        return Progressed(
            "training", 1.0, f"{epochs} epochs are done", step=steps, steps=steps, remaining_s=0.0
        )
