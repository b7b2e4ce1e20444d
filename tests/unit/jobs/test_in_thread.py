"""Work in a thread whose caller leaves: it is told, and waited for."""

import asyncio
import threading

import pytest

from service.jobs.uninterrupted import in_thread

GUARD_S = 60.0


async def test_what_the_thread_gives_or_raises_is_the_callers() -> None:
    assert await in_thread(lambda is_abandoned: is_abandoned.is_set()) is False

    def fail(_: threading.Event) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await in_thread(fail)


async def test_a_cancelled_call_ends_with_its_thread_which_is_told() -> None:
    begun, told, go_on = threading.Event(), threading.Event(), threading.Event()

    def work(is_abandoned: threading.Event) -> None:
        begun.set()
        if is_abandoned.wait(GUARD_S):
            told.set()
        assert go_on.wait(GUARD_S)
        raise ValueError("nobody hears of it")

    call = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait, GUARD_S)
    call.cancel()
    assert await asyncio.to_thread(told.wait, GUARD_S)
    assert not call.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
