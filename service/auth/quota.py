"""Quotas of tenants, and the buckets that meter their calls per second."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Quota:
    """The limits of one tenant; None means no limit."""

    calls_per_second: float | None = None
    concurrent_jobs: int | None = None
    """Jobs that have not ended."""
    stored_bytes: int | None = None
    """Bytes of datasets, versions, registered backbones and jobs."""
    rankings: int | None = None
    """Rankings of backbones that wait or run."""


@dataclass
class _Bucket:
    """Calls that are left at time `at`, in seconds of the clock."""

    left: float
    at: float


class CallMeter:
    """One bucket of calls for each tenant; belongs to the event loop.

    A bucket holds the calls of one second, and at least one, so that a page of
    images sent at once is within the limit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, tenant: str, calls_per_second: float) -> float:
        """Takes one call and returns 0.0; or takes none and returns the seconds until one is left.

        The limit may be another one than at the call before.
        """
        now, capacity = self._clock(), max(1.0, calls_per_second)
        bucket = self._buckets.setdefault(tenant, _Bucket(capacity, now))
        gained = max(0.0, now - bucket.at) * calls_per_second
        bucket.left, bucket.at = min(capacity, bucket.left + gained), now
        if bucket.left >= 1:
            bucket.left -= 1
            return 0.0
        return (1 - bucket.left) / calls_per_second
