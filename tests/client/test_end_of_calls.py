"""Which status stands when gRPC sets one of its own beside the server's, in either order."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from graftml import _async_io
from graftml._async_io import End
from grpc import aio


def error(code: grpc.StatusCode, details: str) -> aio.AioRpcError:
    return aio.AioRpcError(code, aio.Metadata(), aio.Metadata(("k", details)), details)


SERVERS = error(grpc.StatusCode.INVALID_ARGUMENT, "no")
OWN = error(grpc.StatusCode.INTERNAL, "Internal error from Core")


class Call:
    """Has the statuses in their order; is told of its end once, with the first of them."""

    def __init__(self, *statuses: aio.AioRpcError) -> None:
        self._statuses = statuses
        self.looked = 0
        self.end: Callable[[], None] = lambda: None

    @property
    def _now(self) -> aio.AioRpcError:
        return self._statuses[min(self.looked, len(self._statuses) - 1)]

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.end = lambda: callback(self)

    async def code(self) -> grpc.StatusCode:
        return self._now.code()

    async def details(self) -> str | None:
        details = self._now.details()
        self.looked += 1
        return details

    async def trailing_metadata(self) -> aio.Metadata:
        return self._now.trailing_metadata()


@pytest.mark.parametrize(
    ("statuses", "raised", "told"),
    [
        ([SERVERS], OWN, SERVERS),
        ([OWN], SERVERS, SERVERS),
        ([SERVERS], SERVERS, SERVERS),
        # gRPC's own is what is raised, and the server's arrives after it.
        ([OWN, OWN, OWN, SERVERS], OWN, SERVERS),
        ([OWN], OWN, OWN),
    ],
)
async def test_the_servers_status_is_told_whichever_came_first(
    statuses: list[aio.AioRpcError],
    raised: aio.AioRpcError,
    told: aio.AioRpcError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_async_io, "_LOOK_S", 0.0)
    call = Call(*statuses)
    end = End(call)
    call.end()
    found: Any = await end.told(raised)
    assert (found.code(), found.details()) == (told.code(), told.details())
    assert tuple(found.trailing_metadata()) == tuple(told.trailing_metadata())
