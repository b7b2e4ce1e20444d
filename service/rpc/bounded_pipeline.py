"""A pipeline of bounded width: a stream's requests are worked on at once, answered as ready."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from service.rpc.request_stream import RequestStream

WINDOW = 32
"""Limit on the requests of one stream that are worked on at once; further ones are not read."""

Request = TypeVar("Request")
Response = TypeVar("Response")


async def answers(
    requests: AsyncIterator[Request], answer: Callable[[Request], Awaitable[Response]]
) -> AsyncGenerator[Response, None]:
    """Yields the answers in order of completion.

    A slow reader of the answers slows the reading of requests. Raises what reading or
    `answer` raises. Cancels all work when it is closed.
    """
    answered = None
    if isinstance(requests, RequestStream):
        answered = requests.keep_until_answered()
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
