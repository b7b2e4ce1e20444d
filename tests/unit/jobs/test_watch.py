import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from service.contract import Note
from service.domain import JobState
from service.errors import NotFound, Reason, Unavailable
from service.jobs import watch as watch_module
from service.jobs.events import JobEvent, StateChanged
from service.jobs.store import JobStore
from service.jobs.watch import Watch
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import GUARD_S
from tests.unit.storage.conftest import TENANT

ALL = ("auto",)


@pytest.fixture
def watch(jobs: JobStore, monkeypatch: pytest.MonkeyPatch) -> Watch:
    # What was missed is not found by a later look.
    monkeypatch.setattr(watch_module, "_LOOK_AGAIN_S", 100 * GUARD_S)
    return Watch(jobs)


@pytest.fixture
def running(jobs: JobStore, queue: Queue) -> str:
    """A job that runs; it has two events."""
    job_id = queue().job_id
    jobs.claim(ALL)
    return job_id


async def numbers(events: AsyncIterator[JobEvent]) -> list[int]:
    return [event.sequence async for event in events]


async def test_what_was_before_is_replayed_and_what_comes_follows_to_the_end(
    watch: Watch, jobs: JobStore, running: str
) -> None:
    events = watch.follow(running, TENANT, 0)
    assert [(await anext(events)).sequence for _ in range(2)] == [1, 2]
    third = asyncio.ensure_future(anext(events))
    await asyncio.to_thread(jobs.append_event, running, Note("info", "x"))
    assert (await asyncio.wait_for(third, GUARD_S)).payload == Note("info", "x")
    await asyncio.to_thread(jobs.fail, running, Reason.TRAINING_FAILED, "no")
    rest = [event async for event in events]
    assert [event.sequence for event in rest] == [4]
    assert rest[0].payload == StateChanged(JobState.FAILED, Reason.TRAINING_FAILED, "no")


async def test_a_job_that_has_ended_is_replayed_from_anywhere(
    watch: Watch, jobs: JobStore, running: str
) -> None:
    jobs.fail(running, Reason.TRAINING_FAILED, "no")
    for after in range(5):
        assert await numbers(watch.follow(running, TENANT, after)) == [1, 2, 3][after:]


async def test_a_job_that_is_not_there_is_told_and_so_is_another_tenants(
    watch: Watch, running: str
) -> None:
    with pytest.raises(NotFound):
        await numbers(watch.follow("job-x", TENANT, 0))
    with pytest.raises(NotFound):
        await numbers(watch.follow(running, "acme", 0))


async def test_an_event_right_after_a_look_is_not_missed(
    watch: Watch, jobs: JobStore, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = jobs.events
    late = [
        lambda: jobs.append_event(running, Note("info", "late")),
        lambda: jobs.fail(running, Reason.TRAINING_FAILED, "late"),
    ]

    def look_then_write(*asked: object) -> list[JobEvent]:
        seen = look(*asked)  # type: ignore[arg-type]
        if late:
            late.pop(0)()
        return seen

    monkeypatch.setattr(jobs, "events", look_then_write)
    async with asyncio.timeout(GUARD_S):
        assert await numbers(watch.follow(running, TENANT, 0)) == [1, 2, 3, 4]


async def test_an_end_between_the_looks_at_events_and_state_is_not_missed(
    watch: Watch, jobs: JobStore, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = jobs.get

    def end_then_get(job_id: str, tenant: str) -> object:
        if get(job_id, tenant).state is JobState.RUNNING:
            jobs.fail(job_id, Reason.TRAINING_FAILED, "late")
        return get(job_id, tenant)

    monkeypatch.setattr(jobs, "get", end_then_get)
    async with asyncio.timeout(GUARD_S):
        assert await numbers(watch.follow(running, TENANT, 2)) == [3]


async def test_more_events_than_a_page_come_in_order(
    watch: Watch, jobs: JobStore, running: str
) -> None:
    for n in range(600):
        jobs.append_event(running, Note("info", str(n)))
    jobs.fail(running, Reason.TRAINING_FAILED, "no")
    assert await numbers(watch.follow(running, TENANT, 0)) == list(range(1, 604))


async def test_followers_that_reconnect_at_random_miss_nothing_and_see_nothing_twice(
    watch: Watch, jobs: JobStore, running: str
) -> None:
    def write() -> None:
        for n in range(150):
            jobs.append_event(running, Note("info", str(n)))
        jobs.fail(running, Reason.TRAINING_FAILED, "no")

    async def follow(pick: random.Random) -> list[int]:
        seen: list[int] = []
        is_over = False
        while not is_over:
            stop_after = pick.randint(1, 20)
            events = watch.follow(running, TENANT, seen[-1] if seen else 0)
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


async def test_a_follower_that_leaves_is_forgotten(
    watch: Watch, jobs: JobStore, running: str
) -> None:
    events = watch.follow(running, TENANT, 0)
    await anext(events)
    assert watch._followers
    await events.aclose()  # type: ignore[attr-defined]
    waiting = asyncio.ensure_future(numbers(watch.follow(running, TENANT, 2)))
    while not watch._followers:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not watch._followers


async def test_closing_ends_followers_with_word_where_to_go_on(
    watch: Watch, jobs: JobStore, running: str
) -> None:
    events = watch.follow(running, TENANT, 0)
    assert [(await anext(events)).sequence for _ in range(2)] == [1, 2]
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    await asyncio.to_thread(watch.close)
    with pytest.raises(Unavailable, match="after sequence 2") as caught:
        await asyncio.wait_for(waiting, GUARD_S)
    assert caught.value.reason is Reason.SHUTTING_DOWN
    with pytest.raises(Unavailable):
        await numbers(watch.follow(running, TENANT, 0))
