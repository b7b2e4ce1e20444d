"""Calls that are slow, many or cut off: each ends, and leaves nothing behind."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import grpc
import pytest
from graftml_stubs.v1 import (
    dataset_pb2,
    fine_tuning_pb2,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
)
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.auth.authenticator import Authenticator
from service.auth.principal import Principal
from service.errors import Reason, Unauthenticated
from service.ops.metrics import Metrics
from service.rpc import interceptor, message_io
from service.rpc.admission import CallLimits
from service.rpc.server import SERVICES, RpcServer
from tests.rpc.conftest import GUARD_S, HANG, MakeService, Service, colours, image, refusal
from tests.unit.loop_clock import LoopClock

pytestmark = pytest.mark.usefixtures("held_as_sent")

PREDICT = "/graft.v1.PredictionService/Predict"
LIST = "/graft.v1.ModelService/ListModels"


def handlers() -> list[str]:
    """The tasks that serve calls in this process."""
    return [
        task.get_name()
        for task in asyncio.all_tasks()
        if task.get_name().startswith(("HandleExceptions", "rpc_task"))
    ]


def serving_tasks() -> list[str]:
    """Those of them that run a handler, and not only watch for the caller's end."""
    return [name for name in handlers() if name.startswith("HandleExceptions")]


async def settled(is_so: Callable[[], bool]) -> None:
    """Waits until something is so; fails when it does not become so."""
    deadline = time.monotonic() + GUARD_S
    while not is_so():
        assert time.monotonic() < deadline, handlers()
        await asyncio.sleep(0.01)


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not aio.EOF:
        pass


def health(channel: aio.Channel) -> Any:
    check = health_pb2_grpc.HealthStub(channel).Check
    return check(health_pb2.HealthCheckRequest(), timeout=GUARD_S)


@asynccontextmanager
async def serving(
    servicer: model_pb2_grpc.ModelServiceServicer,
    authenticator: Authenticator | None = None,
    **limits: Any,
) -> AsyncIterator[aio.Channel]:
    """A server of this servicer alone, and a channel to it."""
    server = RpcServer(
        [(model_pb2_grpc.add_ModelServiceServicer_to_server, servicer)],
        Metrics({"version": "1"}),
        2**26,
        authenticator=authenticator,
        limits=CallLimits(**{"message_timeout_s": GUARD_S} | limits),
    )
    port = await server.start("127.0.0.1:0")
    await server.serve()
    try:
        options = [("grpc.max_receive_message_length", -1)]
        async with aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            # The time for a message is one for a connection's first bytes too.
            await channel.channel_ready()
            yield channel
    finally:
        await server.drain(0.1)


async def test_a_request_that_does_not_arrive_is_not_waited_for(make_service: MakeService) -> None:
    service: Service = await make_service(message_timeout_s=0.2)
    refused = await refusal(service.channel.stream_unary(PREDICT)(never()))
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not arrive within 0.2 s" in refused.message
    await settled(lambda: not handlers())


async def test_a_call_without_a_request_and_one_that_is_no_message_are_refused(
    service: Service,
) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for message in ():
            yield message

    for call in (
        service.channel.stream_unary(PREDICT)(nothing()),
        service.channel.unary_unary(PREDICT)(b"\xff\xff\xff"),
        service.channel.stream_stream("/graft.v1.PredictionService/PredictStream")(
            iter([b"\xff\xff\xff"])
        ),
        service.channel.stream_unary("/graft.v1.DatasetService/UploadDataset")(
            iter([b"\xff\xff\xff"])
        ),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
        )


async def test_who_is_not_let_in_is_told_before_the_request_is_read() -> None:
    class Closed:
        def admit(self, method: str, metadata: object) -> Principal:
            raise Unauthenticated(Reason.TOKEN_MISSING, "no token")

    async with serving(model_pb2_grpc.ModelServiceServicer(), Closed()) as channel:
        # Its request never comes, and is not waited for.
        refused = await refusal(channel.stream_unary(LIST)(never()))
        assert refused.code is grpc.StatusCode.UNAUTHENTICATED
        assert (await health(channel)).status == health_pb2.HealthCheckResponse.SERVING


