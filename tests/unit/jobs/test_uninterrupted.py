import asyncio

import pytest

from service.jobs.uninterrupted import uninterrupted


async def test_work_ends_though_its_task_is_cancelled_again_and_again() -> None:
    go_on, done = asyncio.Event(), []

    async def work() -> None:
        await go_on.wait()
        done.append("work")

    async def caller() -> None:
        await uninterrupted(work())
        done.append("after")

    task = asyncio.create_task(caller())
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["work"]


async def test_the_result_and_the_error_come_through() -> None:
    async def work(fails: bool) -> int:
        await asyncio.sleep(0)
        if fails:
            raise KeyError("x")
        return 7

    assert await uninterrupted(work(False)) == 7
    with pytest.raises(KeyError):
        await uninterrupted(work(True))


async def test_an_error_beats_a_cancel_that_came_meanwhile() -> None:
    go_on = asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        raise KeyError("x")

    task = asyncio.create_task(uninterrupted(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(KeyError):
        await task
