"""Carries calls out over a channel: deadlines, retries, streams, errors.

Stops with `close`; a channel that the caller brought is the caller's to close.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from graftml_stubs.v1 import (
    backbone_pb2_grpc,
    dataset_pb2_grpc,
    fine_tuning_pb2_grpc,
    model_pb2_grpc,
    prediction_pb2_grpc,
)

from graftml import _async_io as io
from graftml import _diagnosis, _rpcs
from graftml._channel import Settings
from graftml.errors import GraftError, from_rpc
from graftml.retry import Attempts, RetryPolicy

T = TypeVar("T")
Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res")

PAGE_SIZE = 100


class AsyncTransport:
    """One connection, with the contract's calls on it."""

    def __init__(
        self,
        settings: Settings,
        policy: RetryPolicy,
        timeout_s: float,
        channel: io.Channel | None,
    ) -> None:
        self.target = settings.target
        self._is_tls = settings.credentials is not None
        self.policy = policy
        self.timeout_s = timeout_s
        self._metadata = settings.metadata
        self._is_own = channel is None
        self._closes = channel is None
        self._channel = channel or io.open_channel(settings)
        self.backbones = backbone_pb2_grpc.BackboneServiceStub(self._channel)
        self.datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self.fine_tuning = fine_tuning_pb2_grpc.FineTuningServiceStub(self._channel)
        self.models = model_pb2_grpc.ModelServiceStub(self._channel)
        self.prediction = prediction_pb2_grpc.PredictionServiceStub(self._channel)

    def with_timeout(self, timeout_s: float) -> "AsyncTransport":
        """Returns the same connection with another deadline."""
        other = object.__new__(AsyncTransport)
        vars(other).update(vars(self), timeout_s=timeout_s, _closes=False)
        return other

    async def close(self) -> None:
        """Ends the connection, and every call on it."""
        if self._closes:
            await self._channel.close()

    async def unary(
        self, invoke: "io.UnaryUnary[Req, Res]", request: Req, timeout_s: float | None = None
    ) -> Res:
        """Sends one question, returns its one answer; asks again where that is safe."""

        async def attempt(left_s: float) -> Res:
            return await invoke(request, timeout=left_s, metadata=self._metadata)

        return await self.attempts(
            attempt, timeout_s or self.timeout_s, is_safe=_rpcs.is_safe(request)
        )

    async def attempts(
        self, run: Callable[[float], Awaitable[T]], timeout_s: float, *, is_safe: bool
    ) -> T:
        """Runs until it succeeds or should not be tried again; `run` is told the seconds left."""
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
            await io.sleep(pause_s)

    async def explained(self, error: GraftError) -> GraftError:
        """Returns the error with what is wrong with the connection, where that can be found out.

        Returns it unchanged for a channel that the caller brought, of which nothing is known.
        """
        if not self._is_own:
            return error
        return await io.blocking(_diagnosis.explained, error, self.target, is_tls=self._is_tls)

    async def pages(
        self,
        invoke: "io.UnaryUnary[Req, Res]",
        request: Any,
        read: Callable[[Res], Iterable[T]],
    ) -> AsyncIterator[T]:
        """Yields all items of a list, asked for page by page as they are needed."""
        request.page_size = request.page_size or PAGE_SIZE
        while True:
            answer: Any = await self.unary(invoke, request)
            for item in read(answer):
                yield item
            request.page_token = answer.next_page_token
            if not request.page_token:
                return

    async def answers(
        self, invoke: "io.UnaryStream[Req, Res]", request: Req, timeout_s: float
    ) -> io.Stream[Res]:
        """Yields the answers of one stream; raises gRPC's own errors. Closing it ends the call."""
        call = invoke(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for answer in call:
                yield answer
        finally:
            call.cancel()

    async def collect(
        self, invoke: "io.StreamUnary[Req, Res]", messages: Iterator[Req], timeout_s: float
    ) -> Res:
        """Sends a stream, returns its one answer; raises gRPC's own errors."""
        return await io.collect(invoke, messages, timeout_s, self._metadata)

    async def exchange(
        self, invoke: "io.StreamStream[Req, Res]", messages: AsyncIterator[Req], timeout_s: float
    ) -> io.Stream[Res]:
        """Sends and receives at once. Closing it ends the call."""
        try:
            async with aclosing(
                io.exchange(invoke, messages, timeout_s, self._metadata)
            ) as answers:
                async for answer in answers:
                    yield answer
        except grpc.RpcError as error:
            known = from_rpc(error, self.target, timeout_s)
            raise await self.explained(known) from error

    async def probe(self, timeout_s: float, *, wait: bool) -> bool:
        """Tells whether the server says SERVING; with `wait`, waits for a connection."""
        invoke: Any = self._channel.unary_unary(_rpcs.HEALTH_CHECK)
        try:
            answer = await invoke(
                _rpcs.WHOLE_SERVER,
                timeout=timeout_s,
                metadata=self._metadata,
                wait_for_ready=wait,
            )
        except grpc.RpcError as error:
            raise from_rpc(error, self.target, timeout_s) from error
        return bool(answer == _rpcs.SERVING)