async def test_work_for_a_reader_who_takes_nothing_ends_and_the_reader_learns_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Long enough for the status to be handed to gRPC on a busy machine.
    monkeypatch.setattr(interceptor, "_STATUS_TIMEOUT_S", 0.5)
    composing: list[str] = []
    served: WeakSet[Any] = WeakSet()
    send = message_io.send

    async def impatient(context: message_io.Context, response: Any, timeout_s: float) -> None:
        # Each caller gets its first answer, however slow the machine is.
        handler = asyncio.current_task()
        await send(context, response, 0.1 if handler in served else timeout_s)
        served.add(handler)

    monkeypatch.setattr(message_io, "send", impatient)

    class Exports(model_pb2_grpc.ModelServiceServicer):
        async def ExportModel(  # noqa: N802
            self, request: Any, context: Any
        ) -> AsyncIterator[Any]:
            composing.append(request.model)
            try:
                for _ in range(100):
                    yield model_pb2.ExportModelResponse(chunk=bytes(2**20))
            finally:
                composing.remove(request.model)

        async def ListModels(  # noqa: N802
            self, request: Any, context: Any
        ) -> Any:
            return model_pb2.ListModelsResponse()

    async with serving(Exports(), exports=3) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        export = model_pb2.ExportModelRequest(model="m")
        calls = [stub.ExportModel(export) for _ in range(3)]
        for call in calls:
            await call.read()
        assert composing == ["m"] * 3
        await settled(lambda: not composing and not serving_tasks())
        # Their slots are free, and others on the same connection are served.
        await stub.ListModels(model_pb2.ListModelsRequest())
        assert (await stub.ExportModel(export).read()).chunk == bytes(2**20)
        for call in calls:
            # What had been sent before is there to be read, then comes the reason.
            with pytest.raises(aio.AioRpcError, match="the reader took no answer for") as caught:
                async with asyncio.timeout(GUARD_S):
                    await read_to_the_end(call)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_reader_who_is_slow_but_reads_gets_all_of_it() -> None:
    clock = LoopClock()

    class Exports(model_pb2_grpc.ModelServiceServicer):
        async def ExportModel(  # noqa: N802
            self, request: Any, context: Any
        ) -> AsyncIterator[Any]:
            for _ in range(40):
                yield model_pb2.ExportModelResponse(chunk=bytes(2**20))

    async with serving(Exports()) as channel:
        call = model_pb2_grpc.ModelServiceStub(channel).ExportModel(
            model_pb2.ExportModelRequest(model="m")
        )
        count = 0
        async for _ in call:
            clock.skip(GUARD_S / 10)
            count += 1
        assert count == 40


async def test_over_its_limit_a_method_refuses_and_says_when_to_come_back() -> None:
    go_on = asyncio.Event()
    arrived = asyncio.Semaphore(0)

    class Slow(model_pb2_grpc.ModelServiceServicer):
        async def ListModels(  # noqa: N802
            self, request: Any, context: Any
        ) -> Any:
            arrived.release()
            await go_on.wait()
            return model_pb2.ListModelsResponse()

        async def GetModel(  # noqa: N802
            self, request: Any, context: Any
        ) -> Any:
            return model_pb2.GetModelResponse()

    async with serving(Slow(), calls=2) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.ListModelsRequest()
        under_way = [asyncio.ensure_future(stub.ListModels(request)) for _ in range(2)]
        for _ in under_way:
            await arrived.acquire()
        refused = await refusal(stub.ListModels(request))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refused.reason, refused.retry_s) == ("TOO_MANY_CALLS", 1)
        # Each method has a limit of its own.
        await stub.GetModel(model_pb2.GetModelRequest())
        await health(channel)
        go_on.set()
        await asyncio.gather(*under_way)
        await stub.ListModels(request)


async def test_requests_are_refused_while_those_that_are_answered_hold_too_much() -> None:
    go_on, arrived = asyncio.Event(), asyncio.Event()

    class Slow(model_pb2_grpc.ModelServiceServicer):
        async def GetModel(  # noqa: N802
            self, request: Any, context: Any
        ) -> Any:
            arrived.set()
            await go_on.wait()
            return model_pb2.GetModelResponse()

    async with serving(Slow(), held_bytes=2**16) as channel:
        stub: Any = model_pb2_grpc.ModelServiceStub(channel)
        large = model_pb2.GetModelRequest(model="m" * (2**15 + 1))
        first = asyncio.ensure_future(stub.GetModel(large))
        await arrived.wait()
        refused = await refusal(stub.GetModel(large))
        assert (refused.reason, refused.retry_s) == ("TOO_MANY_CALLS", 1)
        go_on.set()
        await first
        await stub.GetModel(large)


async def test_slow_uploads_keep_nobody_from_fine_tuning_and_watchers_have_their_own_limit(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(HANG, max_uploads=1, max_watchers=1)
    upload, header = service.datasets.UploadDataset(), dataset_pb2.UploadDatasetHeader()
    await upload.write(dataset_pb2.UploadDatasetRequest(header=header))
    await settled(lambda: folders(service) != [])
    assert (await refusal(service.datasets.UploadDataset())).reason == "TOO_MANY_CALLS"
    request = fine_tuning_pb2.FineTuneRequest(model="m", inline_images=colours())
    job = (await service.fine_tuning.FineTune(request)).job
    # A caller that gives up frees both its slot and its folder.
    upload.cancel()
    await settled(lambda: folders(service) == [] and not handlers())
    assert (await refusal(service.datasets.UploadDataset(iter(())))).reason == "INVALID_FIELD"
    watch = fine_tuning_pb2.WatchJobRequest(job_id=job.job_id)
    watcher = service.fine_tuning.WatchJob(watch)
    await watcher.read()
    assert (await refusal(service.fine_tuning.WatchJob(watch))).reason == "TOO_MANY_CALLS"
    await service.fine_tuning.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job.job_id))
    watcher.cancel()


