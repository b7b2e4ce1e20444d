"""Finishes work of cancelled tasks: outcomes saved, trainers stopped, threads waited for."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

_LONG_THREADS = 64
_long = ThreadPoolExecutor(_LONG_THREADS, thread_name_prefix="long")
"""Threads of what may take minutes: were they the event loop's own, which ask the stores, uploads
would keep everybody's GetJob waiting."""


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


async def begun(
    work: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, object]]
) -> T:
    """Does the work; `undo` takes back what it came to when the caller was cancelled meanwhile."""
    task = asyncio.create_task(work)

    async def take_back() -> None:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await undo(task.result())

    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await uninterrupted(take_back())
        raise


async def in_long_thread(work: Callable[..., T], *arguments: Any) -> T:
    """Runs `work` as `asyncio.to_thread`, but in a thread for what takes long."""
    context = contextvars.copy_context()
    run = partial(context.run, work, *arguments)
    return await asyncio.get_running_loop().run_in_executor(_long, run)


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Runs `work` in a thread for what takes long, and returns its result.

    When the task is cancelled the event is set, at which `work` should give up, and the
    task still ends only with the thread: so long it keeps its slot.
    """
    is_abandoned = threading.Event()
    task = asyncio.create_task(in_long_thread(work, is_abandoned))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        is_abandoned.set()
        # Nobody takes what it raises now, and asyncio would log it.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await uninterrupted(asyncio.wait({task}))
        raise
