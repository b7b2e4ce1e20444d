"""Backbones and heads in memory, bounded in bytes.

Least recently used ones are evicted when the bound is passed, and come back on demand; pinned
ones stay. Eviction only drops the cache's reference: whoever computes with a session keeps it
alive until done, so there is no race between use and eviction. A load in progress is shared by
all who wait for it. Lives on the event loop; loads run in threads.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

from service.errors import Exhausted, Expired, Reason
from service.ops.metrics import Metrics


class Sized(Protocol):
    """Something that knows its bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory, about."""


T = TypeVar("T", bound=Sized)


class Cache(Generic[T]):
    """Things of one kind, by digest. A `MemoryBudget` bounds several kinds together."""

    def __init__(self, kind: str, load: Callable[[str], T], memory: "MemoryBudget") -> None:
        """`load` makes the thing of a digest, in a thread."""
        self._kind = kind
        self._load = load
        self._memory = memory
        self._loading: dict[str, asyncio.Task[T]] = {}
        self._hits = memory.metrics.hits.labels(kind)

    def peek(self, digest: str) -> T | None:
        """Returns the thing if it is in memory; counts as a use."""
        thing = self._memory.get(self._kind, digest)
        if thing is not None:
            self._hits.inc()
        return cast("T | None", thing)

    async def get(self, digest: str, timeout_s: float) -> T:
        """Returns the thing, loaded if need be.

        Raises Expired when the load takes longer than `timeout_s` (the load goes
        on for others), or what the loader raises.
        """
        if (thing := self.peek(digest)) is not None:
            return thing
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load_in_thread(digest))
            task.add_done_callback(lambda ended: self._loading_ended(ended, digest))
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the model was not loaded within {timeout_s:.3g} s: try again",
                retry_after_s=timeout_s,
            )
        return task.result()

    async def _load_in_thread(self, digest: str) -> T:
        outcome = "failed"
        try:
            thing = await asyncio.to_thread(self._load, digest)
            outcome = "ok"
        finally:
            self._memory.metrics.loads.labels(self._kind, outcome).inc()
        self._memory.add(self._kind, digest, thing)
        return thing

    def _loading_ended(self, ended: "asyncio.Task[T]", digest: str) -> None:
        del self._loading[digest]
        # Read, or asyncio logs an error that came when nobody waited any more.
        if not ended.cancelled():
            ended.exception()


@dataclass
class Entry:
    """A thing in memory."""

    thing: Sized
    nbytes: int
    used: float
    """When it was last used, by time.monotonic."""


class MemoryBudget:
    """Bounds all kinds together, in bytes."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()
        # Kept apart, so that eviction need not skip them.
        self._pinned: dict[tuple[str, str], Entry] = {}
        self._bytes = 0
        self.metrics = metrics
        metrics.loaded_bytes_limit.set(max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of everything in memory, about."""
        return self._bytes

    def has(self, kind: str, digest: str) -> bool:
        """Tells whether the thing is in memory; does not count as a use."""
        return (kind, digest) in self._entries or (kind, digest) in self._pinned

    def get(self, kind: str, digest: str) -> Sized | None:
        """Returns the thing, which becomes the most recently used."""
        key = kind, digest
        entry = self._entries.get(key)
        if entry is None:
            pinned = self._pinned.get(key)
            return pinned.thing if pinned else None
        self._entries.move_to_end(key)
        entry.used = time.monotonic()
        return entry.thing

    def add(self, kind: str, digest: str, thing: Sized) -> None:
        """Adds a thing; evicts others until the bound holds, but never the new one."""
        key = kind, digest
        entry = Entry(thing, thing.nbytes, time.monotonic())
        if key in self._pinned:
            self._account(kind, -self._pinned[key].nbytes, -1)
            self._pinned[key] = entry
        else:
            self.drop(kind, digest)
            self._entries[key] = entry
        self._account(kind, entry.nbytes, 1)
        self._make_room(key)

    def pin(self, keys: Collection[tuple[str, str]]) -> None:
        """Keeps those of these that are in memory there until they are unpinned.

        Raises Exhausted (OUT_OF_MEMORY) when all that is pinned would fill the bound.
        """
        more = [key for key in keys if key in self._entries]
        nbytes = sum(entry.nbytes for entry in self._pinned.values())
        nbytes += sum(self._entries[key].nbytes for key in more)
        # One that was evicted while the rest was loaded found no room beside the pinned ones.
        if nbytes > self._max_bytes or not all(self.has(*key) for key in keys):
            raise Exhausted(
                Reason.OUT_OF_MEMORY,
                f"with this model the pinned ones would take more than the bound of "
                f"{self._max_bytes / 2**20:.0f} MiB: unpin others or raise the bound",
            )
        for key in more:
            self._pinned[key] = self._entries.pop(key)

    def nbytes_of(self, keys: Collection[tuple[str, str]]) -> int:
        """Adds up the bytes, about, of those of these that are in memory."""
        found = (self._entries.get(key) or self._pinned.get(key) for key in keys)
        return sum(entry.nbytes for entry in found if entry is not None)

    def unpin(self, keys: Iterable[tuple[str, str]]) -> None:
        """Allows these to be evicted again; they count as used just now."""
        for key in keys:
            entry = self._pinned.pop(key, None)
            if entry is not None:
                entry.used = time.monotonic()
                self._entries[key] = entry

    def drop(self, kind: str, digest: str) -> None:
        """Removes a thing if it is there, pinned or not."""
        entry = self._entries.pop((kind, digest), None) or self._pinned.pop((kind, digest), None)
        if entry is not None:
            self._account(kind, -entry.nbytes, -1)

    def _make_room(self, newest: tuple[str, str]) -> None:
        while self._bytes > self._max_bytes and self._entries:
            key, old = self._entries.popitem(last=False)
            if key == newest:
                self._entries[key] = old
                return
            self._account(key[0], -old.nbytes, -1)
            self.metrics.evictions.labels(key[0]).inc()
            self.metrics.eviction_age_seconds.labels(key[0]).observe(time.monotonic() - old.used)

    def _account(self, kind: str, nbytes: int, count: int) -> None:
        self._bytes += nbytes
        self.metrics.loaded_bytes.labels(kind).inc(nbytes)
        self.metrics.loaded.labels(kind).inc(count)
