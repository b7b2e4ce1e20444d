"""Which status stands when gRPC sets one of its own beside the server's, in either order."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from graft._async import End
from grpc import aio


def error(code: grpc.StatusCode, details: str) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(("k", details)), details)


SERVERS = error(grpc.StatusCode.INVALID_ARGUMENT, "no")
OWN = error(grpc.StatusCode.INTERNAL, "Internal error from Core")


class Call:
    """Tells of its end once, with what it ended with then."""

    def __init__(self, first: aio.AioRpcError) -> None:
        self._first = first
        self.end: Callable[[], None] = lambda: None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.end = lambda: callback(self)

    async def code(self) -> grpc.StatusCode:
        return self._first.code()

    async def details(self) -> str | None:
        return self._first.details()

    async def trailing_metadata(self) -> aio.Metadata:
        return self._first.trailing_metadata()


@pytest.mark.parametrize(
    ("first", "raised", "told"),
    [(SERVERS, OWN, SERVERS), (OWN, SERVERS, SERVERS), (OWN, OWN, OWN), (SERVERS,) * 3],
)
def test_the_servers_status_is_told_whichever_came_first(
    first: aio.AioRpcError, raised: aio.AioRpcError, told: aio.AioRpcError
) -> None:
    call = Call(first)
    end = End(call)
    call.end()
    found: Any = end.told(raised)
    assert (found.code(), found.details()) == (told.code(), told.details())
    assert tuple(found.trailing_metadata()) == tuple(told.trailing_metadata())


def test_what_is_raised_before_any_end_is_told_as_it_is() -> None:
    assert End(Call(SERVERS)).told(OWN) is OWN
