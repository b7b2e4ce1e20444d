"""Uploads over a stream: a message that describes it, messages that bring it, an end that counts.

The next message is read once the one before is on disk. Whatever ends the call early ends
the upload, too.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from service.errors import Expired, Reason, bad_field
from service.jobs.uninterrupted import begun, in_long_thread, uninterrupted

Stored = TypeVar("Stored")
Stored_co = TypeVar("Stored_co", covariant=True)


class Upload(Protocol[Stored_co]):
    """An upload on its way to the disk; its methods block."""

    def finish(self) -> Stored_co:
        """Checks and stores what came."""

    def abandon(self) -> None:
        """Makes a `finish` in another thread give up soon, without waiting for it."""

    def abort(self) -> None:
        """Deletes what is not finished; a no-op after `finish`."""


async def received(
    messages: AsyncIterator[Any],
    first: str,
    begin: Callable[[Any], Upload[Stored]],
    take: Callable[[Any, Any], None],
    idle_timeout_s: float,
) -> Stored:
    """Receives an upload and returns what was stored of it.

    Each message has its content in the oneof `part`. `begin` makes the upload of the first
    one's field `first`; `take` is called with the upload and each further message; both block.
    Raises InvalidInput, Expired, and what `begin`, `take` and the upload raise.
    """

    async def next_message() -> Any:
        try:
            async with asyncio.timeout(idle_timeout_s):
                return await anext(messages, None)
        except TimeoutError:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the upload brought nothing for {idle_timeout_s:g} s: send it again",
            ) from None

    message = await next_message()
    if message is None or message.WhichOneof("part") != first:
        raise bad_field(first, f"the stream must begin with the {first}")
    # A thread goes on when nobody waits for it, and its folder would belong to nobody.
    upload = await begun(
        in_long_thread(begin, getattr(message, first)), lambda upload: in_long_thread(upload.abort)
    )
    try:
        count = 0
        while True:
            message = await next_message()
            if message is None or message.WhichOneof("part") == "end":
                break
            if message.WhichOneof("part") == first:
                raise bad_field(first, f"the {first} came twice: send it once, first")
            await in_long_thread(take, upload, message)
            count += 1
        if message is None or message.end.message_count != count:
            raise bad_field(
                "end",
                f"the upload was cut off after {count} messages, without the `end` that tells "
                "how many there are: send it again",
            )
        return await in_long_thread(upload.finish)
    finally:
        # At once: a thread for the rest may have to be waited for.
        upload.abandon()
        # To its end, and that of a thread that still finishes: so long the call keeps its slot.
        await uninterrupted(in_long_thread(upload.abort))
