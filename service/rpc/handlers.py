"""Makes handlers of RPCs, which are coroutines, of functions that block."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

from grpc import aio

Context = aio.ServicerContext[Any, Any]

Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Response = TypeVar("Response")


def in_store_thread(
    answer: Callable[[Servicer, Request, Context], Response],
) -> Callable[[Servicer, Request, Context], Awaitable[Response]]:
    """Runs a handler that asks a store in one of the stores' threads, with the call's principal."""

    @wraps(answer)
    async def answered(servicer: Servicer, request: Request, context: Context) -> Response:
        return await asyncio.to_thread(answer, servicer, request, context)

    return answered
