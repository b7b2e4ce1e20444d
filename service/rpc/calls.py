"""What happens around every call, whatever its method.

One interceptor, so that no servicer does any of it. A call is let in by the gate
and finds a place before its message is read; health checks need no leave and are
never turned away.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from grpc import aio

from service.errors import Reason, Unavailable
from service.rpc import messages
from service.rpc.call import REQUEST_ID_KEY, Audit, Call, Context, Gate
from service.rpc.caller import EVERYBODY, Caller
from service.rpc.limits import HEALTH, CallBounds, Limits, Place
from service.telemetry import Telemetry

__all__ = ["REQUEST_ID_KEY", "Audit", "Calls", "Everybody", "Gate"]

_BACK_AFTER_S = 5.0


class Everybody:
    """The gate where nobody has to say who they are."""

    def admit(self, method: str, metadata: Mapping[str, str | bytes]) -> Caller:
        """Everybody is EVERYBODY."""
        return EVERYBODY

    def recheck(self, method: str, who: Caller) -> None:
        """Everybody stays."""


class Calls(aio.ServerInterceptor):
    """Wraps every handler of the server."""

    def __init__(
        self,
        metrics: Telemetry,
        gate: Gate | None = None,
        audit: Audit | None = None,
        *,
        bounds: CallBounds | None = None,
    ) -> None:
        self._metrics = metrics
        self._gate = gate or Everybody()
        self._audit = audit
        bounds = bounds or CallBounds()
        self._limits = Limits(bounds)
        self._message_timeout_s = bounds.message_timeout_s
        self._streams: set[messages.Requests] = set()
        self._is_closed = False

    def close(self) -> None:
        """Refuses new calls but health's from now on, as UNAVAILABLE.

        Streams that are answered request by request bring no more of them.
        """
        self._is_closed = True
        for requests in self._streams:
            requests.cut()

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
        """Returns the method's handler with everything around it."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = str(details.method)
        is_open = method.startswith(HEALTH)
        timeout_s = self._message_timeout_s
        deserialise = handler.request_deserializer

        def begin(context: Context) -> Call:
            return Call(method, context, self._metrics, None if is_open else self._audit)

        def admit(call: Call) -> Place:
            if not is_open:
                if self._is_closed:
                    raise _stopping()
                call.enter(self._gate)
            return self._limits.place(method)

        # Requests are read here, so that a call is let in before its message is taken, and
        # answers written, so that who takes none can be ended.
        async def read(call: Call, context: Context, place: Place) -> Any:
            if handler.request_streaming:
                return messages.Requests(context, deserialise)
            call.request = await messages.receive(context, deserialise, place.hold, timeout_s)
            return call.request

        if not handler.response_streaming:
            answer_one = handler.unary_unary or handler.stream_unary

            async def unary(_: object, context: Context) -> Any:
                async with begin(context) as call:
                    with admit(call) as place:
                        request = await read(call, context, place)
                        call.response = response = await answer_one(request, context)
                        return response

            return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)

        answer_many = handler.unary_stream or handler.stream_stream
        yields = inspect.isasyncgenfunction(answer_many)

        async def streaming(_: object, context: Context) -> None:
            async with begin(context) as call:
                with admit(call) as place:
                    request = await read(call, context, place)
                    if not yields:
                        # The health service's Watch writes its answers itself.
                        await answer_many(request, context)
                        return
                    with self._cut_at_close(request):
                        async with aclosing(answer_many(request, context)) as responses:
                            async for response in responses:
                                call.stay(self._gate)
                                await messages.send(context, response, timeout_s)

        return grpc.stream_stream_rpc_method_handler(streaming, None, handler.response_serializer)

    @contextmanager
    def _cut_at_close(self, request: Any) -> Iterator[None]:
        """Raises Unavailable at the end if the requests of a stream were cut."""
        if not isinstance(request, messages.Requests):
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
