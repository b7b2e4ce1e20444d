"""What happens around every call: its request id, its log line, its metrics, its errors.

One interceptor, so that no servicer does any of it.
"""

import asyncio
import inspect
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from grpc import aio

from service import telemetry
from service.rpc import status
from service.telemetry import Telemetry

REQUEST_ID_KEY = "x-request-id"

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)

Context = aio.ServicerContext[Any, Any]


class Calls(aio.ServerInterceptor):
    """Wraps every handler of the server."""

    def __init__(self, metrics: Telemetry) -> None:
        self._metrics = metrics

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: Any
    ) -> Any:
        """Returns the method's handler with everything around it."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = str(details.method)

        if handler.response_streaming:
            answer_many = handler.unary_stream or handler.stream_stream

            async def streaming(request: Any, context: Context) -> AsyncIterator[Any]:
                # Now, because gRPC leaves a cancelled stream to the garbage collector, and a
                # context that is collected with it ends the process when asked for its peer.
                peer = context.peer()
                async with (
                    _Call(method, context, self._metrics, peer),
                    aclosing(answer_many(request, context)) as responses,
                ):
                    async for response in responses:
                        yield response

            async def writing(request: Any, context: Context) -> None:
                async with _Call(method, context, self._metrics, context.peer()):
                    await answer_many(request, context)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            # The health service's Watch writes its answers where others yield them.
            wrapped = streaming if inspect.isasyncgenfunction(answer_many) else writing
            return make(wrapped, handler.request_deserializer, handler.response_serializer)

        answer_one = handler.unary_unary or handler.stream_unary

        async def unary(request: Any, context: Context) -> Any:
            async with _Call(method, context, self._metrics):
                return await answer_one(request, context)

        make_unary = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(unary, handler.request_deserializer, handler.response_serializer)


class _Call:
    """One call from its arrival to its end."""

    def __init__(
        self, method: str, context: Context, metrics: Telemetry, peer: str | None = None
    ) -> None:
        self._method = method
        self._context = context
        self._peer = peer
        self._metrics = metrics
        given = dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY, "")
        fits = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        self._id = str(given) if fits else secrets.token_hex(8)

    async def __aenter__(self) -> None:
        telemetry.request_id.set(self._id)
        self._started = time.monotonic()
        self._metrics.rpc_active.labels(self._method).inc()
        self._context.set_trailing_metadata(((REQUEST_ID_KEY, self._id),))

    async def __aexit__(self, _type: object, error: BaseException | None, _tb: object) -> None:
        if error is None:
            code = self._context.code() or grpc.StatusCode.OK
            self._ended(code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.OK)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._ended(grpc.StatusCode.CANCELLED)
        elif isinstance(error, aio.AbortError):
            self._ended(self._context.code())
        else:
            answer = status.from_error(error)
            code = status.code_of(answer)
            self._ended(code, answer.message)
            await self._context.abort(
                code,
                answer.message,
                (
                    (REQUEST_ID_KEY, self._id),
                    (status.DETAILS_KEY, answer.SerializeToString()),
                ),
            )

    def _ended(self, code: grpc.StatusCode, message: str = "") -> None:
        seconds = time.monotonic() - self._started
        self._metrics.rpc_active.labels(self._method).dec()
        self._metrics.rpc_calls.labels(self._method, code.name).inc()
        self._metrics.rpc_seconds.labels(self._method).observe(seconds)
        level = logging.DEBUG if code is grpc.StatusCode.OK else logging.INFO
        # Asked first: the peer's name and the rest cost more than most of a call.
        if not log.isEnabledFor(level):
            return
        log.log(
            level,
            "call ended",
            extra={
                "method": self._method,
                "code": code.name,
                "duration_ms": round(seconds * 1000, 1),
                "peer": self._context.peer() if self._peer is None else self._peer,
                "error": message,
            },
        )
