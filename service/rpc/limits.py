"""How many calls may be under way, and how much their requests may hold; more are refused.

Whatever a call costs is bounded by its method: those that bring pictures to keep,
those that wait for a job's events, and one that composes a file in memory have
bounds of their own. Health checks always find room.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Self

from service.errors import Exhausted, Reason

HEALTH = "/grpc.health.v1.Health/"
"""What methods of health checks begin with."""

_MIB = 2**20

_GROUPS = {
    "/graft.v1.DatasetService/UploadDataset": "uploads",
    "/graft.v1.FineTuningService/FineTune": "uploads",
    "/graft.v1.FineTuningService/WatchJob": "watchers",
    "/graft.v1.FineTuningService/RankBackbones": "rankings",
    "/graft.v1.ModelService/ExportModel": "exports",
    HEALTH + "Watch": "health watchers",
}
"""Methods that share a bound; any other one has one alone."""

_SMALL = {HEALTH + "Check", "health watchers"}
"""Health checks: answered however much other requests hold, and not waited for."""


@dataclass(frozen=True, kw_only=True)
class CallBounds:
    """Of calls at once, and of their requests."""

    calls: int = 1000
    """Of each method that has no bound of its own."""
    uploads: int = 16
    """Of UploadDataset and FineTune together, whose messages are the large ones."""
    watchers: int = 1000
    rankings: int = 16
    """Their pictures come along; nine of them wait at most, the others are refused soon."""
    exports: int = 4
    """Each holds the file that it composes."""
    health_watchers: int = 10_000
    held_bytes: int = 1024 * _MIB
    """Of requests that are being answered."""
    message_timeout_s: float = 60.0
    """For one message to arrive, or to be taken by its reader."""


class Limits:
    """Counts what is under way."""

    def __init__(self, bounds: CallBounds) -> None:
        self._bounds = bounds
        self._most = {
            "uploads": bounds.uploads,
            "watchers": bounds.watchers,
            "rankings": bounds.rankings,
            "exports": bounds.exports,
            "health watchers": bounds.health_watchers,
        }
        self._under_way: Counter[str] = Counter()
        self._held_bytes = 0
        self._emptied = asyncio.Event()
        self._emptied.set()

    def place(self, method: str) -> "Place":
        """A place for one call; as a context it is given back at the end."""
        return Place(self, _GROUPS.get(method, method))

    def take(self, group: str) -> None:
        """Raises Exhausted (TOO_MANY_CALLS) where there is no place."""
        most = self._most.get(group, self._bounds.calls)
        if self._under_way[group] >= most:
            what = group if group in self._most else f"calls of {group}"
            raise _too_many(f"{most} {what} are under way, the most at once")
        if self._held_bytes >= self._bounds.held_bytes and group not in _SMALL:
            raise self._full()
        self._under_way[group] += 1
        if group not in _SMALL:
            self._emptied.clear()

    @property
    def is_empty(self) -> bool:
        """Whether no call but health's is under way."""
        return self._emptied.is_set()

    async def empty(self) -> None:
        """Waits until no call but health's is under way."""
        await self._emptied.wait()

    def hold(self, count: int) -> None:
        """Counts bytes of a request; raises Exhausted (TOO_MANY_CALLS) if they are too many."""
        if self._held_bytes + count > self._bounds.held_bytes:
            raise self._full()
        self._held_bytes += count

    def leave(self, group: str, held_bytes: int) -> None:
        """Gives back a place and what was held."""
        self._under_way[group] -= 1
        if not self._under_way[group]:
            del self._under_way[group]
            if not self._under_way.keys() - _SMALL:
                self._emptied.set()
        self._held_bytes -= held_bytes

    def _full(self) -> Exhausted:
        most = self._bounds.held_bytes // _MIB
        return _too_many(f"requests of {most} MiB are being answered, the most at once")


class Place:
    """One call's."""

    def __init__(self, limits: Limits, group: str) -> None:
        self._limits = limits
        self._group = group
        self._held_bytes = 0

    def __enter__(self) -> Self:
        self._limits.take(self._group)
        return self

    def __exit__(self, *_: object) -> None:
        self._limits.leave(self._group, self._held_bytes)

    def hold(self, count: int) -> None:
        """Counts bytes of the call's request until its end; raises as `Limits.hold`."""
        self._limits.hold(count)
        self._held_bytes += count


def _too_many(what: str) -> Exhausted:
    return Exhausted(Reason.TOO_MANY_CALLS, f"{what}: try again later", retry_after_s=1.0)
