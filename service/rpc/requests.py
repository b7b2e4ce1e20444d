"""The requests of a stream: read one by one, within its tenant's rate and what may be held."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from grpc import aio

from service.errors import Expired, Reason
from service.rpc.limits import Place
from service.rpc.messages import Context
from service.rpc.parsing import Parser

IDLE_TIMEOUT_S = 600.0
"""How long a stream may bring nothing while it is owed no answer."""


class Requests:
    """Each is read when it is asked for; `cut` ends them early.

    Who asks for the next one is done with the one before, unless it said `apart`.
    """

    def __init__(
        self,
        context: Context,
        parser: Parser,
        place: Place,
        pace: Callable[[], float],
        idle_timeout_s: float | None,
    ) -> None:
        """`pace`: seconds until the next may be read, 0 if that is now and it was counted.

        Without `idle_timeout_s` whoever reads them sees to it.
        """
        self.is_cut = False
        self._context = context
        self._parser = parser
        self._place = place
        self._pace = pace
        self._idle_timeout_s = idle_timeout_s
        self._is_first = True
        self._are_apart = False
        self._held: dict[int, int] = {}
        self._reading: asyncio.Timeout | None = None
        self._is_waited_for = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The next one; raises InvalidInput if it is too large or its bytes are no such message.

        Raises Expired if none comes within the idle timeout.
        """
        if self.is_cut:
            raise StopAsyncIteration
        if not self._are_apart:
            for message in list(self._held):
                self._release(message)
        try:
            async with asyncio.timeout(None) as self._reading:
                await self._turn()
                self._is_waited_for = True
                self._watch_idleness()
                raw = await self._context.read()
        except TimeoutError:
            if self.is_cut:
                raise StopAsyncIteration from None
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the stream brought nothing for {self._idle_timeout_s:g} s: begin a new one",
            ) from None
        finally:
            self._reading = None
            self._is_waited_for = False
        if raw is aio.EOF:
            raise StopAsyncIteration
        self._is_first = False
        cost = self._parser.cost(raw)
        # It is here, whatever the limits say: those after it wait.
        self._place.hold(cost, is_over_allowed=True)
        try:
            message = self._parser.parse(raw)
        except BaseException:
            self._place.release(cost)
            raise
        self._held[id(message)] = cost
        return message

    def apart(self) -> Callable[[Any], None]:
        """From now on they are answered while further ones are read.

        The result must be called with each whose answer was taken.
        """
        self._are_apart = True
        return self._answered

    def cut(self) -> None:
        """Ends them now, as if the caller had sent no more; twice is as once."""
        if self.is_cut:
            return
        self.is_cut = True
        self._end_reading(0.0)

    async def _turn(self) -> None:
        await self._place.room()
        # The first was counted as the call.
        wait_s = 0.0 if self._is_first else self._pace()
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = self._pace()

    def _answered(self, message: Any) -> None:
        self._release(id(message))
        self._watch_idleness()

    def _release(self, message: int) -> None:
        self._place.release(self._held.pop(message))

    def _watch_idleness(self) -> None:
        if self._is_waited_for and not self._held and self._idle_timeout_s is not None:
            self._end_reading(self._idle_timeout_s)

    def _end_reading(self, after_s: float) -> None:
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time() + after_s)
