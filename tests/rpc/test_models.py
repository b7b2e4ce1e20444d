"""Models, versions, aliases and reports over the wire."""

import asyncio
import json
import threading
import urllib.request
from typing import Any

import grpc
import pytest
from graftml_stubs.v1 import dataset_pb2, fine_tuning_pb2, prediction_pb2
from graftml_stubs.v1 import model_pb2 as pb

from service.domain import ModelKey
from service.rpc.codec import datasets, jobs, models
from service.rpc.open_inference import grpc_predict_v2_pb2
from service.rpc.open_inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from service.storage.models import ModelStore
from tests.rpc.conftest import GUARD_S, Service, image, refusal


async def predicted_version(service: Service, **which: object) -> int:
    answer = await service.prediction.Predict(
        prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model="colours", **which)],  # type: ignore[arg-type]
            images=[prediction_pb2.Image(encoded=image("red"))],
        )
    )
    return int(answer.answers[0].version)


async def test_versions_aliases_and_latest_decide_who_answers(service: Service) -> None:
    for _ in range(3):
        await service.make_model()
    answer = await service.models.SetAlias(
        pb.SetAliasRequest(model="colours", alias="stable", version=2)
    )
    assert answer.model.aliases == {"latest": 3, "stable": 2}
    assert await predicted_version(service) == 3
    assert await predicted_version(service, version=1) == 1
    assert await predicted_version(service, alias="stable") == 2
    await service.models.SetAlias(pb.SetAliasRequest(model="colours", alias="stable", version=1))
    assert await predicted_version(service, alias="stable") == 1
    listed = await service.models.ListVersions(pb.ListVersionsRequest(model="colours"))
    assert [v.version for v in listed.versions] == [3, 2, 1]
    assert list(listed.versions[2].aliases) == ["stable"]


