"""Messages in, messages out, each within its time."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from grpc import aio

from service.errors import Exhausted, Expired, InvalidInput, Reason
from service.rpc import reset
from service.rpc.limits import Place
from service.rpc.parsing import Parser

GRACE_S = 0.25
"""A request that takes longer to arrive needs a place: gRPC holds what is there of it."""

LARGE_BYTES = 64 * 1024
"""An answer that is larger may have to wait for its reader, gRPC's window being as large."""

HEALTH_TIMEOUT_S = 2.0
HEALTH_BYTES = 1024
"""Of a health check's request, the most."""
HEALTH_WAITING = 64
"""Health checks whose request is not there yet; one more ends the oldest."""

# What the oldest still has, since its request may be there and not yet read.
_LAST_MOMENT_S = 0.1

Context = aio.ServicerContext[Any, Any]


class NotTaken(Expired):
    """An answer was not taken in time, so that no status would be either."""


async def receive(context: Context, parser: Parser, place: Place, timeout_s: float) -> Any:
    """The request of a call that brings one; further ones are never read.

    `place` holds what it takes. Raises what that raises, Exhausted if it is late as many
    others are, Expired if it is not there in time, InvalidInput where there is none, it
    is larger than its method allows, or its bytes are no such message.
    """
    arrival = None
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            arrival = _Arrival(place, deadline)
            raw = await context.read()
    except TimeoutError:
        if arrival is not None and arrival.refusal is not None:
            raise arrival.refusal from None
        raise _not_there(timeout_s) from None
    finally:
        if arrival is not None:
            arrival.end()
    place.hold(parser.cost(_there(raw)))
    return parser.parse(raw)


class _Arrival:
    """Waits for a call's request beside it."""

    def __init__(self, place: Place, deadline: asyncio.Timeout) -> None:
        self.refusal: Exhausted | None = None
        self._place = place
        self._deadline = deadline
        self._late: Place | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle = self._loop.call_later(GRACE_S, self._is_late)

    def _is_late(self) -> None:
        # On a busy loop it may be there and just not taken up: a turn of the loop tells.
        self._timer = self._loop.call_soon(self._take)

    def _take(self) -> None:
        late = self._place.late()
        try:
            late.__enter__()
        except Exhausted as error:
            self.refusal = error
            if not self._deadline.expired():
                self._deadline.reschedule(self._loop.time())
        else:
            self._late = late

    def end(self) -> None:
        self._timer.cancel()
        if self._late is not None:
            self._late.__exit__()


class HealthRequests:
    """Receives those of health checks, which anybody may send.

    Few wait at once and none long, so that who sends half of them keeps nobody out.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Timeout, None] = {}

    async def receive(self, context: Context, parser: Parser) -> Any:
        """The request; raises Expired, or InvalidInput for what is none or too large."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S) as deadline:
                self._waiting[deadline] = None
                if len(self._waiting) > HEALTH_WAITING:
                    oldest = next(iter(self._waiting))
                    del self._waiting[oldest]
                    if not oldest.expired():
                        oldest.reschedule(loop.time() + _LAST_MOMENT_S)
                try:
                    raw = await context.read()
                finally:
                    self._waiting.pop(deadline, None)
        except TimeoutError:
            raise _not_there(HEALTH_TIMEOUT_S) from None
        if len(_there(raw)) > HEALTH_BYTES:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the request has {len(raw)} bytes: a health check's has at most {HEALTH_BYTES}",
            )
        return parser.parse(raw)


async def send(context: Context, response: Any, timeout_s: float) -> None:
    """Writes one answer; raises NotTaken if its reader does not take it in time.

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


def when_taken(context: Context, timeout_s: float, then: Callable[[], None]) -> None:
    """Calls `then` once the one answer that is returned next was taken by its reader.

    Resets the call if that takes too long.
    """
    end = reset.ending()
    timer = asyncio.get_running_loop().call_later(timeout_s, end)

    def done(_: Context) -> None:
        timer.cancel()
        then()

    # Its stub is no protocol.
    context.add_done_callback(cast("Any", done))


def _there(raw: Any) -> Any:
    if raw is aio.EOF:
        raise InvalidInput(Reason.INVALID_FIELD, "the call brought no request: send one")
    return raw


def _not_there(timeout_s: float) -> Expired:
    return Expired(
        Reason.DEADLINE_EXCEEDED,
        f"the request did not arrive within {timeout_s:g} s: send it again",
    )
