"""What is in memory: backbones and heads, bounded in bytes.

Least recently used ones leave when the bound is passed, and come back on
demand. Leaving only drops our reference: whoever computes with a session keeps
it alive until done, so there is no race between use and unload. A load in
progress is shared by all who wait for it. Lives on the event loop; loads run in
threads.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

from service.errors import Expired, Reason
from service.telemetry import Telemetry


class Sized(Protocol):
    """Something that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory, about."""


T = TypeVar("T", bound=Sized)


class Loaded(Generic[T]):
    """One kind of loaded things, by digest. `Memory` bounds several kinds together."""

    def __init__(self, kind: str, load: Callable[[Path], T], memory: "Memory") -> None:
        self._kind = kind
        self._load = load
        self._memory = memory
        self._loading: dict[str, asyncio.Task[T]] = {}

    def peek(self, digest: str) -> T | None:
        """The thing if it is in memory; counts as a use."""
        return cast("T | None", self._memory.get(self._kind, digest))

    async def get(self, digest: str, path: Path, timeout_s: float) -> T:
        """The thing, loaded if need be.

        Raises Expired when the load takes longer than `timeout_s` (the load goes
        on for others), or what the loader raises.
        """
        if (thing := self.peek(digest)) is not None:
            return thing
        task = self._loading.get(digest)
        if task is None:
            task = asyncio.create_task(self._load_in_thread(digest, path))
            self._loading[digest] = task
            task.add_done_callback(lambda done: self._loading_ended(digest, done))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the model was not loaded within {timeout_s:.3g} s: try again",
                retry_after_s=timeout_s,
            )
        return task.result()

    async def _load_in_thread(self, digest: str, path: Path) -> T:
        thing = await asyncio.to_thread(self._load, path)
        self._memory.add(self._kind, digest, thing)
        return thing

    def _loading_ended(self, digest: str, task: asyncio.Task[T]) -> None:
        del self._loading[digest]
        failed = task.cancelled() or task.exception() is not None
        self._memory.telemetry.loads.labels(self._kind, "failed" if failed else "ok").inc()


class Memory:
    """The bound that all kinds share, in bytes."""

    def __init__(self, max_bytes: int, telemetry: Telemetry) -> None:
        self._max_bytes = max_bytes
        self._things: OrderedDict[tuple[str, str], Sized] = OrderedDict()
        self._bytes = 0
        self.telemetry = telemetry
        telemetry.loaded_bytes_limit.set(max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is loaded, about."""
        return self._bytes

    def get(self, kind: str, digest: str) -> Sized | None:
        """The thing, which becomes the most recently used."""
        thing = self._things.get((kind, digest))
        if thing is not None:
            self._things.move_to_end((kind, digest))
        return thing

    def add(self, kind: str, digest: str, thing: Sized) -> None:
        """Puts the thing in; older ones leave until the bound holds. The new one stays."""
        self.drop(kind, digest)
        self._things[kind, digest] = thing
        self._account(kind, thing.nbytes, 1)
        while self._bytes > self._max_bytes and len(self._things) > 1:
            (old_kind, _), old = self._things.popitem(last=False)
            self._account(old_kind, -old.nbytes, -1)
            self.telemetry.evictions.labels(old_kind).inc()

    def drop(self, kind: str, digest: str) -> None:
        """Lets the thing go, if it is there."""
        thing = self._things.pop((kind, digest), None)
        if thing is not None:
            self._account(kind, -thing.nbytes, -1)

    def _account(self, kind: str, nbytes: int, count: int) -> None:
        self._bytes += nbytes
        self.telemetry.loaded_bytes.labels(kind).inc(nbytes)
        self.telemetry.loaded.labels(kind).inc(count)
