"""Requests that are only checked: refused as a job's would be, and they start nothing."""

from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from graftml_stubs.v1 import dataset_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb
from graftml_stubs.v1 import model_pb2 as md

from service.backbones import BACKBONES
from service.jobs import weights
from tests.rpc.conftest import HANG, MakeService, Service, colours, refusal

pytestmark = pytest.mark.usefixtures("unreachable")


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no download through, wherever the tests run."""
    monkeypatch.setattr(weights, "reachable", lambda _host: False)


def check(**fields: Any) -> pb.FineTuneRequest:
    return pb.FineTuneRequest(**{"model": "colours", "validate_only": True, **fields})


async def test_a_good_request_passes_and_starts_nothing(service: Service) -> None:
    for fields in ({}, {"inline_images": colours()}, {"inline_images": pb.InlineImages()}):
        answer = await service.fine_tuning.FineTune(check(**fields))
        assert not answer.HasField("job")
    adaptation = pb.DomainAdaptation(technique=pb.ADAPTATION_TECHNIQUE_CORAL)
    await service.fine_tuning.FineTune(check(domain_adaptation=adaptation))
    assert not (await service.fine_tuning.ListJobs(pb.ListJobsRequest())).jobs
    assert not (await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())).datasets


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": "My Model"}, "model"),
        ({"backbone": "resnet51"}, "backbone"),
        ({"backbone": "timm/../x"}, "backbone"),
        ({"weights": "../x"}, "weights"),
        ({"weights": "file:../x.pth"}, "weights"),
        ({"backbone": "timm/vit_tiny_patch16_224", "weights": "IMAGENET1K_V1"}, "weights"),
        ({"backbone": "resnet18", "weights": "IMAGENET1K_V2"}, "weights"),
        ({"weights": "IMAGENET1K_V1"}, "weights"),
        ({"feature_based": pb.FeatureBased(l2=-1)}, "feature_based.l2"),
        ({"model_based": pb.ModelBased(epochs=0)}, "model_based.epochs"),
        ({"model_based": pb.ModelBased(train_from_stage="x")}, "model_based.train_from_stage"),
        ({"domain_adaptation": pb.DomainAdaptation(epochs=3)}, "domain_adaptation.epochs"),
        ({"validation_fraction": 0.9}, "validation_fraction"),
        ({"time_budget": Duration()}, "time_budget"),
        ({"labels": {"": "x"}}, "labels"),
        ({"request_id": "x" * 200}, "request_id"),
        ({"gate": pb.Gate(min_accuracy=2)}, "gate.min_accuracy"),
        ({"gate": pb.Gate(alias="latest")}, "gate.alias"),
        ({"gate": pb.Gate(max_regression=0.1)}, "gate.max_regression"),
        ({"grouping": pb.Grouping(folder_level=33)}, "grouping.folder_level"),
        ({"baselines": [0]}, "baselines"),
        ({"server_path": pb.ServerPath(path="relative")}, "server_path.path"),
    ],
)
async def test_a_bad_field_is_refused(service: Service, fields: dict[str, Any], field: str) -> None:
    found = await refusal(service.fine_tuning.FineTune(check(**fields)))
    assert (found.code, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize("is_check", [True, False])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": pb.DEVICE_CUDA}, "DEVICE_UNAVAILABLE"),
        ({"backbone": "resnet18"}, "WEIGHTS_UNAVAILABLE"),
        ({"backbone": "timm/vit_tiny_patch16_224"}, "WEIGHTS_UNAVAILABLE"),
        ({"weights": "file:own.safetensors"}, "WEIGHTS_UNAVAILABLE"),
        ({"base": pb.BaseVersion(version=1)}, "MODEL_NOT_FOUND"),
        ({"domain_adaptation": pb.DomainAdaptation(target_dataset_id="x")}, "DATASET_NOT_FOUND"),
    ],
)
async def test_what_is_not_there_is_said_before_images_are_stored(
    service: Service, fields: dict[str, Any], reason: str, is_check: bool
) -> None:
    request = check(**fields, inline_images=colours(), request_id="once")
    request.validate_only = is_check
    found = await refusal(service.fine_tuning.FineTune(request))
    assert found.reason == reason
    assert not (await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())).datasets


async def test_a_dataset_that_is_named_must_be_there(service: Service) -> None:
    found = await refusal(service.fine_tuning.FineTune(check(dataset_id="ds-nope")))
    assert (found.reason, found.field) == ("DATASET_NOT_FOUND", "dataset_id")


async def test_weights_that_lie_there_or_need_no_download_pass(service: Service) -> None:
    await service.fine_tuning.FineTune(check(backbone="resnet18", weights="random"))
    await service.fine_tuning.FineTune(check(backbone="auto"))
    folder = service.data_dir / "weights"
    folder.mkdir(exist_ok=True)
    (folder / BACKBONES["resnet18"].weights["IMAGENET1K_V1"]).touch()
    await service.fine_tuning.FineTune(check(backbone="resnet18"))
    (folder / "own.safetensors").touch()
    await service.fine_tuning.FineTune(check(backbone="timm/test_vit", weights="random"))
    await service.fine_tuning.FineTune(check(weights="file:own.safetensors"))


async def test_a_full_queue_is_said_before_the_upload(make_service: MakeService) -> None:
    service: Service = await make_service(HANG, max_queued_jobs=1, cpu_jobs=1)
    for name in ("a", "b"):
        await service.fine_tuning.FineTune(pb.FineTuneRequest(model=name, inline_images=colours()))
        if name == "a":
            await service.launcher.started.get()
    found = await refusal(service.fine_tuning.FineTune(check()))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert found.retry_s > 0


async def test_a_request_that_made_a_job_passes_its_check(service: Service) -> None:
    request = pb.FineTuneRequest(model="colours", inline_images=colours(), request_id="once")
    first = (await service.fine_tuning.FineTune(request)).job
    again = check(request_id="once", device=pb.DEVICE_CUDA)
    assert not (await service.fine_tuning.FineTune(again)).HasField("job")
    assert (await service.fine_tuning.FineTune(request)).job.job_id == first.job_id


async def test_a_check_leaves_its_request_id_free(service: Service) -> None:
    await service.fine_tuning.FineTune(check(request_id="once"))
    request = pb.FineTuneRequest(model="colours", inline_images=colours(), request_id="once")
    assert (await service.fine_tuning.FineTune(request)).job.job_id


async def test_a_ranking_is_checked_too(service: Service) -> None:
    good = pb.RankBackbonesRequest(validate_only=True)
    assert await service.fine_tuning.RankBackbones(good) == pb.RankBackbonesResponse()
    bad = pb.RankBackbonesRequest(
        validate_only=True, backbones=[pb.PretrainedBackbone(backbone="resnet18", weights="V9")]
    )
    found = await refusal(service.fine_tuning.RankBackbones(bad))
    assert found.field == "backbones[0].weights"
    assert service.launcher.started.empty()


async def test_a_device_that_is_there_is_named(make_service: MakeService) -> None:
    service: Service = await make_service(cpu_jobs=0)
    found = await refusal(service.fine_tuning.FineTune(check()))
    assert (found.reason, found.field) == ("DEVICE_UNAVAILABLE", "device")
    assert "trains nothing" in found.message


async def test_a_model_that_aliases_name_is_deleted_by_force_alone(service: Service) -> None:
    await service.make_model()
    await service.models.SetAlias(md.SetAliasRequest(model="colours", alias="prod", version=1))
    found = await refusal(service.models.DeleteModel(md.DeleteModelRequest(model="colours")))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE")
    assert "prod (version 1)" in found.message
    assert "force" in found.message
    await service.models.DeleteModel(md.DeleteModelRequest(model="colours", force=True))
    assert not (await service.models.ListModels(md.ListModelsRequest())).models
