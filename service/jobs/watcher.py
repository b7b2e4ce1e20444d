"""Following a job: the events that are kept, then new ones as they happen.

The store is the only source; a notice just says "look again". So nothing is
missed or seen twice, however the two race, and a follower costs one flag, not a
queue. Followers live on the event loop, notices come from any thread. `close`
ends all followers.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.errors import Reason, Unavailable
from service.jobs.records import JobEvent
from service.jobs.store import JobStore

_PAGE = 256
POLL_S = 15.0
"""Also without a notice, so that a lost one costs time alone."""
SHARED_POLL_S = 1.0
"""Where other processes write to the database, of which no notice comes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Follower:
    loop: asyncio.AbstractEventLoop
    woken: asyncio.Event


class JobWatcher:
    """Tells followers of jobs what the store has new."""

    def __init__(self, jobs: JobStore) -> None:
        self._jobs = jobs
        self._is_alone = jobs.database.is_exclusive
        self._guard = threading.Lock()
        self._followers: dict[str, set[_Follower]] = {}
        self._is_closed = False
        jobs.listen(self.notify)

    def notify(self, job_id: str) -> None:
        """Says that a job may have new events; from any thread."""
        with self._guard:
            _wake(self._followers.get(job_id, set()))

    def close(self) -> None:
        """Ends every follower with Unavailable; from any thread."""
        with self._guard:
            self._is_closed = True
            for followers in self._followers.values():
                _wake(followers)

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
                    raise Unavailable(
                        Reason.SHUTTING_DOWN,
                        f"the service is stopping: watch again after sequence {after_sequence}",
                        retry_after_s=5.0,
                    )
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
        follower = _Follower(asyncio.get_running_loop(), asyncio.Event())
        with self._guard:
            self._followers.setdefault(job_id, set()).add(follower)
        try:
            yield follower.woken
        finally:
            with self._guard:
                self._followers[job_id].discard(follower)
                if not self._followers[job_id]:
                    del self._followers[job_id]


def _wake(followers: set[_Follower]) -> None:
    for follower in followers:
        try:
            follower.loop.call_soon_threadsafe(follower.woken.set)
        except RuntimeError:
            # Its loop is closed, so nobody follows any more.
            log.debug("a follower's loop is closed")
