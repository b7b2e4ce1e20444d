"""Resetting the stream of a call, which gRPC's asyncio server offers no way to do.

An error status would wait behind the answer that the reader does not take, and the
call with it. But gRPC resets the stream of a call that it lets go of unfinished, and
two tasks hold one: its handler's, and its parent, which watches for the caller's end.
`follow` notes the parent, `reset` ends it; the handler must end right after.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

_HANDLER = "_handle_exceptions"
"""What gRPC calls the coroutine of a handler's task."""

_watching: ContextVar[asyncio.Task[Any] | None] = ContextVar("watching", default=None)


def follow(loop: asyncio.AbstractEventLoop) -> None:
    """Notes from now on which task watches over which call."""
    loop.set_task_factory(_task)


def reset() -> None:
    """Lets go of the call that is being served, on gRPC's side.

    Of the call that was accepted last, gRPC keeps hold until the next one arrives.
    """
    watching = _watching.get()
    if watching is not None:
        watching.cancel()


def ending() -> Callable[[], None]:
    """What resets the call that is being served, and ends its handler, from any other task."""
    watching, handling = _watching.get(), asyncio.current_task()

    def end() -> None:
        for task in (watching, handling):
            if task is not None:
                task.cancel()

    return end


def _task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any] | Any, **options: Any
) -> asyncio.Task[Any]:
    if getattr(work, "__name__", "") == _HANDLER:
        # Into the parent's context, of which the task gets a copy.
        _watching.set(asyncio.current_task())
    return asyncio.Task(work, loop=loop, **options)
