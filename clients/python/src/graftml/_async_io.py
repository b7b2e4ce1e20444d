"""What the asyncio client does with the network and the disk; `_sync_io` has the same names.

What reads disks or a caller's iterables runs on a worker thread, one step at a
time, so that the event loop never waits for it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from grpc import aio

from graftml._channel import Settings
from graftml.errors import is_broken_write

T = TypeVar("T")
Req = TypeVar("Req")
Res = TypeVar("Res")

Channel: TypeAlias = aio.Channel
UnaryUnary = aio.UnaryUnaryMultiCallable
UnaryStream = aio.UnaryStreamMultiCallable
StreamUnary = aio.StreamUnaryMultiCallable
StreamStream = aio.StreamStreamMultiCallable
Stream: TypeAlias = AsyncGenerator[T, None]
Semaphore: TypeAlias = asyncio.Semaphore
Event: TypeAlias = asyncio.Event

_END: Final = object()

_STATUS_LOOKS: Final = 200
_LOOK_S: Final = 0.01
"""Between two looks for the status that the server sent."""

sleep = asyncio.sleep
blocking = asyncio.to_thread


def open_channel(settings: Settings) -> Channel:
    """Opens a channel, which connects when it is first used."""
    if settings.credentials is None:
        return aio.insecure_channel(settings.target, options=settings.options)
    return aio.secure_channel(settings.target, settings.credentials, options=settings.options)


async def stepwise(items: Iterator[T]) -> AsyncIterator[T]:
    """Yields the items, each made on a worker thread."""
    while True:
        item: Any = await asyncio.to_thread(next, items, _END)
        if item is _END:
            return
        yield item


async def collect(
    invoke: "StreamUnary[Req, Res]", messages: Iterator[Req], timeout_s: float, metadata: Any
) -> Res:
    """Sends a stream, returns its one answer; raises gRPC's own errors."""
    feed = Feed(stepwise(messages))
    call = invoke(feed.messages(), timeout=timeout_s, metadata=metadata)
    end = End(call)
    try:
        answer: Res = await call
    except grpc.RpcError as error:
        if feed.error is not None:
            raise feed.error from None
        raise await end.told(error) from None
    except asyncio.CancelledError:
        if feed.error is not None:
            raise feed.error from None
        raise
    finally:
        call.cancel()
    if feed.error is not None:
        raise feed.error
    return answer


async def exchange(
    invoke: "StreamStream[Req, Res]",
    messages: AsyncIterator[Req],
    timeout_s: float,
    metadata: Any,
) -> Stream[Res]:
    """Sends and receives at once; raises gRPC's own errors. Closing it ends the call."""
    feed = Feed(messages)
    call = invoke(feed.messages(), timeout=timeout_s, metadata=metadata)
    end = End(call)
    try:
        async for answer in call:
            yield answer
    except asyncio.CancelledError:
        if feed.error is not None:
            raise feed.error from None
        raise
    except grpc.RpcError as error:
        raise await end.told(error) from None
    finally:
        call.cancel()


class End:
    """How the server ended a call that is sent to.

    A write that comes after the end fails, and gRPC then sets a status of its own, INTERNAL,
    before or after the server's (grpc/grpc issue 36066); the server's is what counts.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._servers: aio.AioRpcError | None = None
        self._is_ok = False
        call.add_done_callback(self._look)

    async def told(self, error: grpc.RpcError) -> grpc.RpcError:
        """The error that the server meant, waited for where gRPC's own came before it."""
        looks = _STATUS_LOOKS if is_broken_write(error) else 0
        for _ in range(looks):
            self._look(self._call)
            if self._servers is not None:
                return self._servers
            if self._is_ok:
                break
            await asyncio.sleep(_LOOK_S)
        return error

    def _look(self, call: Any) -> None:
        code: grpc.StatusCode = _now(call.code())
        trailing: aio.Metadata = _now(call.trailing_metadata())
        error = aio.AioRpcError(code, aio.Metadata(), trailing, _now(call.details()))
        self._is_ok = code is grpc.StatusCode.OK
        if self._servers is None and not self._is_ok and not is_broken_write(error):
            self._servers = error


def _now(answer: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine answers that has nothing to wait for."""
    try:
        answer.send(None)
    except StopIteration as found:
        return found.value
    answer.close()
    raise RuntimeError("a call that has ended knows how")


class Feed:
    """Hands messages to gRPC, which cancels the call where they raise, and keeps their error."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self.error: Exception | None = None

    async def messages(self) -> AsyncIterator[Any]:
        """The messages, with their error kept."""
        try:
            async for message in self._messages:
                yield message
        except Exception as error:
            self.error = error
            raise
