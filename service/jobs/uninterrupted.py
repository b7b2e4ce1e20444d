"""Work that a cancelled task still ends: outcomes are saved, trainers are stopped."""

import asyncio
from collections.abc import Coroutine
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
