import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from service.contract import Note
from service.domain import JobState
from service.errors import Reason, Unavailable
from service.jobs import watcher as watcher_module
from service.jobs.claims import Claims
from service.jobs.records import JobEvent, StateChanged
from service.jobs.store import JobRecord, JobStore
from service.jobs.watcher import JobWatcher
from tests.unit.jobs.conftest import Claim, Queue
from tests.unit.jobs.house import GUARD_S
from tests.unit.storage.conftest import TENANT


@pytest.fixture
def watch(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> JobWatcher:
    # What was missed is not found by a later look.
    monkeypatch.setattr(watcher_module, "POLL_S", 100 * GUARD_S)
    return JobWatcher(jobs)


@pytest.fixture
def running(queue: Queue, claim: Claim) -> JobRecord:
    """A job that runs; it has two events."""
    queue()
    job = claim()
    assert job is not None
    return job


async def numbers(events: AsyncIterator[JobEvent]) -> list[int]:
    return [event.sequence async for event in events]


async def test_what_was_before_is_replayed_and_what_comes_follows_to_the_end(
    watch: JobWatcher, jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    events = watch.follow(running.job_id, TENANT, 0)
    assert [(await anext(events)).sequence for _ in range(2)] == [1, 2]
    third = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(claims.append, running, Note("info", "x"))
    assert (await asyncio.wait_for(third, GUARD_S)).payload == Note("info", "x")
    await asyncio.to_thread(claims.fail, running, Reason.TRAINING_FAILED, "no")
    rest = [event async for event in events]
    assert [event.sequence for event in rest] == [4]
    assert rest[0].payload == StateChanged(JobState.FAILED, Reason.TRAINING_FAILED, "no")


async def test_an_event_right_after_a_look_is_not_missed(
    watch: JobWatcher,
    jobs: JobStore,
    claims: Claims,
    running: JobRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = jobs.events
    late = [
        lambda: claims.append(running, Note("info", "late")),
        lambda: claims.fail(running, Reason.TRAINING_FAILED, "late"),
    ]

    def look_then_write(*asked: object) -> list[JobEvent]:
        seen = look(*asked)  # type: ignore[arg-type]
        if late:
            late.pop(0)()
        return seen

    monkeypatch.setattr(jobs, "events", look_then_write)
    async with asyncio.timeout(GUARD_S):
        assert await numbers(watch.follow(running.job_id, TENANT, 0)) == [1, 2, 3, 4]


async def test_an_end_between_the_looks_at_events_and_state_is_not_missed(
    watch: JobWatcher,
    jobs: JobStore,
    claims: Claims,
    running: JobRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get = jobs.get

    def end_then_get(job_id: str, tenant: str) -> object:
        if get(job_id, tenant).state is JobState.RUNNING:
            claims.fail(running, Reason.TRAINING_FAILED, "late")
        return get(job_id, tenant)

    monkeypatch.setattr(jobs, "get", end_then_get)
    async with asyncio.timeout(GUARD_S):
        assert await numbers(watch.follow(running.job_id, TENANT, 2)) == [3]


async def test_more_events_than_a_page_come_in_order(
    watch: JobWatcher, jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    for n in range(600):
        claims.append(running, Note("info", str(n)))
    claims.fail(running, Reason.TRAINING_FAILED, "no")
    assert await numbers(watch.follow(running.job_id, TENANT, 0)) == list(range(1, 604))


async def test_followers_that_reconnect_at_random_miss_nothing_and_see_nothing_twice(
    watch: JobWatcher, jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    def write() -> None:
        for n in range(150):
            claims.append(running, Note("info", str(n)))
        claims.fail(running, Reason.TRAINING_FAILED, "no")

    async def follow(pick: random.Random) -> list[int]:
        seen: list[int] = []
        is_over = False
        while not is_over:
            stop_after = pick.randint(1, 20)
            events = watch.follow(running.job_id, TENANT, seen[-1] if seen else 0)
            async for event in events:
                seen.append(event.sequence)
                is_over = event.is_last
                stop_after -= 1
                if stop_after == 0:
                    break
            await events.aclose()  # type: ignore[attr-defined]
        return seen

    async with asyncio.timeout(GUARD_S):
        *all_seen, _ = await asyncio.gather(
            *(follow(random.Random(n)) for n in range(5)), asyncio.to_thread(write)
        )
    assert all(seen == list(range(1, 154)) for seen in all_seen)


async def test_what_another_process_writes_is_seen_without_a_notice(
    jobs: JobStore, claims: Claims, running: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher_module, "POLL_S", 100 * GUARD_S)
    monkeypatch.setattr(watcher_module, "SHARED_POLL_S", 0.01)
    monkeypatch.setattr(jobs.database, "is_exclusive", False)
    watch = JobWatcher(jobs)
    following = asyncio.ensure_future(numbers(watch.follow(running.job_id, TENANT, 0)))
    while not watch._followers:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    # As another process does, whose notices come to its own followers alone.
    monkeypatch.setattr(jobs, "note", lambda _: None)
    await asyncio.to_thread(claims.fail, running, Reason.TRAINING_FAILED, "no")
    assert await asyncio.wait_for(following, GUARD_S) == [1, 2, 3]


async def test_a_follower_that_leaves_is_forgotten(
    watch: JobWatcher, jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    events = watch.follow(running.job_id, TENANT, 0)
    await anext(events)
    assert watch._followers
    await events.aclose()  # type: ignore[attr-defined]
    waiting = asyncio.ensure_future(numbers(watch.follow(running.job_id, TENANT, 2)))
    while not watch._followers:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not watch._followers


async def test_closing_ends_followers_with_word_where_to_go_on(
    watch: JobWatcher, jobs: JobStore, claims: Claims, running: JobRecord
) -> None:
    events = watch.follow(running.job_id, TENANT, 0)
    assert [(await anext(events)).sequence for _ in range(2)] == [1, 2]
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    await asyncio.to_thread(watch.close)
    with pytest.raises(Unavailable, match="after sequence 2") as caught:
        await asyncio.wait_for(waiting, GUARD_S)
    assert caught.value.reason is Reason.SHUTTING_DOWN
    with pytest.raises(Unavailable):
        await numbers(watch.follow(running.job_id, TENANT, 0))
