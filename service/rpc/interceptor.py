"""Everything that happens around a call, whatever its method.

From the outside in: the call is logged and counted; errors become its status; while the server
drains it is refused; its principal is authenticated, with its role and its calls per second;
it is admitted to a slot of its method; its request arrives before a deadline and is parsed
within limits; its handler answers. `_onion` is that order. Health checks need no permission,
and are answered while the server drains.
"""

import asyncio
import inspect
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, cast

import grpc
from grpc import aio

from service.auth import principal
from service.auth.audit import Audit
from service.auth.authenticator import Authenticator
from service.auth.principal import UNAUTHENTICATED
from service.errors import GraftError, stopping
from service.ops import logs
from service.ops.metrics import Calls, Metrics
from service.rpc import message_io, status
from service.rpc.admission import HEALTH, Admission, CallLimits, Slot
from service.rpc.handlers import Context
from service.rpc.message_io import Parser
from service.rpc.request_stream import IDLE_TIMEOUT_S, RequestStream

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_STATUS_TIMEOUT_S = 5.0
"""Time for a status to be sent; one behind an answer that its reader does not take waits on."""

log = logging.getLogger(__name__)


class CallContext:
    """One call, from its arrival in the task that serves it."""

    def __init__(self, method: str, context: Context, calls: Calls, audit: Audit) -> None:
        """Begins the account: counts the call as active and sets its id for log lines."""
        self.method = method
        self.context = context
        self.principal = UNAUTHENTICATED
        self.request: Any | None = None
        """The request, of a call that brings one."""
        self.response: Any | None = None
        """The answer, of a call that gives one."""
        self.revoked: GraftError | None = None
        """The error with which a call ends whose permission was taken back."""
        self.task = asyncio.current_task()
        self.metadata = tuple(context.invocation_metadata() or ())
        # Read now: a context that is collected while the process ends may not be asked.
        self._peer = context.peer()
        self._calls = calls
        self._audit = audit
        self._started = time.monotonic()
        given = dict(self.metadata).get(REQUEST_ID_KEY, "")
        fits = isinstance(given, str) and _REQUEST_ID.fullmatch(given)
        self.request_id = str(given) if fits else secrets.token_hex(8)
        logs.request_id.set(self.request_id)
        calls.active.inc()
        context.set_trailing_metadata(((REQUEST_ID_KEY, self.request_id),))

    def refused(self, error: GraftError) -> None:
        """Writes into the audit log that the call was refused."""
        self._audit.refused(
            self.method, error, self.metadata, request_id=self.request_id, peer=self._peer
        )

    def ended(self, code: grpc.StatusCode, message: str = "") -> None:
        """Closes the account: metrics, the audit log and the log."""
        seconds = time.monotonic() - self._started
        self._calls.active.dec()
        self._calls.ended(code.name)
        self._calls.seconds.observe(seconds)
        self._audit.ended(
            self.method,
            self.principal,
            code,
            self.request,
            self.response,
            request_id=self.request_id,
            peer=self._peer,
        )
        level = logging.DEBUG if code is grpc.StatusCode.OK else logging.INFO
        # Checked first: making the line costs more than most of a call.
        if log.isEnabledFor(level):
            log.log(
                level,
                "call ended",
                extra={
                    "method": self.method,
                    "code": code.name,
                    "duration_ms": round(seconds * 1000, 1),
                    "peer": self._peer,
                    "error": message,
                },
            )


