"""What one caller, one tenant or anybody at all may hold, and who may not go on."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from graft.v1 import dataset_pb2, dataset_pb2_grpc, model_pb2, model_pb2_grpc, prediction_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.auth.principal import Principal
from service.errors import Exhausted, GraftError, Reason, Unauthenticated
from service.ops.metrics import Metrics
from service.rpc import messages, requests
from service.rpc.calls import Calls
from service.rpc.limits import CallBounds, Limits, Place
from service.rpc.parsing import Parser
from service.rpc.server import RpcServer, to_register
from tests.rpc.conftest import GUARD_S, MakeService, Service, image, refusal
from tests.rpc.test_wire import handlers, health, never, serving, settled
from tests.unit.loop_clock import LoopClock

pytestmark = pytest.mark.usefixtures("held_as_sent")

CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
PREDICT = "/graft.v1.PredictionService/Predict"
STREAM = "/graft.v1.PredictionService/PredictStream"
EXPORT = "/graft.v1.ModelService/ExportModel"


class Tenants:
    """A gate that lets in whoever says which tenant it is."""

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


async def test_health_checks_whose_request_does_not_come_keep_nobody_out(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "HEALTH_WAITING", 3)
    monkeypatch.setattr(messages, "_LAST_MOMENT_S", 0.0)
    service: Service = await make_service(max_calls=2)
    waiting = [service.channel.stream_unary(CHECK)(never()) for _ in range(8)]
    # The oldest five; and no more, since the others' two seconds are not over.
    await settled(lambda: sum(call.done() for call in waiting) == 5)
    for ended in [call for call in waiting if call.done()]:
        assert (await refusal(ended)).code is grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(5):
        await health(service.channel)
    for call in waiting:
        call.cancel()


async def test_a_health_check_that_is_late_or_large_is_refused_and_holds_nothing(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service: Service = await make_service()
    for method in (CHECK, WATCH):
        with monkeypatch.context() as patch:
            patch.setattr(messages, "HEALTH_TIMEOUT_S", 0.05)
            refused = await refusal(service.channel.stream_unary(method)(never()))
        assert "did not arrive within 0.05 s" in refused.message
        large = health_pb2.HealthCheckRequest(service="x" * 1024).SerializeToString()
        refused = await refusal(service.channel.unary_unary(method)(large))
        assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 1024" in refused.message


async def test_those_who_watch_health_leave_the_bytes_of_requests_to_others() -> None:
    async with serving(Slow(), held_bytes=100) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watchers = [stub.Watch(health_pb2.HealthCheckRequest(service="x" * 90)) for _ in range(3)]
        for watcher in watchers:
            await watcher.read()
        models: Any = model_pb2_grpc.ModelServiceStub(channel)
        await models.GetReport(model_pb2.GetReportRequest(model="m" * 80))
        for watcher in watchers:
            watcher.cancel()


# Requests on their way, and answers


async def test_few_requests_may_be_long_on_their_way_and_the_others_need_no_place_for_it(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(Slow(), late=1) as channel:
        with monkeypatch.context() as patch:
            patch.setattr(messages, "GRACE_S", 0.01)
            report = channel.stream_unary("/graft.v1.ModelService/GetReport")
            late = [report(never()) for _ in range(2)]
            done, pending = await asyncio.wait(
                [asyncio.ensure_future(refusal(call)) for call in late],
                return_when=asyncio.FIRST_COMPLETED,
                timeout=GUARD_S,
            )
        (refused,) = [task.result() for task in done]
        assert (refused.reason, refused.retry_s) == ("TOO_MANY_CALLS", 1)
        assert "1 requests on their way" in refused.message
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        await stub.GetReport(model_pb2.GetReportRequest())
        for task in pending:
            task.cancel()
        for call in late:
            call.cancel()
        await settled(lambda: not handlers())


async def test_a_large_answer_that_is_not_taken_keeps_its_place_and_is_reset_in_time() -> None:
    slow, clock = Slow(), LoopClock()
    async with serving(slow, calls=1) as channel:
        # A client takes none of a stream's answers before it asks, but for what windows hold.
        report = channel.unary_stream("/graft.v1.ModelService/GetReport")
        unread = report(model_pb2.GetReportRequest(model="large").SerializeToString())
        await slow.arrived.acquire()
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.GetReportRequest()
        assert (await refusal(stub.GetReport(request))).reason == "TOO_MANY_CALLS"

        def is_reset() -> bool:
            clock.skip(GUARD_S)
            return not handlers()

        await settled(is_reset)
        # One that is taken gives back its place at once.
        for _ in range(2):
            assert len((await stub.GetReport(request)).content) == 2**21
        with pytest.raises(aio.AioRpcError):
            await unread.read()


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
    slow, gate = Slow(), Tenants()
    gate.is_shared = False
    async with serving(slow, gate, calls=4) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        asked = model_pb2.GetModelRequest(model="m")
        calls = [asyncio.ensure_future(stub.GetModel(asked, metadata=of("acme"))) for _ in "123"]
        for _ in calls:
            await slow.arrived.acquire()
        gate.is_shared = True
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


def test_what_a_tenant_gave_back_it_may_have_again() -> None:
    limits = Limits(CallBounds(exports=4, held_bytes=100))
    for _ in range(3):
        with limits.place(EXPORT, "acme") as one, limits.place(EXPORT, "acme"):
            one.hold(50)
            with pytest.raises(Exhausted, match="2 exports of tenant acme"):
                limits.place(EXPORT, "acme").__enter__()
            with limits.place(EXPORT, "zoo") as other:
                other.hold(50)
                one.release(50)
                one.hold(50)
    with limits.place(EXPORT) as everybody:
        everybody.hold(100)


# Streams


class Wire:
    """The context of a stream whose requests are bytes, as they are put."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.reading = 0

    async def read(self) -> Any:
        self.reading += 1
        return await self.sent.get()