async def test_deleting_follows_the_rules(service: Service) -> None:
    for _ in range(2):
        await service.make_model()
    await service.models.SetAlias(pb.SetAliasRequest(model="colours", alias="stable", version=1))
    in_use = await refusal(
        service.models.DeleteVersion(pb.DeleteVersionRequest(model="colours", version=1))
    )
    assert (in_use.code, in_use.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ALIAS_IN_USE")
    reserved = await refusal(
        service.models.SetAlias(pb.SetAliasRequest(model="colours", alias="latest", version=1))
    )
    assert reserved.reason == "ALIAS_RESERVED"
    reserved = await refusal(
        service.models.DeleteAlias(pb.DeleteAliasRequest(model="colours", alias="latest"))
    )
    assert reserved.reason == "ALIAS_RESERVED"
    await service.models.DeleteVersion(pb.DeleteVersionRequest(model="colours", version=2))
    assert await predicted_version(service) == 1
    await service.models.DeleteAlias(pb.DeleteAliasRequest(model="colours", alias="stable"))
    request = pb.GetVersionRequest(model="colours", alias="stable")
    unknown = await refusal(service.models.GetVersion(request))
    assert unknown.reason == "ALIAS_NOT_FOUND"
    assert "it has latest" in unknown.message
    last = await refusal(
        service.models.DeleteVersion(pb.DeleteVersionRequest(model="colours", version=1))
    )
    assert (last.code, last.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ALIAS_IN_USE")
    assert "delete the model instead" in last.message
    await service.models.DeleteModel(pb.DeleteModelRequest(model="colours"))
    gone = await refusal(service.models.GetModel(pb.GetModelRequest(model="colours")))
    assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert (await service.make_model()).version == 1


async def test_a_deleted_models_counts_and_series_go_with_it(service: Service) -> None:
    await service.make_model()
    await service.make_model()
    await predicted_version(service, version=1)
    await predicted_version(service)
    assert 'model="colours"' in await metrics(service)
    await service.models.DeleteVersion(pb.DeleteVersionRequest(model="colours", version=1))
    assert 'model="colours"' in await metrics(service)
    assert await counted(service) == [("colours", "2")]
    await service.models.DeleteModel(pb.DeleteModelRequest(model="colours"))
    assert 'model="colours"' not in await metrics(service)
    assert await counted(service) == []


async def test_a_model_of_a_deleted_ones_name_begins_to_count_at_nothing(service: Service) -> None:
    for _ in range(3):
        await service.make_model()
        assert await predicted_version(service) == 1
        (counts,) = await statistics(service)
        assert counts.inference_count == 1
        await service.models.DeleteModel(pb.DeleteModelRequest(model="colours"))


async def metrics(service: Service) -> str:
    url = f"http://127.0.0.1:{service.app.metrics_port}/metrics"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=GUARD_S) as answer:
            text: str = answer.read().decode()
        return text

    return await asyncio.to_thread(read)


async def counted(service: Service) -> list[tuple[str, str]]:
    return [(found.name, found.version) for found in await statistics(service)]


async def statistics(service: Service) -> list[grpc_predict_v2_pb2.ModelStatistics]:
    stub: Any = GRPCInferenceServiceStub(service.channel)
    answer = await stub.ModelStatistics(grpc_predict_v2_pb2.ModelStatisticsRequest())
    return list(answer.model_stats)


async def test_a_version_tells_how_it_was_made(service: Service) -> None:
    await service.make_model()
    version = (await service.models.GetVersion(pb.GetVersionRequest(model="colours"))).version
    assert version.method == pb.TRANSFER_METHOD_FEATURE_BASED
    assert list(version.classes) == ["blue", "green", "red"]
    assert list(version.figures) == [
        pb.Figure(
            measured_on=pb.MEASURED_ON_CROSS_VALIDATION,
            accuracy=1.0,
            accuracy_low=0.75,
            accuracy_high=1.0,
            log_loss=0.7,
            image_count=3,
            group_count=3,
        )
    ]
    assert (version.calibrated, version.calibration_note) == (True, "")
    assert version.serving_precision == "fp32"
    assert version.parity.image_count == 3
    assert '"job_id"' in version.manifest_json


async def test_reports_come_in_both_forms(service: Service) -> None:
    await service.make_model()
    report = await service.models.GetReport(pb.GetReportRequest(model="colours"))
    assert report.media_type == "application/json"
    assert json.loads(report.content) == {
        "format": 1,
        "version": 1,
        "is_candidate": False,
        "gate_failures": [],
    }
    html = await service.models.GetReport(
        pb.GetReportRequest(model="colours", format=pb.REPORT_FORMAT_HTML)
    )
    assert (html.media_type, html.content) == ("text/html", b"<!doctype html>")
    found = await refusal(
        service.models.GetReport(pb.GetReportRequest(model="colours", format=9))  # type: ignore[arg-type]
    )
    assert found.field == "format"


async def test_models_are_listed_by_name_in_pages(service: Service) -> None:
    for name in ("c", "a", "b"):
        await service.make_model(name)
    page = await service.models.ListModels(pb.ListModelsRequest(page_size=2))
    assert [m.name for m in page.models] == ["a", "b"]
    rest = await service.models.ListModels(
        pb.ListModelsRequest(page_size=2, page_token=page.next_page_token)
    )
    assert [m.name for m in rest.models] == ["c"]
    assert not rest.next_page_token
    found = await refusal(service.models.ListModels(pb.ListModelsRequest(page_size=5000)))
    assert found.field == "page_size"
    found = await refusal(service.models.ListModels(pb.ListModelsRequest(page_token="?")))
    assert found.field == "page_token"


async def test_a_deletion_whose_caller_left_is_forgotten_by_the_engine(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make_model()
    await predicted_version(service)
    begun, goes_on = threading.Event(), threading.Event()
    delete = ModelStore.delete_model

    def slow(store: ModelStore, model: ModelKey, *, force: bool = False) -> None:
        begun.set()
        assert goes_on.wait(GUARD_S)
        delete(store, model, force=force)

    monkeypatch.setattr(ModelStore, "delete_model", slow)
    call = service.models.DeleteModel(pb.DeleteModelRequest(model="colours"))
    assert await asyncio.to_thread(begun.wait, GUARD_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    goes_on.set()
    async with asyncio.timeout(GUARD_S):
        while 'graft_images_total{model="colours"' in await metrics(service):  # noqa: ASYNC110 - a few turns
            await asyncio.sleep(0)


async def test_a_deleted_model_answers_no_more(service: Service) -> None:
    await service.make_model()
    await predicted_version(service)
    await service.models.DeleteModel(pb.DeleteModelRequest(model="colours"))
    found = await refusal(
        service.prediction.Predict(
            prediction_pb2.PredictRequest(
                models=[prediction_pb2.ModelSpec(model="colours")],
                images=[prediction_pb2.Image(encoded=image("red"))],
            )
        )
    )
    assert found.reason == "MODEL_NOT_FOUND"


async def test_stored_things_become_messages_off_the_event_loop(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: set[tuple[str, str]] = set()
    kinds: dict[str, Any] = {"model": models, "version": models, "job": jobs, "dataset": datasets}
    for name, module in kinds.items():
        build = getattr(module, name)

        def noted(*args: Any, build: Any = build, name: str = name) -> Any:
            built.add((name, threading.current_thread().name.partition("_")[0]))
            return build(*args)

        monkeypatch.setattr(module, name, noted)
    job = await service.make_model()
    dataset_id = job.request.dataset_id
    for call in (
        service.models.GetModel(pb.GetModelRequest(model="colours")),
        service.models.ListModels(pb.ListModelsRequest()),
        service.models.SetAlias(pb.SetAliasRequest(model="colours", alias="prod", version=1)),
        service.models.GetVersion(pb.GetVersionRequest(model="colours")),
        service.models.ListVersions(pb.ListVersionsRequest(model="colours")),
        service.fine_tuning.GetJob(fine_tuning_pb2.GetJobRequest(job_id=job.job_id)),
        service.fine_tuning.ListJobs(fine_tuning_pb2.ListJobsRequest()),
        service.datasets.GetDataset(dataset_pb2.GetDatasetRequest(dataset_id=dataset_id)),
        service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest()),
    ):
        await call
    # FineTune's answer in the thread that stored its images.
    assert built == {("job", "long"), *((name, "store") for name in kinds)}
