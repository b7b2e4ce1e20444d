"""How many calls may be under way, and how much their requests may hold; more are refused.

Whatever a call costs is bounded by its method: those that bring images to keep,
those that wait for a job's events, and one that composes a file in memory have
bounds of their own. Where there are several tenants, one of them gets half of each bound.
Health checks always find room.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from service.errors import Exhausted, Reason

HEALTH = "/grpc.health.v1.Health/"
"""What methods of health checks begin with."""

_MIB = 2**20

_LATE = "requests on their way"

_GROUPS = {
    "/graft.v1.DatasetService/UploadDataset": "uploads",
    "/graft.v1.FineTuningService/FineTune": "uploads",
    "/graft.v1.BackboneService/RegisterBackbone": "backbones",
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
    """Their images come along; nine of them wait at most, the others are refused soon."""
    backbones: int = 4
    """Registered ones, which are checked one at a time, in minutes."""
    exports: int = 4
    """Each holds the file that it composes."""
    health_watchers: int = 10_000
    held_bytes: int = 1024 * _MIB
    """Of requests that are being answered."""
    late: int = 16
    """Of calls whose one request is longer on its way than `messages.GRACE_S`."""
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
            "backbones": bounds.backbones,
            "exports": bounds.exports,
            "health watchers": bounds.health_watchers,
            _LATE: bounds.late,
        }
        self._under_way: Counter[str] = Counter()
        self._of_tenants: Counter[tuple[str, str]] = Counter()
        self._held_bytes = 0
        self._tenants_bytes: Counter[str] = Counter()
        self._waiting: set[asyncio.Event] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def place(self, method: str, tenant: str | None = None) -> "Place":
        """A place for one call; as a context it is given back at the end.

        Without a `tenant` the call may have the last one there is.
        """
        return Place(self, _GROUPS.get(method, method), tenant)

    def take(self, group: str, tenant: str | None) -> None:
        """Raises Exhausted (TOO_MANY_CALLS) where there is no place."""
        most = self._most.get(group, self._bounds.calls)
        what = group if group in self._most else f"calls of {group}"
        if self._under_way[group] >= most:
            raise _too_many(f"{most} {what} are under way, the most at once")
        if tenant is not None and self._of_tenants[tenant, group] >= _share(most):
            raise _too_many(
                f"{_share(most)} {what} of tenant {tenant} are under way, the most of one tenant"
            )
        # What is late has its call's place already.
        if group not in _SMALL and group != _LATE and self._is_full(tenant, 1):
            raise self._full(tenant)
        self._under_way[group] += 1
        if tenant is not None:
            self._of_tenants[tenant, group] += 1
        if group not in _SMALL:
            self._emptied.clear()

    @property
    def is_empty(self) -> bool:
        """Whether no call but health's is under way."""
        return self._emptied.is_set()

    async def empty(self) -> None:
        """Waits until no call but health's is under way."""
        await self._emptied.wait()

    async def room(self, tenant: str | None) -> None:
        """Waits until the bounds let something more be held."""
        while self._is_full(tenant, 1):
            freed = asyncio.Event()
            self._waiting.add(freed)
            try:
                await freed.wait()
            finally:
                self._waiting.discard(freed)

    def hold(self, count: int, tenant: str | None, *, is_over_allowed: bool) -> None:
        """Counts bytes of a request; raises Exhausted (TOO_MANY_CALLS) if they are too many."""
        if not is_over_allowed and self._is_full(tenant, count):
            raise self._full(tenant)
        self._held_bytes += count
        if tenant is not None:
            self._tenants_bytes[tenant] += count

    def release(self, count: int, tenant: str | None) -> None:
        """Counts them no more."""
        self._held_bytes -= count
        if tenant is not None:
            _lower(self._tenants_bytes, tenant, count)
        for freed in self._waiting:
            freed.set()

    def leave(self, group: str, tenant: str | None) -> None:
        """Gives back a place."""
        _lower(self._under_way, group, 1)
        if tenant is not None:
            _lower(self._of_tenants, (tenant, group), 1)
        if not self._under_way.keys() - _SMALL:
            self._emptied.set()

    def _is_full(self, tenant: str | None, count: int) -> bool:
        most = self._bounds.held_bytes
        if self._held_bytes + count > most:
            return True
        return tenant is not None and self._tenants_bytes[tenant] + count > _share(most)

    def _full(self, tenant: str | None) -> Exhausted:
        most = self._bounds.held_bytes
        if self._is_full(None, 1) or tenant is None:
            return _too_many(f"requests of {most // _MIB} MiB are being answered, the most at once")
        return _too_many(
            f"requests of tenant {tenant} of {_share(most) // _MIB} MiB are being answered, the "
            "most of one tenant"
        )


class Place:
    """One call's."""

    def __init__(self, limits: Limits, group: str, tenant: str | None) -> None:
        self._limits = limits
        self._group = group
        self._tenant = tenant
        self.held_bytes = 0

    def __enter__(self) -> Self:
        self._limits.take(self._group, self._tenant)
        return self

    def __exit__(self, *_: object) -> None:
        self._limits.leave(self._group, self._tenant)
        if self.held_bytes:
            self._limits.release(self.held_bytes, self._tenant)

    def late(self) -> "Place":
        """One for the call's request, which is long on its way."""
        return Place(self._limits, _LATE, self._tenant)

    def hold(self, count: int, *, is_over_allowed: bool = False) -> None:
        """Counts bytes of the call's requests until its end; raises as `Limits.hold`."""
        self._limits.hold(count, self._tenant, is_over_allowed=is_over_allowed)
        self.held_bytes += count

    def release(self, count: int) -> None:
        """Counts them no more, before the call's end."""
        self._limits.release(count, self._tenant)
        self.held_bytes -= count

    async def room(self) -> None:
        """Waits as `Limits.room`."""
        await self._limits.room(self._tenant)


def _share(most: int) -> int:
    """One tenant's, rounded up."""
    return (most + 1) // 2


def _lower(counter: Counter[Any], key: Any, count: int) -> None:
    counter[key] -= count
    if not counter[key]:
        del counter[key]


def _too_many(what: str) -> Exhausted:
    return Exhausted(Reason.TOO_MANY_CALLS, f"{what}: try again later", retry_after_s=1.0)
