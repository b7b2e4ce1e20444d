"""Limits on what one caller, one tenant or anybody may hold; callers who may not go on."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from graftml_stubs.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
)
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.auth.principal import Principal
from service.errors import Reason, Unauthenticated
from service.ops.metrics import Metrics
from service.rpc import admission
from service.rpc.admission import Slot
from service.rpc.server import RpcServer
from tests.rpc.conftest import MakeService, Service, image, refusal
from tests.rpc.test_wire import handlers, never, serving, settled

pytestmark = pytest.mark.usefixtures("held_as_sent")

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
PREDICT = "/graft.v1.PredictionService/Predict"
STREAM = "/graft.v1.PredictionService/PredictStream"
EXPORT = "/graft.v1.ModelService/ExportModel"


class Tenants:
    """Authenticates callers as the tenant that they name."""

    def __init__(self) -> None:
        self.is_shared = True
        self.gone: set[str] = set()
        self.waits: list[float] = []
        self.asked = 0

    def admit(self, method: str, metadata: Any) -> Principal:
        tenant = dict(metadata)["tenant"]
        return Principal(tenant, tenant, frozenset({"admin"}))

    def recheck(self, method: str, who: Principal) -> None:
        if who.tenant in self.gone:
            raise Unauthenticated(Reason.TOKEN_UNKNOWN, "gone")

    def wait_s(self, who: Principal) -> float:
        self.asked += 1
        return self.waits.pop() if self.waits else 0.0


class Slow(model_pb2_grpc.ModelServiceServicer):
    """Answers when told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.arrived = asyncio.Semaphore(0)

    async def GetModel(  # noqa: N802
        self, request: Any, context: Any
    ) -> Any:
        self.arrived.release()
        await self.go_on.wait()
        return model_pb2.GetModelResponse()

    async def GetReport(  # noqa: N802
        self, request: Any, context: Any
    ) -> Any:
        self.arrived.release()
        return model_pb2.GetReportResponse(
            content=bytes(2 ** (24 if request.model == "large" else 21))
        )


def of(tenant: str) -> list[tuple[str, str]]:
    return [("tenant", tenant)]


# Health


async def test_a_health_check_that_is_late_or_large_is_refused(make_service: MakeService) -> None:
    service: Service = await make_service(message_timeout_s=0.3)
    large = health_pb2.HealthCheckRequest(service="x" * 1024).SerializeToString()
    for method in (CHECK, WATCH):
        refused = await refusal(service.channel.stream_unary(method)(never()))
        assert "did not arrive within 0.3 s" in refused.message
        refused = await refusal(service.channel.unary_unary(method)(large))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 1024" in refused.message


async def test_health_checks_leave_the_bytes_of_requests_to_others() -> None:
    async with serving(Slow(), held_bytes=100) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watchers = [stub.Watch(health_pb2.HealthCheckRequest(service="x" * 90)) for _ in range(3)]
        for watcher in watchers:
            await watcher.read()
        models: Any = model_pb2_grpc.ModelServiceStub(channel)
        await models.GetReport(model_pb2.GetReportRequest(model="m" * 80))
        for watcher in watchers:
            watcher.cancel()


# Calls at once


async def test_a_large_answer_that_is_not_read_keeps_its_slot_until_it_is() -> None:
    slow = Slow()
    async with serving(slow, calls=1) as channel:
        # A client takes none of a stream's answers before it asks, but for what windows hold.
        report = channel.unary_stream("/graft.v1.ModelService/GetReport")
        unread = report(model_pb2.GetReportRequest(model="large").SerializeToString())
        await slow.arrived.acquire()
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.GetReportRequest()
        assert (await refusal(stub.GetReport(request))).reason == "TOO_MANY_CALLS"
        assert len(await unread.read()) > 2**24
        await settled(lambda: not handlers())
        for _ in range(2):
            assert len((await stub.GetReport(request)).content) == 2**21


