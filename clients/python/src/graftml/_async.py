"""Carries calls out over an asyncio channel; otherwise as `_sync`.

What reads disks or a caller's iterables runs on a worker thread, one step at a
time, so that the event loop never waits for it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, Final, TypeVar

import grpc
from grpc import aio

from graftml import _calls, _diagnosis, _rpcs
from graftml._channel import Settings
from graftml._rpcs import Rpc
from graftml._watch import Watch
from graftml.errors import GraftError, from_rpc, is_broken_write
from graftml.retry import Attempts, RetryPolicy
from graftml.types import JobEvent

T = TypeVar("T")
Req = TypeVar("Req")
Res = TypeVar("Res")

_END: Final = object()

_STATUS_LOOKS: Final = 200
_LOOK_S: Final = 0.01
"""Between two looks for the status that the server sent."""


class AsyncTransport:
    """One connection; belongs to the event loop that it was made in."""

    def __init__(
        self, settings: Settings, policy: RetryPolicy, timeout_s: float, channel: aio.Channel | None
    ) -> None:
        self.target = settings.target
        self._is_tls = settings.credentials is not None
        self.policy = policy
        self.timeout_s = timeout_s
        self._metadata = settings.metadata
        self._is_own = channel is None
        self._closes = channel is None
        self._channel = channel or _open(settings)

    def with_timeout(self, timeout_s: float) -> "AsyncTransport":
        """As Transport."""
        other = object.__new__(AsyncTransport)
        vars(other).update(vars(self), timeout_s=timeout_s, _closes=False)
        return other

    async def close(self) -> None:
        """As Transport."""
        if self._closes:
            await self._channel.close()

    async def unary(self, call: _calls.Call[T], timeout_s: float | None = None) -> T:
        """As Transport."""
        invoke = self._channel.unary_unary(
            call.rpc.path,
            request_serializer=call.rpc.serialize,
            response_deserializer=call.rpc.parse,
        )

        async def attempt(left_s: float) -> T:
            return call.read(await invoke(call.request, timeout=left_s, metadata=self._metadata))

        return await self.attempts(attempt, timeout_s or self.timeout_s, is_safe=call.rpc.is_safe)

    async def attempts(
        self, run: Callable[[float], Awaitable[T]], timeout_s: float, *, is_safe: bool
    ) -> T:
        """As Transport."""
        attempts = Attempts(self.policy, is_safe=is_safe, timeout_s=timeout_s)
        while True:
            try:
                return await run(attempts.remaining_s)
            except grpc.RpcError as error:
                known = from_rpc(error, self.target, timeout_s)
                try:
                    pause_s = attempts.pause_s(known)
                except GraftError:
                    raise await self.explained(known) from error
            await asyncio.sleep(pause_s)

    async def explained(self, error: GraftError) -> GraftError:
        """Does as `Transport.explained`, without holding up the event loop."""
        if not self._is_own:
            return error
        return await asyncio.to_thread(
            _diagnosis.explained, error, self.target, is_tls=self._is_tls
        )

    async def pages(self, page: Callable[[str], _calls.Call[_calls.Page[T]]]) -> AsyncIterator[T]:
        """As Transport."""
        token = ""  # nosec B105 # no password
        while True:
            answer = await self.unary(page(token))
            for item in answer.items:
                yield item
            token = answer.next_token
            if not token:
                return

    async def answers(
        self, rpc: Rpc[Req, Res], request: Req, timeout_s: float
    ) -> AsyncGenerator[Res, None]:
        """As Transport."""
        invoke = self._channel.unary_stream(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.parse
        )
        call = invoke(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for answer in call:
                yield answer
        finally:
            call.cancel()

    async def collect(self, rpc: Rpc[Req, Res], messages: Iterator[Req], timeout_s: float) -> Res:
        """As Transport."""
        invoke = self._channel.stream_unary(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.parse
        )
        feed = AsyncFeed(stepwise(messages))
        call = invoke(feed.messages(), timeout=timeout_s, metadata=self._metadata)
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
        self, rpc: Rpc[Req, Res], messages: AsyncIterator[Req], timeout_s: float
    ) -> AsyncGenerator[Res, None]:
        """As Transport."""
        invoke = self._channel.stream_stream(
            rpc.path, request_serializer=rpc.serialize, response_deserializer=rpc.parse
        )
        feed = AsyncFeed(messages)
        call = invoke(feed.messages(), timeout=timeout_s, metadata=self._metadata)
        end = End(call)
        try:
            async for answer in call:
                yield answer
        except asyncio.CancelledError:
            if feed.error is not None:
                raise feed.error from None
            raise
        except grpc.RpcError as error:
            known = from_rpc(await end.told(error), self.target, timeout_s)
            raise await self.explained(known) from error
        finally:
            call.cancel()

    async def watch(self, watch: Watch) -> AsyncIterator[JobEvent]:
        """As Transport."""
        while True:
            timeout_s = watch.remaining_s
            try:
                answers = self.answers(_rpcs.WATCH_JOB, watch.request(), timeout_s)
                async with aclosing(answers):
                    async for answer in answers:
                        event = watch.take(answer)
                        if event is not None:
                            yield event
            except grpc.RpcError as error:
                known = from_rpc(error, self.target, timeout_s)
                try:
                    pause_s = watch.pause_s(known)
                except GraftError as last:
                    raise (await self.explained(last) if last is known else last) from error
            else:
                if watch.is_over(await self.unary(_calls.get_job(watch.job_id))):
                    return
                pause_s = watch.idle_pause_s()
            await asyncio.sleep(pause_s)

    async def probe(self, timeout_s: float, *, wait: bool) -> bool:
        """As Transport."""
        invoke = self._channel.unary_unary(
            _rpcs.HEALTH.path,
            request_serializer=_rpcs.HEALTH.serialize,
            response_deserializer=_rpcs.HEALTH.parse,
        )
        try:
            answer: Any = await invoke(
                _rpcs.WHOLE_SERVER, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait
            )
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, timeout_s) from error
        return bool(answer == _rpcs.SERVING)


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


class AsyncFeed:
    """As `Feed`; gRPC itself cancels the call."""

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


async def stepwise(items: Iterator[T]) -> AsyncIterator[T]:
    """The items, each made on a worker thread."""
    while True:
        item: Any = await asyncio.to_thread(next, items, _END)
        if item is _END:
            return
        yield item


def _open(settings: Settings) -> aio.Channel:
    if settings.credentials is None:
        return aio.insecure_channel(settings.target, options=settings.options)
    return aio.secure_channel(settings.target, settings.credentials, options=settings.options)
