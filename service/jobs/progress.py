"""Chooses the progress of a stage that is kept, of all that a trainer or a reader tells."""

from collections.abc import Callable

import msgspec

from service.contract import Progressed

_STEP = 0.01
"""Smaller steps within a stage are not kept, so that a stage has some 100 events."""
_DUE_S = 15.0
"""After so long a smaller step is kept too, so that a long stage shows that it gets on."""


class ShownProgress:
    """Decides which progress is kept, and says how long its stage has taken."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = self._kept_s = clock()
        self._kept: Progressed | None = None

    def next(self, record: Progressed) -> Progressed | None:
        """Returns the record with its stage's time; None for a step that is too small to keep."""
        now, kept = self._clock(), self._kept
        # A stage may have parts (the training images, the validation images), each from 0 anew.
        if kept is None or kept.stage != record.stage or record.fraction < kept.fraction:
            self._began_s = now
        elif not self._is_step(kept, record, now):
            return None
        self._kept, self._kept_s = record, now
        return msgspec.structs.replace(record, elapsed_s=now - self._began_s)

    def _is_step(self, kept: Progressed, record: Progressed, now: float) -> bool:
        moved = abs(record.fraction - kept.fraction)
        is_end = record.fraction >= 1 > kept.fraction
        is_due = moved > 0 and now - self._kept_s >= _DUE_S
        return moved >= _STEP or is_end or is_due
