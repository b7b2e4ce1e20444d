"""What surrounds every call: health, reflection, request ids, metrics."""

import asyncio
import urllib.request

import grpc
import pytest
from google.protobuf import descriptor_pb2
from graftml_stubs.v1 import fine_tuning_pb2, model_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from threadpoolctl import threadpool_info

from service.app import App
from service.config import Config
from service.errors import Unavailable
from service.rpc.server import REFLECTION, SERVICES
from tests.rpc.conftest import GUARD_S, HANG, MakeService, Service, close, colours, refusal


async def scrape(service: Service) -> str:
    def get() -> str:
        url = f"http://127.0.0.1:{service.app.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=GUARD_S) as answer:
            return str(answer.read().decode())

    return await asyncio.to_thread(get)


async def test_health_is_serving_overall_and_for_each_service(service: Service) -> None:
    stub = health_pb2_grpc.HealthStub(service.channel)
    for name in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_can_be_watched(service: Service) -> None:
    call = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
    answer = await call.read()
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()


@pytest.mark.parametrize("name", REFLECTION)
async def test_reflection_lists_every_service_and_describes_each(
    service: Service, name: str
) -> None:
    call = service.channel.stream_stream(
        f"/{name}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    names = {found.name for found in answer.list_services_response.service}
    assert names == {*SERVICES, *REFLECTION, "grpc.health.v1.Health"}
    for described in sorted(names):
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=described))
        files = (await call.read()).file_descriptor_response.file_descriptor_proto
        package, _, service_name = described.rpartition(".")
        file = descriptor_pb2.FileDescriptorProto.FromString(files[0])
        assert (file.package, service_name in {s.name for s in file.service}) == (package, True)
    await call.done_writing()


async def test_a_callers_request_id_comes_back_and_stands_in_the_log(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        call = service.models.GetModel(
            model_pb2.GetModelRequest(model="nobody"), metadata=[("x-request-id", "my-id-1")]
        )
        await refusal(call)
    assert dict(await call.trailing_metadata())["x-request-id"] == "my-id-1"
    ended = [r for r in caplog.records if r.getMessage() == "call ended"]
    assert [r.__dict__["code"] for r in ended] == ["NOT_FOUND"]


async def test_metrics_count_calls_jobs_images_and_what_is_loaded(service: Service) -> None:
    from graftml_stubs.v1 import prediction_pb2

    from tests.rpc.conftest import image

    await service.make_model()
    images = [prediction_pb2.Image(encoded=data) for data in (image("red"), b"no")]
    await service.prediction.Predict(
        prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model="colours")], images=images
        )
    )
    await refusal(service.models.GetModel(model_pb2.GetModelRequest(model="nobody")))
    text = await scrape(service)
    for line in (
        'graft_images_total{model="colours",outcome="ok"} 1.0',
        'graft_images_total{model="colours",outcome="IMAGE_UNREADABLE"} 1.0',
        'graft_jobs{state="SUCCEEDED"} 1.0',
        'graft_jobs_ended_total{state="SUCCEEDED"} 1.0',
        'graft_loaded{kind="backbone"} 1.0',
        'graft_loaded{kind="head"} 1.0',
        'graft_rpc_calls_total{code="NOT_FOUND",method="/graft.v1.ModelService/GetModel"} 1.0',
        'graft_rpc_calls_total{code="OK",method="/graft.v1.PredictionService/Predict"} 1.0',
    ):
        assert line in text, line
    for stage in ("decode", "queue", "infer", "total"):
        assert f'graft_predict_stage_seconds_count{{model="colours",stage="{stage}"}} 1.0' in text
    # A job that ended leaves no series behind.
    assert "graft_training_epoch{" not in text


async def test_a_second_server_on_the_same_folder_is_turned_away(
    make_service: MakeService, service: Service
) -> None:
    config = Config(port=0, metrics_port=0, data_dir=service.data_dir)
    with pytest.raises(Unavailable, match="another server uses the data folder"):
        await App(config, {}).__aenter__()


async def test_a_port_that_is_taken_is_named(service: Service, tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "other"
    config = Config(port=service.app.port, metrics_port=0, data_dir=folder)
    with pytest.raises(OSError, match=str(service.app.port)):
        await App(config, {}).__aenter__()


async def test_heads_are_applied_without_numpys_threads(service: Service) -> None:
    counts = {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}
    assert counts == {1}


async def test_after_the_drain_nobody_answers(service: Service) -> None:
    await close(service)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.app.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=GUARD_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_watcher_is_told_when_the_service_stops(make_service: MakeService) -> None:
    service: Service = await make_service(HANG)
    asked = fine_tuning_pb2.FineTuneRequest(model="colours", inline_images=colours())
    job_id = (await service.fine_tuning.FineTune(asked)).job.job_id
    async with asyncio.timeout(GUARD_S):
        await service.launcher.started.get()
    call = service.fine_tuning.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id=job_id))
    await anext(aiter(call))
    closing = asyncio.create_task(service.app.__aexit__(None, None, None))
    found = await refusal(call)
    await closing
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert found.retry_s > 0
