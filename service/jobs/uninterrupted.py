"""Work that a cancelled task still ends: outcomes saved, trainers stopped, threads waited for."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Does the work to its end; cancels that come meanwhile take effect after it."""
    task = asyncio.create_task(work)
    cancel: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancel = error
    result = task.result()
    if cancel is not None:
        raise cancel
    return result


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Runs `work` in a thread and returns its result.

    When the task is cancelled the event is set, at which `work` should give up, and the
    task still ends only with the thread: so long it keeps its place.
    """
    is_abandoned = threading.Event()
    task = asyncio.create_task(asyncio.to_thread(work, is_abandoned))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        is_abandoned.set()
        # Nobody takes what it raises now, and asyncio would log it.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await uninterrupted(asyncio.wait({task}))
        raise
