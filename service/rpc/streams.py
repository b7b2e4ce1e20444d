"""Many requests over one stream, answered as they are ready, a bounded number at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from service.rpc.requests import Requests

WINDOW = 32
"""Requests of one stream that are worked on at once; further ones are not read."""

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answers(
    requests: AsyncIterator[Request], answer: Callable[[Request], Awaitable[Response]]
) -> AsyncGenerator[Response, None]:
    """Yields each request's answer in order of completion.

    A slow reader slows the reading of its requests. Raises what reading or
    `answer` raises. Ends all work when it is closed.
    """
    answered = requests.apart() if isinstance(requests, Requests) else None
    ready: asyncio.Queue[tuple[Request, Response] | Exception | None] = asyncio.Queue(1)
    room = asyncio.Semaphore(WINDOW)
    working: set[asyncio.Task[None]] = set()

    async def work(request: Request) -> None:
        try:
            await ready.put((request, await answer(request)))
        except Exception as error:
            await ready.put(error)
        finally:
            room.release()

    async def read() -> None:
        try:
            async for request in requests:
                await room.acquire()
                task = asyncio.create_task(work(request))
                working.add(task)
                task.add_done_callback(working.discard)
            await asyncio.gather(*working)
            await ready.put(None)
        except Exception as error:
            await ready.put(error)

    reader = asyncio.create_task(read())
    try:
        while (item := await ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            request, response = item
            yield response
            if answered is not None:
                answered(request)
    finally:
        reader.cancel()
        for task in working:
            task.cancel()
