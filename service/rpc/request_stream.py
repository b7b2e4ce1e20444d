"""The requests of a streaming call, read one by one within its tenant's rate and the bytes held."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from grpc import aio

from service.errors import Expired, Reason
from service.rpc.admission import Slot
from service.rpc.handlers import Context
from service.rpc.message_io import Parser

IDLE_TIMEOUT_S = 600.0
"""Time for a stream's next request to arrive; longer than any answer takes."""


class RequestStream:
    """An async iterator over requests, each read when it is asked for; `cut` ends it early.

    Asking for the next request releases the bytes of the one before, unless
    `keep_until_answered` was called.
    """

    def __init__(
        self,
        context: Context,
        parser: Parser,
        slot: Slot,
        wait_s: Callable[[], float],
        idle_timeout_s: float | None = IDLE_TIMEOUT_S,
    ) -> None:
        """`wait_s` counts a request and returns 0.0, or returns the seconds to wait first."""
        self.is_cut = False
        self._context = context
        self._parser = parser
        self._slot = slot
        self._wait_s = wait_s
        self._idle_timeout_s = idle_timeout_s
        self._is_first = True
        self._are_kept = False
        self._held: dict[int, int] = {}
        self._reading: asyncio.Timeout | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Reads the next request; raises InvalidInput for one that is too large or no message.

        Raises Expired if none arrives within the idle timeout.
        """
        if not self._are_kept:
            for message in list(self._held):
                self._release(message)
        raw = await self._read()
        if raw is aio.EOF:
            raise StopAsyncIteration
        cost = await self._parser.cost(raw)
        # It has arrived, whatever the limit: the next one waits until there are bytes for it.
        self._slot.hold(cost, may_exceed=True)
        try:
            message = self._parser.parse(raw)
        except BaseException:
            self._slot.release_bytes(cost)
            raise
        self._held[id(message)] = cost
        return message

    def keep_until_answered(self) -> Callable[[Any], None]:
        """Keeps requests counted while further ones are read.

        The result must be called with each request whose answer was sent.
        """
        self._are_kept = True
        return lambda message: self._release(id(message))

    def cut(self) -> None:
        """Ends the stream now, as if the caller had sent no more; idempotent."""
        if not self.is_cut:
            self.is_cut = True
            self._expire_in(0.0)

    async def _read(self) -> Any:
        if self.is_cut:
            return aio.EOF
        try:
            async with asyncio.timeout(None) as self._reading:
                await self._wait_turn()
                if self._idle_timeout_s is not None and not self.is_cut:
                    self._expire_in(self._idle_timeout_s)
                return await self._context.read()
        except TimeoutError:
            if self.is_cut:
                return aio.EOF
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the stream brought nothing for {self._idle_timeout_s:g} s: begin a new one",
            ) from None
        finally:
            self._reading = None

    async def _wait_turn(self) -> None:
        await self._slot.wait_bytes()
        # The first request was counted as the call.
        wait_s = 0.0 if self._is_first else self._wait_s()
        self._is_first = False
        while wait_s > 0:
            await asyncio.sleep(wait_s)
            wait_s = self._wait_s()

    def _release(self, message: int) -> None:
        self._slot.release_bytes(self._held.pop(message))

    def _expire_in(self, seconds: float) -> None:
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time() + seconds)
