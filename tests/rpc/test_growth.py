"""Versions that grow from earlier ones, over the wire."""

import grpc
import pytest
from graftml_stubs.v1 import dataset_pb2, model_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.domain import Base
from tests.rpc.conftest import HANG, SUCCESS, MakeService, Service, colours, refusal


def grown(base: pb.BaseVersion, **fields: object) -> pb.FineTuneRequest:
    return pb.FineTuneRequest(
        **{"model": "colours", "inline_images": colours(4), "base": base, **fields}  # type: ignore[arg-type]
    )


async def test_a_job_grows_from_the_version_that_its_base_named_then(service: Service) -> None:
    first = await service.make_model()
    started = await service.fine_tuning.FineTune(grown(pb.BaseVersion()))
    job = await service.ended(started.job.job_id)
    assert job.request.HasField("base")
    assert job.request.base == pb.BaseVersion()
    assert job.base == pb.BaseVersion(model="colours", version=1)
    spec = service.launcher.trainers[1].spec
    assert spec.base == Base("colours", 1)
    assert [each.name for each in spec.base_data] == [first.request.dataset_id]
    assert spec.data.name == job.request.dataset_id
    own, base = spec.data, spec.base_data[0]
    assert {own.index, *own.packs, base.index, *base.packs} <= spec.files.keys()

    started = await service.fine_tuning.FineTune(
        grown(pb.BaseVersion(model="colours", alias="latest"), model="more")
    )
    await service.ended(started.job.job_id)
    spec = service.launcher.trainers[2].spec
    assert spec.base == Base("colours", 2)
    assert [each.name for each in spec.base_data] == [j.request.dataset_id for j in (first, job)]


async def test_a_version_keeps_the_background_that_it_was_asked_with(service: Service) -> None:
    request = pb.FineTuneRequest(model="colours", inline_images=colours(), background="#00FF80")
    started = await service.fine_tuning.FineTune(request)
    job = await service.ended(started.job.job_id)
    assert job.request.background == "#00FF80"
    assert service.launcher.trainers[0].spec.background == "#00ff80"
    request.background = "green"
    found = await refusal(service.fine_tuning.FineTune(request))
    assert (found.reason, found.field) == ("INVALID_FIELD", "background")


async def test_a_retry_is_answered_with_its_job_though_latest_has_moved_and_the_base_is_gone(
    service: Service,
) -> None:
    await service.make_model()
    asked = grown(pb.BaseVersion(), request_id="once")
    first = (await service.fine_tuning.FineTune(asked)).job
    await service.ended(first.job_id)
    assert (await service.fine_tuning.FineTune(asked)).job.job_id == first.job_id
    found = await refusal(
        service.fine_tuning.FineTune(grown(pb.BaseVersion(version=2), request_id="once"))
    )
    assert found.reason == "REQUEST_ID_REUSED"
    await service.models.DeleteModel(model_pb2.DeleteModelRequest(model="colours"))
    assert (await service.fine_tuning.FineTune(asked)).job.job_id == first.job_id


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (pb.BaseVersion(model="nothing"), "MODEL_NOT_FOUND"),
        (pb.BaseVersion(version=9), "VERSION_NOT_FOUND"),
        (pb.BaseVersion(alias="prod"), "ALIAS_NOT_FOUND"),
    ],
)
async def test_a_base_that_is_not_there_is_refused_and_nothing_is_kept(
    service: Service, base: pb.BaseVersion, reason: str
) -> None:
    await service.make_model()
    found = await refusal(service.fine_tuning.FineTune(grown(base)))
    assert (found.code, found.reason, found.field) == (
        grpc.StatusCode.NOT_FOUND, reason, "base",
    )  # fmt: skip
    kept = await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())
    assert len(kept.datasets) == 1


async def test_a_bases_dataset_may_be_deleted_but_for_under_a_job_that_grows(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(SUCCESS, HANG)
    first = await service.make_model()
    delete = dataset_pb2.DeleteDatasetRequest(dataset_id=first.request.dataset_id)
    running = (await service.fine_tuning.FineTune(grown(pb.BaseVersion()))).job.job_id
    found = await refusal(service.datasets.DeleteDataset(delete))
    assert (found.reason, running in found.message) == ("DATASET_IN_USE", True)
    await service.fine_tuning.CancelJob(pb.CancelJobRequest(job_id=running))
    await service.ended(running)
    await service.datasets.DeleteDataset(delete)
    found = await refusal(service.fine_tuning.FineTune(grown(pb.BaseVersion())))
    assert (found.code, found.reason, found.field) == (
        grpc.StatusCode.FAILED_PRECONDITION, "BASE_DATA_GONE", "base",
    )  # fmt: skip
