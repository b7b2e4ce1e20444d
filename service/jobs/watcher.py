"""Following a job: the events that are kept, then new ones as they happen.

The store is the only source; a notice just says "look again". So nothing is
missed or seen twice, however the two race, and a follower costs one flag, not a
queue. Followers live on the event loop, notices come from any thread. `close`
ends all followers.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress

from service.errors import stopping
from service.jobs.records import JobEvent
from service.jobs.store import JobStore

_PAGE = 256
POLL_S = 15.0
"""Also without a notice, so that a lost one costs time alone."""
SHARED_POLL_S = 1.0
"""Where other processes write to the database, of which no notice comes."""


class JobWatcher:
    """Tells followers of jobs what the store has new."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._is_alone = jobs.database.is_exclusive
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The followers'; None before the first."""
        self._followers: dict[str, set[asyncio.Event]] = {}
        """Set when there may be something new, by job."""
        self._is_closed = False
        jobs.listen(self.notify)

    def notify(self, job_id: str) -> None:
        """Says that a job may have new events; from any thread."""
        with self._guard:
            self._wake(self._followers.get(job_id, ()))

    def close(self) -> None:
        """Ends every follower with Unavailable; from any thread."""
        with self._guard:
            self._is_closed = True
            for followers in self._followers.values():
                self._wake(followers)

    async def follow(
        self, job_id: str, tenant: str, after_sequence: int
    ) -> AsyncIterator[JobEvent]:
        """The events of a tenant's job after a number, in order, to its last; ends then.

        Raises NotFound (JOB_NOT_FOUND), and Unavailable (SHUTTING_DOWN) when the
        service stops first.
        """
        # Registered before the first look, so that what follows the look wakes it.
        with self._registered(job_id) as woken:
            while True:
                woken.clear()
                events = await asyncio.to_thread(
                    self._jobs.events, job_id, tenant, after_sequence, _PAGE
                )
                for event in events:
                    yield event
                    after_sequence = event.sequence
                    if event.is_last:
                        return
                if len(events) == _PAGE:
                    continue
                if not events and await self._is_over(job_id, tenant, after_sequence):
                    return
                if self._is_closed:
                    raise stopping(f"watch again after sequence {after_sequence}")
                try:
                    async with asyncio.timeout(POLL_S if self._is_alone else SHARED_POLL_S):
                        await woken.wait()
                except TimeoutError:
                    continue

    async def _is_over(self, job_id: str, tenant: str, after_sequence: int) -> bool:
        record = await asyncio.to_thread(self._jobs.get, job_id, tenant)
        # Its end may have come since the look at its events; then there is one more.
        return record.state.is_final and record.last_sequence <= after_sequence

    @contextmanager
    def _registered(self, job_id: str) -> Iterator[asyncio.Event]:
        woken = asyncio.Event()
        with self._guard:
            self._loop = asyncio.get_running_loop()
            self._followers.setdefault(job_id, set()).add(woken)
        try:
            yield woken
        finally:
            with self._guard:
                self._followers[job_id].discard(woken)
                if not self._followers[job_id]:
                    del self._followers[job_id]

    def _wake(self, followers: Iterable[asyncio.Event]) -> None:
        for woken in followers:
            assert self._loop is not None, "it is set with the first follower"
            with suppress(RuntimeError):  # the loop is closed, so nobody follows any more
                self._loop.call_soon_threadsafe(woken.set)
