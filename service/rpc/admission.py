"""Admission of calls: how many of each method run at once, and how many bytes their requests hold.

Calls beyond a limit are refused, not queued. Where several tenants share the server, one of
them gets half of each limit. Health checks are admitted however much other requests hold.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from service.errors import Exhausted, Reason

HEALTH = "/grpc.health.v1.Health/"
"""Prefix of the methods of health checks."""

_MIB = 2**20
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, kw_only=True)
class CallLimits:
    """Limits on the calls that run at once and on their requests."""

    calls: int = 1000
    """Calls of each method that is not named below."""
    uploads: int = 16
    """Calls of UploadDataset, and as many of FineTune and of each that changes a dataset: their
    messages are the large ones."""
    erasures: int = 4
    """Calls of EraseImage, each of which writes whole packs again."""
    watchers: int = 1000
    """Calls of WatchJob."""
    rankings: int = 16
    """Calls of RankBackbones, whose messages may be large ones."""
    backbones: int = 4
    """Calls of RegisterBackbone: backbones are checked one at a time, for minutes."""
    exports: int = 4
    """Calls of ExportModel: each holds the file that it sends."""
    health: int = 10_000
    """Calls of each method of health checks."""
    held_bytes: int = 1024 * _MIB
    """Bytes that the requests of all calls hold once they are parsed."""
    message_timeout_s: float = 60.0
    """Time for a call's request to arrive, and for each answer of a stream to be read."""


class Admission:
    """Counts the calls that run and the bytes that they hold; belongs to the event loop."""

    def __init__(self, limits: CallLimits) -> None:
        self._most_calls = limits.calls
        self._most_of = {
            "/graft.v1.DatasetService/AddImages": limits.uploads,
            "/graft.v1.DatasetService/EraseImage": limits.erasures,
            "/graft.v1.DatasetService/RelabelImages": limits.uploads,
            "/graft.v1.DatasetService/RemoveImages": limits.uploads,
            "/graft.v1.DatasetService/UploadDataset": limits.uploads,
            "/graft.v1.FineTuningService/FineTune": limits.uploads,
            "/graft.v1.FineTuningService/WatchJob": limits.watchers,
            "/graft.v1.FineTuningService/RankBackbones": limits.rankings,
            "/graft.v1.BackboneService/RegisterBackbone": limits.backbones,
            "/graft.v1.ModelService/ExportModel": limits.exports,
            HEALTH + "Check": limits.health,
            HEALTH + "Watch": limits.health,
        }
        self._most_bytes = limits.held_bytes
        self._calls: Counter[str] = Counter()
        self._calls_of: Counter[tuple[str, str]] = Counter()
        self._bytes = 0
        self._bytes_of: Counter[str] = Counter()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._has_released = asyncio.Event()

    def admit(self, method: str, tenant: str | None = None) -> "Slot":
        """Returns a slot, which must be released; raises Exhausted (TOO_MANY_CALLS).

        A `tenant` gets its share of each limit, None all of it.
        """
        most = self._most_of.get(method, self._most_calls)
        if self._calls[method] >= most:
            raise _too_many(f"{most} calls of {method} are under way, the most at once")
        if tenant is not None and self._calls_of[tenant, method] >= _share(most):
            raise _too_many(
                f"{_share(most)} calls of {method} of tenant {tenant} are under way, the most of "
                "one tenant"
            )
        if not method.startswith(HEALTH):
            self._check_bytes(tenant, 1)
            self._is_empty.clear()
        self._calls[method] += 1
        if tenant is not None:
            self._calls_of[tenant, method] += 1
        return Slot(self, method, tenant)

    @property
    def is_empty(self) -> bool:
        """Whether no call but health checks is running."""
        return self._is_empty.is_set()

    async def wait_empty(self) -> None:
        """Waits until no call but health checks is running."""
        await self._is_empty.wait()

    async def wait_bytes(self, tenant: str | None) -> None:
        """Waits until requests may hold more bytes; the caller's deadline bounds it."""
        while self._is_full(tenant, 1):
            self._has_released.clear()
            await self._has_released.wait()

    def hold(self, count: int, tenant: str | None, *, may_exceed: bool) -> None:
        """Counts bytes of a request; raises Exhausted (TOO_MANY_CALLS) beyond the limit."""
        if not may_exceed:
            self._check_bytes(tenant, count)
        self._bytes += count
        if tenant is not None:
            self._bytes_of[tenant] += count

    def release_bytes(self, count: int, tenant: str | None) -> None:
        """Uncounts bytes of a request."""
        self._bytes -= count
        if tenant is not None:
            _subtract(self._bytes_of, tenant, count)
        self._has_released.set()

    def release_call(self, method: str, tenant: str | None) -> None:
        """Uncounts a call."""
        _subtract(self._calls, method, 1)
        if tenant is not None:
            _subtract(self._calls_of, (tenant, method), 1)
        if all(running.startswith(HEALTH) for running in self._calls):
            self._is_empty.set()

    def _is_full(self, tenant: str | None, count: int) -> bool:
        if self._bytes + count > self._most_bytes:
            return True
        return tenant is not None and self._bytes_of[tenant] + count > _share(self._most_bytes)

    def _check_bytes(self, tenant: str | None, count: int) -> None:
        if not self._is_full(tenant, count):
            return
        if tenant is None or self._is_full(None, 1):
            raise _too_many(
                f"requests of {self._most_bytes // _MIB} MiB are being answered, the most at once"
            )
        raise _too_many(
            f"requests of tenant {tenant} of {_share(self._most_bytes) // _MIB} MiB are being "
            "answered, the most of one tenant"
        )


class Slot:
    """The place of one call: counted with the bytes of its requests until it is released."""

    def __init__(self, admission: Admission, method: str, tenant: str | None) -> None:
        self._admission = admission
        self._method = method
        self._tenant = tenant
        self.held_bytes = 0

    def hold(self, count: int, *, may_exceed: bool = False) -> None:
        """Counts bytes of the call's requests, but health checks; raises as `Admission.hold`."""
        if self._method.startswith(HEALTH):
            return
        self._admission.hold(count, self._tenant, may_exceed=may_exceed)
        self.held_bytes += count

    def release_bytes(self, count: int) -> None:
        """Uncounts bytes before the call's end."""
        self._admission.release_bytes(count, self._tenant)
        self.held_bytes -= count

    async def wait_bytes(self) -> None:
        """Waits until the call's requests may hold more bytes."""
        await self._admission.wait_bytes(self._tenant)

    def release(self, _context: object = None) -> None:
        """Releases the slot and its bytes; takes what gRPC gives to callbacks at a call's end."""
        self._admission.release_call(self._method, self._tenant)
        if self.held_bytes:
            self._admission.release_bytes(self.held_bytes, self._tenant)


def _share(most: int) -> int:
    """Returns one tenant's part of a limit, rounded up."""
    return (most + 1) // 2


def _subtract(counter: Counter[Any], key: Any, count: int) -> None:
    counter[key] -= count
    if not counter[key]:
        del counter[key]


def _too_many(what: str) -> Exhausted:
    return Exhausted(
        Reason.TOO_MANY_CALLS, f"{what}: try again later", retry_after_s=_RETRY_AFTER_S
    )
