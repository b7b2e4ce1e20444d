"""What each version was asked and where the time went, since the process started.

Bounded: versions that were not asked for longest leave. Lives on the event
loop alone. What it hands out never changes.
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

    pictures: int = 0
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


class Statistics:
    """Counts for each version of each model."""

    def __init__(
        self, max_versions: int = MAX_VERSIONS, clock: Callable[[], float] = time.time
    ) -> None:
        self._max_versions = max_versions
        self._clock = clock
        self._counts: OrderedDict[tuple[str, int], Counts] = OrderedDict()

    def record(
        self,
        model: str,
        version: int,
        *,
        pictures: int,
        ok: bool,
        queue_s: float,
        decode_s: float,
        infer_s: float,
        total_s: float,
    ) -> None:
        """Adds one call that has ended; of one that failed only `total_s` counts."""
        old = self.of(model, version)
        if ok:
            rest_s = max(0.0, total_s - queue_s - decode_s - infer_s)
            new = Counts(
                pictures=old.pictures + pictures,
                success=old.success.plus(total_s),
                fail=old.fail,
                queue=old.queue.plus(queue_s),
                decode=old.decode.plus(decode_s),
                infer=old.infer.plus(infer_s),
                rest=old.rest.plus(rest_s),
                last_s=self._clock(),
            )
        else:
            new = msgspec.structs.replace(old, fail=old.fail.plus(total_s))
        self._counts[model, version] = new
        self._counts.move_to_end((model, version))
        if len(self._counts) > self._max_versions:
            self._counts.popitem(last=False)

    def of(self, model: str, version: int) -> Counts:
        """What a version was asked; zeros when nothing is known."""
        return self._counts.get((model, version), NOTHING)

    def all(self) -> dict[tuple[str, int], Counts]:
        """Everything known, by model and version; the caller's to keep."""
        return dict(self._counts)
