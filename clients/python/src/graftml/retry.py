"""When to try again, and after how long: pure, so that sync and async share it.

Repeated is only what is safe to repeat, and only after UNAVAILABLE, or after
RESOURCE_EXHAUSTED where the service said when to come back. Ends with the
call's deadline or after `max_attempts`, whichever is first; the last error is
the one that the caller sees.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from graftml.errors import GraftError, ResourceExhausted, Unavailable, invalid

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Bounded exponential backoff with jitter."""

    max_attempts: int = 4
    """The first one included; 1 means never again."""
    initial_delay_s: float = 0.2
    multiplier: float = 2.0
    max_delay_s: float = 5.0
    reconnect_for_s: float = 120.0
    """How long a job's watcher tries to get a lost stream back."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.multiplier < 1 or self.reconnect_for_s < 0:
            raise invalid("a RetryPolicy needs max_attempts and multiplier of 1 or more")
        if not 0 < self.initial_delay_s <= self.max_delay_s:
            raise invalid("a RetryPolicy needs 0 < initial_delay_s <= max_delay_s")

    def backoff_s(self, attempt: int, jitter: float, retry_after_s: float | None) -> float:
        """The pause after the `attempt`-th failure (from 1); `jitter` is from 0 to 1.

        Between half and all of the exponential step, so that callers who failed
        together do not come back together; never sooner than the service asked.
        """
        # The exponent is bounded: a float overflows long before a watcher gives up.
        step = self.initial_delay_s * self.multiplier ** min(attempt - 1, 64)
        pause = min(step, self.max_delay_s) * (0.5 + jitter / 2)
        return pause if retry_after_s is None else retry_after_s + pause


NO_RETRY = RetryPolicy(max_attempts=1, reconnect_for_s=0)


def is_passing(error: GraftError) -> bool:
    """Whether the same call may well succeed later."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None
    return isinstance(error, Unavailable)


class Attempts:
    """The tries of one call: tells how long each may take and when the next one starts."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        is_safe: bool,
        timeout_s: float,
        clock: Clock = time.monotonic,
        jitter: Clock = random.random,
    ) -> None:
        self._policy, self._is_safe = policy, is_safe
        self._clock, self._jitter = clock, jitter
        self._deadline = clock() + timeout_s
        self._failed = 0

    @property
    def remaining_s(self) -> float:
        """Until the deadline; never negative."""
        return max(0.0, self._deadline - self._clock())

    def pause_s(self, error: GraftError) -> float:
        """How long to wait before the next try; raises `error` where there is none."""
        self._failed += 1
        if not self._is_safe or not is_passing(error) or self._failed >= self._policy.max_attempts:
            raise error
        pause = self._policy.backoff_s(self._failed, self._jitter(), error.retry_after_s)
        if pause >= self.remaining_s:
            raise error
        return pause