async def test_of_thousands_of_calls_at_once_each_that_is_refused_is_told_why() -> None:
    slow = Slow()
    async with serving(slow, Tenants(), calls=10) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        asked = model_pb2.GetModelRequest(model="m")
        calls = [stub.GetModel(asked, metadata=of(f"t{n % 10}")) for n in range(3000)]
        for _ in range(10):
            await slow.arrived.acquire()
        ended = [asyncio.ensure_future(call.code()) for call in calls]
        await settled(lambda: sum(code.done() for code in ended) == 2990)
        refused = [call for call in calls if call.done()]
        assert {await call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert (await refusal(refused[-1])).reason == "TOO_MANY_CALLS"
        slow.go_on.set()
        await asyncio.gather(*ended)


# Tenants


async def test_one_tenant_gets_half_the_places_and_half_of_what_requests_may_hold() -> None:
    slow = Slow()
    async with serving(slow, Tenants(), calls=3, held_bytes=4000) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        small, large = (model_pb2.GetModelRequest(model="m" * n) for n in (10, 1990))
        calls = [asyncio.ensure_future(stub.GetModel(small, metadata=of("acme"))) for _ in "12"]
        for _ in calls:
            await slow.arrived.acquire()
        refused = await refusal(stub.GetModel(small, metadata=of("acme")))
        assert refused.reason == "TOO_MANY_CALLS"
        assert "2 calls of /graft.v1.ModelService/GetModel of tenant acme" in refused.message
        report = model_pb2.GetReportRequest(model="m" * 1990)
        refused = await refusal(stub.GetReport(report, metadata=of("acme")))
        assert "requests of tenant acme" in refused.message
        calls.append(asyncio.ensure_future(stub.GetModel(large, metadata=of("zoo"))))
        await slow.arrived.acquire()
        slow.go_on.set()
        await asyncio.gather(*calls)
        await stub.GetReport(report, metadata=of("acme"))


async def test_a_tenant_that_is_alone_gets_all_places_until_another_comes() -> None:
    slow, authenticator = Slow(), Tenants()
    authenticator.is_shared = False
    async with serving(slow, authenticator, calls=4) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        asked = model_pb2.GetModelRequest(model="m")
        calls = [asyncio.ensure_future(stub.GetModel(asked, metadata=of("acme"))) for _ in "123"]
        for _ in calls:
            await slow.arrived.acquire()
        authenticator.is_shared = True
        calls.append(asyncio.ensure_future(stub.GetModel(asked, metadata=of("zoo"))))
        await slow.arrived.acquire()
        slow.go_on.set()
        await asyncio.gather(*calls)
        # All was given back, and now it is one of two.
        slow.go_on.clear()
        calls = [asyncio.ensure_future(stub.GetModel(asked, metadata=of("acme"))) for _ in "12"]
        for _ in calls:
            await slow.arrived.acquire()
        assert (
            "of tenant acme" in (await refusal(stub.GetModel(asked, metadata=of("acme")))).message
        )
        slow.go_on.set()
        await asyncio.gather(*calls)


async def test_a_stream_gives_back_each_request_that_was_answered(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: list[Slot] = []

    class Noted(Slot):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            slots.append(self)

    monkeypatch.setattr(admission, "Slot", Noted)
    service: Service = await make_service()
    await service.make_model()
    one = prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="colours")],
        images=[prediction_pb2.Image(encoded=image("red"))],
    )
    call = service.prediction.PredictStream()
    for number in range(5):
        await call.write(prediction_pb2.PredictStreamRequest(id=str(number), request=one))
        assert (await call.read()).id == str(number)
    await settled(lambda: slots[-1].held_bytes == 0)
    call.cancel()


# Permissions that are taken back


async def test_after_a_change_idle_streams_and_uploads_of_who_is_gone_end() -> None:
    authenticator, begun, aborted = Tenants(), asyncio.Event(), asyncio.Event()

    class Uploads(dataset_pb2_grpc.DatasetServiceServicer):
        async def UploadDataset(  # noqa: N802
            self, request_iterator: Any, context: Any
        ) -> Any:
            try:
                async for _ in request_iterator:
                    begun.set()
                return dataset_pb2.UploadDatasetResponse()
            finally:
                aborted.set()

    server = RpcServer(
        [(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, Uploads())],
        Metrics({"version": "1"}),
        2**26,
        authenticator=authenticator,
    )
    port = await server.start("127.0.0.1:0")
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            uploads: Any = dataset_pb2_grpc.DatasetServiceStub(channel)
            reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            listed = reflection_pb2.ServerReflectionRequest(list_services="")
            streams = {}
            for tenant in ("acme", "zoo"):
                streams[tenant] = reflect.ServerReflectionInfo(metadata=of(tenant))
                await streams[tenant].write(listed)
                await streams[tenant].read()
            upload = uploads.UploadDataset(metadata=of("acme"))
            await upload.write(dataset_pb2.UploadDatasetRequest())
            await begun.wait()
            authenticator.gone.add("acme")
            server.recheck()
            for read in (upload, streams["acme"].read()):
                refused = await refusal(read)
                assert (refused.code, refused.reason) == (
                    grpc.StatusCode.UNAUTHENTICATED,
                    "TOKEN_UNKNOWN",
                )
            assert aborted.is_set()
            await streams["zoo"].write(listed)
            assert await streams["zoo"].read() is not aio.EOF
            streams["zoo"].cancel()
    finally:
        await server.drain(0.1)


async def test_who_is_gone_gets_no_further_answer_of_a_stream() -> None:
    authenticator, go_on = Tenants(), asyncio.Event()

    class Exports(model_pb2_grpc.ModelServiceServicer):
        async def ExportModel(  # noqa: N802
            self, request: Any, context: Any
        ) -> AsyncIterator[Any]:
            yield model_pb2.ExportModelResponse(chunk=b"1")
            await go_on.wait()
            yield model_pb2.ExportModelResponse(chunk=b"2")

    async with serving(Exports(), authenticator) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        call = stub.ExportModel(model_pb2.ExportModelRequest(), metadata=of("acme"))
        assert (await call.read()).chunk == b"1"
        # Before anybody has looked at the calls under way.
        authenticator.gone.add("acme")
        go_on.set()
        assert (await refusal(call.read())).reason == "TOKEN_UNKNOWN"


async def test_who_is_gone_when_its_request_arrives_is_not_answered() -> None:
    authenticator, slow = Tenants(), Slow()

    async def late() -> AsyncIterator[bytes]:
        await let_go.wait()
        yield b""

    let_go = asyncio.Event()
    async with serving(slow, authenticator) as channel:
        call = channel.stream_unary("/graft.v1.ModelService/GetReport")(late(), metadata=of("acme"))
        await settled(lambda: any(handlers()))
        authenticator.gone.add("acme")
        let_go.set()
        assert (await refusal(call)).reason == "TOKEN_UNKNOWN"
        assert slow.arrived.locked()


async def test_a_port_that_is_taken_is_told_with_the_flag_that_names_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = RpcServer([], Metrics({"version": "1"}), 2**26, authenticator=Tenants())
        with pytest.raises(OSError, match=r"\(Address already in use\): set --host and --port"):
            await server.start(address)
