"""One upload over a stream: a message that describes it, what it brings, and an end that counts.

The next message is read when the one before is on disk. Whatever ends the call early ends
the upload, too.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from service.errors import Expired, InvalidInput, Reason
from service.jobs.uninterrupted import in_long_thread, uninterrupted

_LEAST_BYTES = 2**20
"""What an upload must bring in each of its idle timeouts, on average, once the first is over."""

Stored = TypeVar("Stored")
Stored_co = TypeVar("Stored_co", covariant=True)


class Upload(Protocol[Stored_co]):
    """Something on its way in; its methods block."""

    def finish(self) -> Stored_co:
        """Checks and stores what came."""

    def abandon(self) -> None:
        """Has a finish in another thread give up soon; waits for nothing."""

    def abort(self) -> None:
        """Throws away what is not finished; harmless after the finish."""


async def received(
    messages: AsyncIterator[Any],
    first: str,
    begin: Callable[[Any], Upload[Stored]],
    take: Callable[[Any, Any], None],
    idle_timeout_s: float,
) -> Stored:
    """Returns what a stream became, whose messages have their content in the oneof `part`.

    `begin` is given the first message's content, which is its field `first`, and makes the
    upload that `take` is called with for each further message; both block. Raises
    InvalidInput, Expired, and what they raise.
    """
    started = asyncio.get_running_loop().time()

    async def following(timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(messages, None)
        except TimeoutError:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the upload brought nothing for {idle_timeout_s:g} s, or less than "
                f"{_LEAST_BYTES // 2**20} MiB in each such time on average: send it again",
            ) from None

    message = await following(idle_timeout_s)
    if message is None or message.WhichOneof("part") != first:
        raise bad(f"the stream must begin with the {first}", first)
    upload = await _begun(begin, getattr(message, first))
    try:
        count = taken_bytes = 0
        while True:
            # Else who sends a byte a minute holds an upload's place for ever.
            allowed_s = idle_timeout_s * (1 + taken_bytes / _LEAST_BYTES)
            left_s = started + allowed_s - asyncio.get_running_loop().time()
            message = await following(min(left_s, idle_timeout_s))
            if message is None or message.WhichOneof("part") == "end":
                break
            if message.WhichOneof("part") == first:
                raise bad(f"the {first} came twice: send it once, first", first)
            await in_long_thread(take, upload, message)
            taken_bytes += message.ByteSize()
            count += 1
        if message is None or message.end.message_count != count:
            raise bad(
                f"the upload was cut off after {count} messages, without the `end` that tells "
                "how many there are: send it again",
                "end",
            )
        return await in_long_thread(upload.finish)
    finally:
        # At once: a thread for the rest may have to be waited for.
        upload.abandon()
        # To its end, and that of a thread that still finishes: so long the call keeps its place.
        await uninterrupted(in_long_thread(upload.abort))


async def _begun(begin: Callable[[Any], Upload[Stored]], content: Any) -> Upload[Stored]:
    beginning = asyncio.create_task(in_long_thread(begin, content))
    try:
        return await asyncio.shield(beginning)
    except asyncio.CancelledError:
        # The thread goes on, and its folder would be left to nobody.
        await uninterrupted(_abort_begun(beginning))
        raise


async def _abort_begun(beginning: "asyncio.Task[Upload[Stored]]") -> None:
    await asyncio.wait({beginning})
    if beginning.exception() is None:
        await in_long_thread(beginning.result().abort)


def bad(message: str, field: str) -> InvalidInput:
    """Returns the refusal of a message of the stream."""
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)
