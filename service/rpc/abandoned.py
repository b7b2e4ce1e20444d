"""Work in threads that a call waits for although its caller has left."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Runs `work` in a thread and returns its result.

    When the call is cancelled the event is set, at which `work` should give up, and the
    call still ends only with the thread: so long it keeps its place.
    """
    is_abandoned = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, is_abandoned))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        is_abandoned.set()
        await asyncio.wait({task})
        task.exception()  # retrieved, so that asyncio does not log it as lost
        raise