class Interceptor(aio.ServerInterceptor):
    """Wraps every handler of one server."""

    def __init__(
        self, metrics: Metrics, authenticator: Authenticator, audit: Audit, limits: CallLimits
    ) -> None:
        self._metrics = metrics
        self._authenticator = authenticator
        self._audit = audit
        self.admission = Admission(limits)
        self._timeout_s = limits.message_timeout_s
        self._parsing = ThreadPoolExecutor(1, thread_name_prefix="parse")
        self._long_calls: set[CallContext] = set()
        self._streams: set[RequestStream] = set()
        self._handlers: dict[str, Any] = {}
        self._is_closed = False

    async def _onion(
        self, call: CallContext, serve: Callable[[CallContext, Slot], Awaitable[Any]]
    ) -> Any:
        """Serves a call that was logged and counted when its context was made."""
        try:
            # Token, role, calls per second; or that the server stops.
            tenant = self._authenticate(call)
            # Calls of the method. The slot is released when the answer has left: until then it
            # takes memory.
            slot = self.admission.admit(call.method, tenant)
            call.context.add_done_callback(cast("Any", slot.release))
            # The request, in time and within its limits; the handler; the answers, in time.
            call.response = await serve(call, slot)
        except BaseException as error:
            await self._fail(call, error)
            raise
        finally:
            self._long_calls.discard(call)
        code = call.context.code() or grpc.StatusCode.OK
        call.ended(code)
        return call.response

    def _authenticate(self, call: CallContext) -> str | None:
        """Sets the call's principal; returns its tenant where several share the server."""
        if call.method.startswith(HEALTH):
            return None
        if self._is_closed:
            raise stopping("try again when it is back")
        try:
            call.principal = self._authenticator.admit(call.method, call.metadata)
        except GraftError as error:
            call.refused(error)
            raise
        principal.enter(call.principal)
        return call.principal.tenant if self._authenticator.is_shared else None

    def _serve(self, method: str, handler: Any) -> Callable[[CallContext, Slot], Awaitable[Any]]:
        """Returns the innermost layer: the request is read, the handler called, answers sent.

        A handler of many answers yields them; one that wrote them itself, as that of health
        checks does, would wait for a slow reader without end.
        """
        parser = Parser(method, handler.request_deserializer, self._parsing)
        answer = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        takes_many, gives_many = handler.request_streaming, handler.response_streaming
        is_generator = inspect.isasyncgenfunction(answer)

        async def read(call: CallContext, slot: Slot) -> Any:
            if takes_many:
                wait_s = partial(self._authenticator.wait_s, call.principal)
                idle_timeout_s = IDLE_TIMEOUT_S if gives_many else None
                return RequestStream(call.context, parser, slot, wait_s, idle_timeout_s)
            call.request = await message_io.receive(call.context, parser, slot, self._timeout_s)
            # It may have been long on its way.
            self._check_permission(call)
            return call.request

        async def serve(call: CallContext, slot: Slot) -> Any:
            if takes_many or gives_many:
                self._long_calls.add(call)
            request = await read(call, slot)
            if not is_generator:
                return await answer(request, call.context)
            # `close` cuts a stream of requests.
            streams = {request} if takes_many else set()
            self._streams |= streams
            try:
                async with aclosing(answer(request, call.context)) as responses:
                    async for response in responses:
                        self._check_permission(call)
                        await message_io.send(call.context, response, self._timeout_s)
            finally:
                self._streams -= streams
            if takes_many and request.is_cut:
                raise stopping("try again when it is back")
            return None

        return serve

    async def _fail(self, call: CallContext, error: BaseException) -> None:
        """Ends a call with the status of an error; nothing else makes statuses of errors.

        Raises AbortError once the status was sent, CancelledError if its reader does not take it.
        """
        if call.revoked is not None and isinstance(error, asyncio.CancelledError):
            # Cancelled by `recheck`; unless its caller left at the same time.
            error = call.revoked
            if call.task is not None:
                call.task.uncancel()
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            call.ended(grpc.StatusCode.CANCELLED)
            return
        if isinstance(error, aio.AbortError):
            call.ended(call.context.code())
            return
        answer = status.from_error(error)
        code = status.code_of(answer)
        call.ended(code, answer.message)
        details = (status.DETAILS_KEY, answer.SerializeToString())
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                await call.context.abort(
                    code, answer.message, ((REQUEST_ID_KEY, call.request_id), details)
                )
        except TimeoutError:
            # gRPC sends it when the reader has taken what lies before it, or drops both.
            raise asyncio.CancelledError from None

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: Any
    ) -> Any:
        """Returns the method's handler with the onion around it."""
        method = str(details.method)
        if method not in self._handlers:
            handler = await continuation(details)
            if handler is None:
                return None
            self._handlers[method] = self._wrapped(method, handler)
        return self._handlers[method]

    def _wrapped(self, method: str, handler: Any) -> Any:
        serve = self._serve(method, handler)
        calls = self._metrics.calls(method)

        # On the wire a single request is a stream of one. It is read in here, so that a call is
        # authenticated and admitted before its message is taken.
        async def handle(_: object, context: Context) -> Any:
            return await self._onion(CallContext(method, context, calls, self._audit), serve)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(handle, None, handler.response_serializer)

    def close(self) -> None:
        """Refuses new calls but health checks from now on, as UNAVAILABLE.

        Streams that are answered request by request get no more requests.
        """
        self._is_closed = True
        for requests in self._streams:
            requests.cut()

    def recheck(self) -> None:
        """Ends streams and uploads whose principals may not go on; other calls are short."""
        for call in self._long_calls:
            if call.revoked is None and call.task is not None:
                try:
                    self._check_permission(call)
                except GraftError:
                    call.task.cancel()

    def shutdown(self) -> None:
        """Ends the thread that counts large messages; no call may be running."""
        self._parsing.shutdown(wait=False)

    def _check_permission(self, call: CallContext) -> None:
        """Raises what the authenticator raises for a call that may not go on."""
        if call.principal is UNAUTHENTICATED:
            return
        try:
            self._authenticator.recheck(call.method, call.principal)
        except GraftError as error:
            if call.revoked is None:
                call.revoked = error
                call.refused(error)
            raise