def folders(service: Service) -> list[Path]:
    """Of uploads that are under way."""
    return list((service.data_dir / "uploads").iterdir())


async def test_an_upload_that_brings_nothing_more_ends_and_leaves_no_folder(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(message_timeout_s=0.3)

    async def messages() -> AsyncIterator[dataset_pb2.UploadDatasetRequest]:
        header = dataset_pb2.UploadDatasetHeader(display_name="d")
        yield dataset_pb2.UploadDatasetRequest(header=header)
        await asyncio.Event().wait()

    refused = await refusal(service.datasets.UploadDataset(messages()))
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert folders(service) == []
    await settled(lambda: not handlers())


async def test_every_method_leaves_at_its_deadline_and_at_a_cancel(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(HANG)
    pool = [
        (f"/{name}/{method.name}", method.client_streaming, method.server_streaming)
        for name in SERVICES
        for method in descriptor(name).methods
    ]
    assert len(pool) > 30
    for path, streams_in, streams_out in pool:
        kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
        call_to = getattr(service.channel, kind)(path)
        request = never() if streams_in else b""
        for ends_by_cancel in (False, True):
            call = call_to(request, timeout=None if ends_by_cancel else 0.001)
            if ends_by_cancel:
                asyncio.get_running_loop().call_later(0.001, call.cancel)
            try:
                if streams_out:
                    await call.read()
                else:
                    await call
            except (aio.AioRpcError, asyncio.CancelledError):
                pass
            request = never() if streams_in else b""
    await settled(lambda: not handlers())
    await health(service.channel)


def descriptor(service: str) -> Any:
    from google.protobuf import descriptor_pool

    return descriptor_pool.Default().FindServiceByName(service)


async def test_overloaded_it_answers_health_checks_and_refuses_the_rest_at_once(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(max_calls=100, max_queue=64, max_images=64)
    await service.make_model()
    (session,) = service.runtime.sessions.values()
    session.hold()
    request = prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="colours")],
        images=[prediction_pb2.Image(encoded=image("red"))],
    )
    calls = [asyncio.ensure_future(service.prediction.Predict(request)) for _ in range(1000)]
    # All of it while none of the calls that were taken can end.
    for _ in range(10):
        await health(service.channel)
    await settled(lambda: sum(call.done() for call in calls) >= 900)
    await health(service.channel)
    session.release()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [o for o in outcomes if isinstance(o, aio.AioRpcError)]
    assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    answered = [o for o in outcomes if isinstance(o, prediction_pb2.PredictResponse)]
    assert len(answered) >= 64
    assert len(answered) + len(refused) == 1000


async def test_a_stream_that_waits_for_requests_is_told_that_the_service_stops(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(max_queue=256, drain_s=10 * GUARD_S)
    await service.make_model()
    stream = service.prediction.PredictStream()
    one = prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="colours")],
        images=[prediction_pb2.Image(encoded=image("red"))],
    )
    await stream.write(prediction_pb2.PredictStreamRequest(id="1", request=one))
    assert (await stream.read()).id == "1"
    closing = asyncio.ensure_future(service.app.__aexit__(None, None, None))
    with pytest.raises(aio.AioRpcError, match="the service is stopping") as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with asyncio.timeout(GUARD_S):
        # Not at the end of the grace period: nothing is waited for.
        await closing


async def test_while_it_drains_accepted_calls_are_answered_and_new_ones_told_why_not(
    make_service: MakeService,
) -> None:
    service: Service = await make_service()
    await service.make_model()
    (session,) = service.runtime.sessions.values()
    session.hold()
    request = prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="colours")],
        images=[prediction_pb2.Image(encoded=image("red"))],
    )
    accepted = asyncio.ensure_future(service.prediction.Predict(request))
    await asyncio.to_thread(session.running.acquire)
    watcher = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
    closing = asyncio.ensure_future(service.app.__aexit__(None, None, None))
    assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    async with aio.insecure_channel(f"127.0.0.1:{service.app.port}") as fresh:
        for channel in (service.channel, fresh):
            refused = await refusal(channel.unary_unary(LIST)(b""))
            assert (refused.code, refused.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "SHUTTING_DOWN",
            )
            assert refused.retry_s > 0
            answer = await health(channel)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        session.release()
        assert (await accepted).answers[0].results[0].classification.scores[0].label == "red"
        await closing
