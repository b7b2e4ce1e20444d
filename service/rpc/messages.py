"""Messages in, messages out, each within its time."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from google.protobuf.message import DecodeError
from grpc import aio

from service.errors import Expired, InvalidInput, Reason

Context = aio.ServicerContext[Any, Any]


class NotTaken(Expired):
    """An answer was not taken in time, so that no status would be either."""


async def receive(
    context: Context,
    deserialise: Callable[[bytes], Any],
    hold: Callable[[int], None],
    timeout_s: float,
) -> Any:
    """The request of a call that brings one; further ones are never read.

    `hold` is told its bytes. Raises what that raises, Expired if the request is not
    there in time, InvalidInput where there is none or its bytes are no such message.
    """
    try:
        async with asyncio.timeout(timeout_s):
            raw = await context.read()
    except TimeoutError:
        raise Expired(
            Reason.DEADLINE_EXCEEDED,
            f"the request did not arrive within {timeout_s:g} s: send it again",
        ) from None
    if raw is aio.EOF:
        raise InvalidInput(Reason.INVALID_FIELD, "the call brought no request: send one")
    hold(len(raw))
    return _parsed(raw, deserialise)


class Requests:
    """The requests of a stream, each read when it is asked for; `cut` ends them early."""

    def __init__(self, context: Context, deserialise: Callable[[bytes], Any]) -> None:
        self.is_cut = False
        self._context = context
        self._deserialise = deserialise
        self._reading: asyncio.Timeout | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The next one; raises InvalidInput if its bytes are no such message."""
        if self.is_cut:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(None) as self._reading:
                raw = await self._context.read()
        except TimeoutError:
            raise StopAsyncIteration from None
        finally:
            self._reading = None
        if raw is aio.EOF:
            raise StopAsyncIteration
        return _parsed(raw, self._deserialise)

    def cut(self) -> None:
        """Ends them now, as if the caller had sent no more; twice is as once."""
        if self.is_cut:
            return
        self.is_cut = True
        if self._reading is not None:
            self._reading.reschedule(asyncio.get_running_loop().time())


async def send(context: Context, response: Any, timeout_s: float) -> None:
    """Writes one answer of a stream; raises NotTaken if its reader does not take it in time.

    Raises CancelledError if the reader is gone.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(response)
    except TimeoutError:
        raise NotTaken(
            Reason.DEADLINE_EXCEEDED,
            f"the reader took no answer for {timeout_s:g} s: read faster",
        ) from None
    except aio.InternalError:
        # gRPC takes nothing more for a caller who is gone, and may say so before it cancels.
        raise asyncio.CancelledError from None


def _parsed(raw: bytes, deserialise: Callable[[bytes], Any]) -> Any:
    try:
        return deserialise(raw)
    except DecodeError:
        raise InvalidInput(
            Reason.INVALID_FIELD, f"the request's {len(raw)} bytes are no message of its kind"
        ) from None
