"""Calls that work in threads keep their slots until these end, and no reader waits for them."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.errors import InvalidInput, Reason
from service.ingest.index import Index
from service.ingest.process import ReaderProcesses
from service.jobs.uninterrupted import in_thread
from service.rpc import fine_tune
from tests.rpc.conftest import GUARD_S, MakeService, Service, colours, refusal


async def test_a_caller_who_leaves_keeps_its_place_until_its_images_are_let_be(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, go_on = threading.Event(), threading.Event()
    readings: list[Index] = []
    abandoned: list[threading.Event] = []

    async def noted(work: Callable[[threading.Event], Any]) -> Any:
        def note(is_abandoned: threading.Event) -> Any:
            abandoned.append(is_abandoned)
            return work(is_abandoned)

        return await in_thread(note)

    read = ReaderProcesses.read

    def held(self: ReaderProcesses, *arguments: Any) -> Index:
        decoding.set()
        assert go_on.wait(GUARD_S)
        index = read(self, *arguments)
        readings.append(index)
        return index

    monkeypatch.setattr(ReaderProcesses, "read", held)
    monkeypatch.setattr(fine_tune, "in_thread", noted)
    service: Service = await make_service(max_uploads=1, threads=1)
    request = pb.FineTuneRequest(model="gone", inline_images=colours())
    call = service.fine_tuning.FineTune(request)
    waiting = asyncio.ensure_future(call.code())
    await asyncio.to_thread(decoding.wait, GUARD_S)
    call.cancel()
    await waiting
    # The server hears of it a little later.
    await asyncio.to_thread(abandoned[0].wait, GUARD_S)
    refused = await refusal(service.fine_tuning.FineTune(request))
    assert refused.reason == "TOO_MANY_CALLS"
    go_on.set()
    request.model = "stays"
    async with asyncio.timeout(GUARD_S):
        while await service.fine_tuning.FineTune(request).code() is not grpc.StatusCode.OK:
            pass
    listed = await service.fine_tuning.ListJobs(pb.ListJobsRequest())
    assert [job.model for job in listed.jobs] == ["stays"]
    # The first call's was given up.
    assert len(readings) == 1


async def test_calls_that_store_images_keep_no_reader_waiting(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing, go_on, calls = threading.Semaphore(0), threading.Event(), 40

    def held(*_: Any) -> Index:
        storing.release()
        assert go_on.wait(GUARD_S)
        raise InvalidInput(Reason.DATASET_UNUSABLE, "enough")

    monkeypatch.setattr(ReaderProcesses, "read", held)
    service: Service = await make_service(max_uploads=calls)
    request = pb.FineTuneRequest(model="many", inline_images=colours(1))
    started = [
        asyncio.ensure_future(service.fine_tuning.FineTune(request).code()) for _ in range(calls)
    ]
    for _ in range(calls):
        assert await asyncio.to_thread(storing.acquire, timeout=GUARD_S)
    listed = await service.fine_tuning.ListJobs(pb.ListJobsRequest())
    assert len(listed.jobs) == 0
    go_on.set()
    assert set(await asyncio.gather(*started)) == {grpc.StatusCode.INVALID_ARGUMENT}