def stream(wire: Wire, place: Any, **options: Any) -> requests.Requests:
    options = {"pace": lambda: 0.0, "idle_timeout_s": None, **options}
    context: Any = wire
    return requests.Requests(context, Parser(STREAM, lambda raw: [raw]), place, **options)


async def turn() -> None:
    """Lets others run until they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_stream_reads_on_when_what_it_holds_was_answered() -> None:
    limits, wire = Limits(CallBounds(held_bytes=10)), Wire()
    with limits.place(STREAM) as place:
        coming = stream(wire, place)
        answered = coming.apart()
        for raw in (b"x" * 4, b"x" * 8, b"x"):
            wire.sent.put_nowait(raw)
        first, second = await anext(coming), await anext(coming)
        third = asyncio.ensure_future(anext(coming))
        await turn()
        assert not third.done()
        assert wire.reading == 2
        with pytest.raises(Exhausted), limits.place(PREDICT):
            pass
        answered(second)
        assert await third == [b"x"]
        answered(first)
    with limits.place(PREDICT) as other:
        other.hold(10)


async def test_a_stream_whose_requests_are_taken_one_by_one_holds_one() -> None:
    limits, wire = Limits(CallBounds(held_bytes=10)), Wire()
    with limits.place(STREAM, "acme") as place:
        coming = stream(wire, place)
        for _ in range(20):
            wire.sent.put_nowait(b"xxxxx")
            async with asyncio.timeout(GUARD_S):
                await anext(coming)


async def test_a_stream_is_read_no_faster_than_its_tenant_may_call() -> None:
    wire, gate = Wire(), Tenants()
    gate.waits = [0.001, 0.001]
    with Limits(CallBounds()).place(STREAM) as place:
        coming = stream(wire, place, pace=lambda: gate.wait_s(Principal("a", "a", frozenset())))
        for _ in range(2):
            wire.sent.put_nowait(b"x")
        await anext(coming)
        assert gate.asked == 0
        await anext(coming)
        # Twice too early.
        assert gate.asked == 3


async def test_a_stream_that_brings_nothing_and_is_owed_nothing_ends() -> None:
    wire = Wire()
    with Limits(CallBounds()).place(STREAM) as place:
        coming = stream(wire, place, idle_timeout_s=0.01)
        answered = coming.apart()
        wire.sent.put_nowait(b"x")
        first = await anext(coming)
        second = asyncio.ensure_future(anext(coming))
        done, _ = await asyncio.wait([second], timeout=0.03)
        assert not done
        answered(first)
        with pytest.raises(GraftError, match=r"brought nothing for 0.01 s") as caught:
            await second
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED


async def test_a_stream_that_waits_for_its_turn_is_cut_as_one_that_waits_for_a_request() -> None:
    wire = Wire()
    with Limits(CallBounds()).place(STREAM) as place:
        coming = stream(wire, place, pace=lambda: 3600.0)
        wire.sent.put_nowait(b"x")
        await anext(coming)
        second = asyncio.ensure_future(anext(coming))
        await turn()
        coming.cut()
        with pytest.raises(StopAsyncIteration):
            await second


async def test_a_stream_gives_back_each_request_that_was_answered(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Any] = []
    monkeypatch.setattr(
        Limits,
        "place",
        lambda self, method, tenant=None: places.append(Place(self, method, tenant)) or places[-1],
    )
    service: Service = await make_service()
    await service.make_model()
    one = prediction_pb2.PredictRequest(
        model="colours", images=[prediction_pb2.Image(encoded=image("red"))]
    )
    call = service.prediction.PredictStream()
    for number in range(5):
        await call.write(prediction_pb2.PredictStreamRequest(id=str(number), request=one))
        assert (await call.read()).id == str(number)
    await settled(lambda: places[-1].held_bytes == 0)
    call.cancel()


# Callers who may not go on


async def test_after_a_change_idle_streams_and_uploads_of_who_is_gone_end() -> None:
    gate, begun, aborted = Tenants(), asyncio.Event(), asyncio.Event()

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
        [to_register(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, Uploads())],
        Metrics({"version": "1"}),
        2**26,
        gate=gate,
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
            gate.gone.add("acme")
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
    gate, go_on = Tenants(), asyncio.Event()

    class Exports(model_pb2_grpc.ModelServiceServicer):
        async def ExportModel(  # noqa: N802
            self, request: Any, context: Any
        ) -> AsyncIterator[Any]:
            yield model_pb2.ExportModelResponse(chunk=b"1")
            await go_on.wait()
            yield model_pb2.ExportModelResponse(chunk=b"2")

    async with serving(Exports(), gate) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        call = stub.ExportModel(model_pb2.ExportModelRequest(), metadata=of("acme"))
        assert (await call.read()).chunk == b"1"
        # Before anybody has looked at the calls under way.
        gate.gone.add("acme")
        go_on.set()
        assert (await refusal(call.read())).reason == "TOKEN_UNKNOWN"


async def test_who_is_gone_when_its_request_arrives_is_not_answered() -> None:
    gate, slow = Tenants(), Slow()

    async def late() -> AsyncIterator[bytes]:
        await let_go.wait()
        yield b""

    let_go = asyncio.Event()
    async with serving(slow, gate) as channel:
        call = channel.stream_unary("/graft.v1.ModelService/GetReport")(late(), metadata=of("acme"))
        await settled(lambda: any(handlers()))
        gate.gone.add("acme")
        let_go.set()
        assert (await refusal(call)).reason == "TOKEN_UNKNOWN"
        assert slow.arrived.locked()


async def test_a_method_that_writes_its_answers_itself_is_no_method() -> None:
    async def watch(request: Any, context: Any) -> None:
        await context.write(request)

    async def found(details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(watch)

    details: Any = type("Details", (), {"method": EXPORT})
    with pytest.raises(TypeError, match="must yield its answers"):
        await Calls(Metrics({"version": "1"})).intercept_service(found, details)
