"""Streams: as ready, a bounded number at once, nothing left running."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.rpc import bounded_pipeline

GUARD_S = 60.0


class Work:
    """Answers numbers when told to."""

    def __init__(self) -> None:
        self.doors: dict[int, asyncio.Event] = {}
        self.changed = asyncio.Condition()
        self.read = 0
        self.cancelled = 0

    async def requests(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            self.read += 1
            yield number

    async def answer(self, number: int) -> int:
        async with self.changed:
            self.doors[number] = asyncio.Event()
            self.changed.notify_all()
        try:
            await self.doors[number].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number

    async def working_on(self, count: int) -> None:
        """Returns once so many requests are being worked on."""
        async with asyncio.timeout(GUARD_S), self.changed:
            await self.changed.wait_for(lambda: len(self.doors) >= count)


async def test_answers_come_in_the_order_of_completion() -> None:
    work = Work()
    answers = bounded_pipeline.answers(work.requests(3), work.answer)
    first = asyncio.ensure_future(anext(answers))
    await work.working_on(3)
    work.doors[2].set()
    assert await first == 2
    work.doors[0].set()
    assert await anext(answers) == 0
    work.doors[1].set()
    assert [answer async for answer in answers] == [1]


async def test_no_more_requests_are_read_than_the_window_holds() -> None:
    work = Work()
    answers = bounded_pipeline.answers(work.requests(100), work.answer)
    first = asyncio.ensure_future(anext(answers))
    await work.working_on(bounded_pipeline.WINDOW)
    # One more is read, and waits for room.
    assert work.read <= bounded_pipeline.WINDOW + 1
    work.doors[5].set()
    assert await first == 5
    await work.working_on(bounded_pipeline.WINDOW + 1)
    assert work.read <= bounded_pipeline.WINDOW + 2
    await answers.aclose()


async def test_closing_ends_all_work() -> None:
    work = Work()
    answers = bounded_pipeline.answers(work.requests(3), work.answer)
    first = asyncio.ensure_future(anext(answers))
    await work.working_on(3)
    work.doors[0].set()
    assert await first == 0
    before = asyncio.all_tasks()
    await answers.aclose()
    await asyncio.wait(before - {asyncio.current_task()}, timeout=GUARD_S)
    assert work.cancelled == 2
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_reading_raises_is_raised() -> None:
    async def requests() -> AsyncIterator[int]:
        yield 1
        raise ConnectionError("the caller is gone")

    async def answer(number: int) -> int:
        return number

    async def read() -> list[int]:
        return [answered async for answered in bounded_pipeline.answers(requests(), answer)]

    with pytest.raises(ConnectionError):
        await read()


async def test_what_answering_raises_is_raised() -> None:
    async def answer(number: int) -> int:
        raise ArithmeticError(f"no answer to {number}")

    with pytest.raises(ArithmeticError, match="no answer to 0"):
        await anext(bounded_pipeline.answers(Work().requests(1), answer))
