"""What each version was asked and where the time went, since the process started.

Bounded: versions that were not asked for longest leave, and deleted ones at once.
Lives on the event loop alone. Counts that it hands out never change.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

MAX_VERSIONS = 20_000
"""Some 400 bytes each."""


class Spent(msgspec.Struct, frozen=True):
    """How many calls, and their time in all."""

    count: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float) -> "Spent":
        """With one more call."""
        return Spent(self.count + 1, self.seconds + seconds)


class Counts(msgspec.Struct, frozen=True):
    """What one version was asked. Stages are of answered calls alone."""

    images: int = 0
    """That were answered."""
    success: Spent = Spent()
    fail: Spent = Spent()
    queue: Spent = Spent()
    decode: Spent = Spent()
    infer: Spent = Spent()
    rest: Spent = Spent()
    """Of the whole time, what no other stage took."""
    last_s: float = 0.0
    """When it last answered, in seconds since 1970; 0 for never."""


NOTHING = Counts()


class Tally:
    """Where one version's calls are counted; once it has left, in vain."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts = NOTHING
        self._clock = clock

    def record(
        self,
        *,
        images: int,
        ok: bool,
        queue_s: float,
        decode_s: float,
        infer_s: float,
        total_s: float,
    ) -> None:
        """Adds one call that has ended; of one that failed only `total_s` counts."""
        old = self.counts
        if not ok:
            self.counts = msgspec.structs.replace(old, fail=old.fail.plus(total_s))
            return
        rest_s = max(0.0, total_s - queue_s - decode_s - infer_s)
        self.counts = Counts(
            images=old.images + images,
            success=old.success.plus(total_s),
            fail=old.fail,
            queue=old.queue.plus(queue_s),
            decode=old.decode.plus(decode_s),
            infer=old.infer.plus(infer_s),
            rest=old.rest.plus(rest_s),
            last_s=self._clock(),
        )


class Statistics:
    """Counts for each version of each model."""

    def __init__(
        self, max_versions: int = MAX_VERSIONS, clock: Callable[[], float] = time.time
    ) -> None:
        self._max_versions = max_versions
        self._clock = clock
        self._tallies: OrderedDict[tuple[str, int], Tally] = OrderedDict()

    def tally(self, model: str, version: int) -> Tally:
        """Where a call counts; to be taken before the call, which may outlive its version."""
        key = model, version
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally(self._clock)
            if len(self._tallies) > self._max_versions:
                self._tallies.popitem(last=False)
        self._tallies.move_to_end(key)
        return tally

    def forget(self, model: str, version: int) -> None:
        """Drops a deleted version's counts: another of that name and number begins at zero."""
        self._tallies.pop((model, version), None)

    def of(self, model: str, version: int) -> Counts:
        """What a version was asked; zeros when nothing is known."""
        tally = self._tallies.get((model, version))
        return NOTHING if tally is None else tally.counts

    def all(self) -> dict[tuple[str, int], Counts]:
        """Everything known, by model and version; the caller's to keep."""
        return {key: tally.counts for key, tally in self._tallies.items()}
