"""What happens around every call, whatever its method.

One interceptor, so that no servicer does any of it. A call is let in by the gate
and finds a place before its message is read; health checks need no leave and are
never turned away.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from typing import Any

import grpc
from grpc import aio

from service.auth.audit import Audit
from service.auth.authenticator import AllowAll, Authenticator
from service.errors import Reason, Unavailable
from service.ops.metrics import Metrics
from service.rpc import messages
from service.rpc.call import REQUEST_ID_KEY, Call, Context
from service.rpc.limits import HEALTH, CallBounds, Limits, Place
from service.rpc.parsing import Parser
from service.rpc.requests import IDLE_TIMEOUT_S, Requests

__all__ = ["REQUEST_ID_KEY", "Calls"]

_BACK_AFTER_S = 5.0


class Calls(aio.ServerInterceptor):
    """Wraps every handler of the server."""

    def __init__(
        self,
        metrics: Metrics,
        gate: Authenticator | None = None,
        audit: Audit | None = None,
        *,
        bounds: CallBounds | None = None,
    ) -> None:
        self._metrics = metrics
        self._gate = gate or AllowAll()
        self._audit = audit
        bounds = bounds or CallBounds()
        self._limits = Limits(bounds)
        self._message_timeout_s = bounds.message_timeout_s
        self._health_requests = messages.HealthRequests()
        self._streaming: set[Call] = set()
        self._streams: set[Requests] = set()
        self._is_closed = False

    def close(self) -> None:
        """Refuses new calls but health's from now on, as UNAVAILABLE.

        Streams that are answered request by request bring no more of them.
        """
        self._is_closed = True
        for requests in self._streams:
            requests.cut()

    def recheck(self) -> None:
        """Ends streams and uploads of callers whom the gate would not let go on.

        Other calls are short, and end by themselves.
        """
        for call in self._streaming:
            call.recheck(self._gate)

    @property
    def are_under_way(self) -> bool:
        """Whether any call but health's is being answered."""
        return not self._limits.is_empty

    async def ended(self) -> None:
        """Waits until all calls but health's have their answers."""
        await self._limits.empty()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: Any
    ) -> Any:
        """Returns the method's handler with everything around it.

        Raises TypeError for one that writes its answers itself, where none could be bounded.
        """
        handler = await continuation(details)
        if handler is None:
            return None
        method = str(details.method)
        return (self._of_health if method.startswith(HEALTH) else self._of)(method, handler)

    def _of(self, method: str, handler: Any) -> Any:
        timeout_s = self._message_timeout_s
        parser = Parser(method, handler.request_deserializer)
        takes_many, gives_many = handler.request_streaming, handler.response_streaming
        answer = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        if gives_many and not inspect.isasyncgenfunction(answer):
            raise TypeError(f"{method} must yield its answers: they are written here")

        # Requests are read here, so that a call is let in before its message is taken, and
        # many answers written, so that who takes none can be ended.
        async def read(call: Call, context: Context, place: Place) -> Any:
            if takes_many:
                idle_timeout_s = IDLE_TIMEOUT_S if gives_many else None
                pace = call.pace(self._gate)
                return Requests(context, parser, place, pace, idle_timeout_s)
            call.request = await messages.receive(context, parser, place, timeout_s)
            # It may have been long on its way.
            call.stay(self._gate)
            return call.request

        if not gives_many:

            async def unary(_: object, context: Context) -> Any:
                async with Call(method, context, self._metrics, self._audit) as call:
                    with ExitStack() as stack:
                        place = stack.enter_context(self._admit(method, call))
                        with self._rechecked(call, takes_many):
                            request = await read(call, context, place)
                            call.response = response = await answer(request, context)
                        size = response.ByteSize()
                        if size > messages.LARGE_BYTES:
                            # gRPC writes it after this: until then it is under way, and held.
                            place.hold(size, is_over_allowed=True)
                            messages.when_taken(context, timeout_s, stack.pop_all().close)
                        return response

            return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)

        async def streaming(_: object, context: Context) -> None:
            async with Call(method, context, self._metrics, self._audit) as call:
                with self._admit(method, call) as place, self._rechecked(call, True):
                    request = await read(call, context, place)
                    with self._cut_at_close(request):
                        async with aclosing(answer(request, context)) as responses:
                            async for response in responses:
                                call.stay(self._gate)
                                await messages.send(context, response, timeout_s)

        return grpc.stream_stream_rpc_method_handler(streaming, None, handler.response_serializer)

    def _of_health(self, method: str, handler: Any) -> Any:
        """Anybody may ask it, so that whoever's request is not there yet has no place."""
        answer = handler.unary_unary or handler.unary_stream
        parser = Parser(method, handler.request_deserializer)
        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )

        # Watch writes its answers itself.
        async def serve(_: object, context: Context) -> Any:
            async with Call(method, context, self._metrics, None):
                request = await self._health_requests.receive(context, parser)
                with self._limits.place(method):
                    return await answer(request, context)

        return wrap(serve, None, handler.response_serializer)

    def _admit(self, method: str, call: Call) -> Place:
        if self._is_closed:
            raise _stopping()
        who = call.enter(self._gate)
        return self._limits.place(method, who.tenant if self._gate.is_shared else None)

    @contextmanager
    def _rechecked(self, call: Call, goes_on: bool) -> Iterator[None]:
        """Has a call that goes on for long end when its caller may not any more."""
        if goes_on:
            self._streaming.add(call)
        try:
            yield
        finally:
            self._streaming.discard(call)

    @contextmanager
    def _cut_at_close(self, request: Any) -> Iterator[None]:
        """Raises Unavailable at the end if the requests of a stream were cut."""
        if not isinstance(request, Requests):
            yield
            return
        self._streams.add(request)
        try:
            yield
        finally:
            self._streams.discard(request)
        if request.is_cut:
            raise _stopping()


def _stopping() -> Unavailable:
    return Unavailable(
        Reason.SHUTTING_DOWN,
        "the service is stopping: try again when it is back",
        retry_after_s=_BACK_AFTER_S,
    )
