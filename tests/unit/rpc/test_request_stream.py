"""Requests of a stream: read within the bytes held and the tenant's rate, idle for so long."""

import asyncio
from typing import Any

import pytest

from service.errors import Exhausted, GraftError, Reason
from service.rpc.admission import Admission, CallLimits, Slot
from service.rpc.message_io import Parser
from service.rpc.request_stream import RequestStream

GUARD_S = 60.0
PREDICT = "/graft.v1.PredictionService/Predict"
STREAM = "/graft.v1.PredictionService/PredictStream"


class Wire:
    """The context of a stream whose requests are bytes, as they are put."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.reading = 0

    async def read(self) -> Any:
        self.reading += 1
        return await self.sent.get()


def stream(wire: Wire, slot: Slot, **options: Any) -> RequestStream:
    options = {"wait_s": lambda: 0.0, "idle_timeout_s": None, **options}
    context: Any = wire
    return RequestStream(context, Parser(STREAM, lambda raw: [raw]), slot, **options)


async def turns() -> None:
    """Lets others run until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_stream_reads_on_when_what_it_holds_was_answered() -> None:
    admission, wire = Admission(CallLimits(held_bytes=10)), Wire()
    slot = admission.admit(STREAM)
    requests = stream(wire, slot)
    answered = requests.keep_until_answered()
    for raw in (b"x" * 4, b"x" * 8, b"x"):
        wire.sent.put_nowait(raw)
    first, second = await anext(requests), await anext(requests)
    third = asyncio.ensure_future(anext(requests))
    await turns()
    assert not third.done()
    assert wire.reading == 2
    with pytest.raises(Exhausted):
        admission.admit(PREDICT)
    answered(second)
    assert await third == [b"x"]
    answered(first)
    slot.release()
    admission.admit(PREDICT).hold(10)


async def test_two_streams_wait_for_the_bytes_that_a_third_call_holds() -> None:
    admission = Admission(CallLimits(held_bytes=10))
    full = admission.admit(PREDICT)
    slots = [admission.admit(STREAM) for _ in range(2)]
    full.hold(10)
    reads = []
    for slot in slots:
        wire = Wire()
        wire.sent.put_nowait(b"x")
        reads.append(asyncio.ensure_future(anext(stream(wire, slot))))
    await turns()
    assert not any(read.done() for read in reads)
    full.release()
    async with asyncio.timeout(GUARD_S):
        assert await asyncio.gather(*reads) == [[b"x"], [b"x"]]


async def test_a_stream_whose_requests_are_taken_one_by_one_holds_one() -> None:
    wire = Wire()
    requests = stream(wire, Admission(CallLimits(held_bytes=10)).admit(STREAM, "acme"))
    for _ in range(20):
        wire.sent.put_nowait(b"xxxxx")
        async with asyncio.timeout(GUARD_S):
            await anext(requests)


async def test_a_stream_is_read_no_faster_than_its_tenant_may_call() -> None:
    waits, asked = [0.001, 0.001], 0

    def wait_s() -> float:
        nonlocal asked
        asked += 1
        return waits.pop() if waits else 0.0

    wire = Wire()
    requests = stream(wire, Admission(CallLimits()).admit(STREAM), wait_s=wait_s)
    for _ in range(2):
        wire.sent.put_nowait(b"x")
    await anext(requests)
    assert asked == 0
    await anext(requests)
    # Twice too early.
    assert asked == 3


async def test_a_stream_that_brings_nothing_ends() -> None:
    wire = Wire()
    requests = stream(wire, Admission(CallLimits()).admit(STREAM), idle_timeout_s=0.01)
    wire.sent.put_nowait(b"x")
    await anext(requests)
    with pytest.raises(GraftError, match=r"brought nothing for 0.01 s") as caught:
        await anext(requests)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED


@pytest.mark.parametrize("wait_s", [0.0, 3600.0], ids=["for a request", "for its turn"])
async def test_a_stream_that_waits_is_cut_at_once(wait_s: float) -> None:
    wire = Wire()
    requests = stream(wire, Admission(CallLimits()).admit(STREAM), wait_s=lambda: wait_s)
    wire.sent.put_nowait(b"x")
    await anext(requests)
    second = asyncio.ensure_future(anext(requests))
    await turns()
    for _ in range(2):
        requests.cut()
    with pytest.raises(StopAsyncIteration):
        await second
    with pytest.raises(StopAsyncIteration):
        await anext(requests)
