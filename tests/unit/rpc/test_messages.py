import asyncio
from typing import Any

import pytest
from grpc import aio

from service.rpc import messages


class Gone:
    """The context of a caller who is gone."""

    async def write(self, response: object) -> None:
        raise aio.InternalError('Failed "execute_batch"')


async def test_an_answer_to_a_caller_who_is_gone_ends_the_call_as_a_cancel_does() -> None:
    context: Any = Gone()
    with pytest.raises(asyncio.CancelledError):
        await messages.send(context, b"answer", 1.0)
