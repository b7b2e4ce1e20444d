"""RankBackbones: what starts, what comes back, what is refused before anything is stored."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from graftml_stubs.v1 import dataset_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.contract import (
    BackbonesRanked,
    ExitCode,
    Failed,
    Heartbeat,
    Progressed,
    RankedBackbone,
    RankSpec,
)
from service.errors import Reason
from tests.fake_launcher import Script
from tests.rpc.conftest import (
    SUCCESS,
    MakeService,
    Service,
    colours,
    image,
    of_status,
    refusal,
)

RANKED = BackbonesRanked(
    [
        RankedBackbone(
            backbone="resnet18",
            weights="IMAGENET1K_V1",
            log_loss=0.3,
            log_me=-0.1,
            image_ms=4.5,
            feature_dim=512,
        ),
        RankedBackbone(backbone="resnet50", weights="random:0", problem="no time was left"),
    ],
    "resnet18 is first.",
    42,
)
GOOD = Script(records=[Heartbeat(), Progressed("features", 0.5), RANKED])
HANG = Script(records=[Progressed("features", 0.1)], hangs=True)


def request(**fields: object) -> pb.RankBackbonesRequest:
    return pb.RankBackbonesRequest(
        **{"inline_images": colours(), **fields}  # type: ignore[arg-type]
    )


async def dataset_ids(service: Service) -> list[str]:
    listed = await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())
    return [dataset.dataset_id for dataset in listed.datasets]


async def test_a_ranking_is_answered_with_a_job_that_ends_with_the_ranking(
    make_service: MakeService,
) -> None:
    service = await make_service(GOOD)
    asked = request(
        backbones=[
            pb.PretrainedBackbone(backbone="resnet18"),
            pb.PretrainedBackbone(backbone="resnet50", weights="random"),
        ],
        time_budget=Duration(seconds=7),
        seed=3,
        request_id="once",
    )
    started = (await service.fine_tuning.RankBackbones(asked)).job
    assert (started.kind, started.state) == (pb.JOB_KIND_RANKING, pb.JOB_STATE_QUEUED)
    job = await service.ended(started.job_id)
    assert (job.state, job.model, job.version) == (pb.JOB_STATE_SUCCEEDED, "", 0)
    first, second = job.ranking.backbones
    assert (first.backbone, first.weights) == ("resnet18", "IMAGENET1K_V1")
    assert (first.log_loss, first.log_me) == (0.3, -0.1)
    assert (first.image_ms, first.feature_dim, first.problem) == (4.5, 512, "")
    assert second.problem == "no time was left"
    assert not any(second.HasField(name) for name in ("log_loss", "log_me", "image_ms"))
    assert (job.ranking.explanation, job.ranking.image_count) == ("resnet18 is first.", 42)
    # The request as it came, its images a dataset by now.
    (stored,) = await dataset_ids(service)
    kept = request(
        inline_images=None, dataset_id=stored, backbones=asked.backbones,
        time_budget=asked.time_budget, seed=3, request_id="once",
    )  # fmt: skip
    assert (job.ranking_request, job.HasField("request")) == (kept, False)
    assert (await service.fine_tuning.RankBackbones(asked)).job == job

    (trainer,) = service.launcher.trainers
    spec = trainer.spec
    assert isinstance(spec, RankSpec)
    assert spec.data.name == stored
    assert {spec.data.index, *spec.data.packs} <= spec.files.keys()
    assert [(c.backbone, c.weights) for c in spec.backbones] == [
        ("resnet18", ""),
        ("resnet50", "random"),
    ]
    assert (spec.time_budget_s, spec.seed, spec.only_available) == (7.0, 3, False)


async def test_jobs_are_listed_by_kind_and_deleted_once_they_have_ended(
    make_service: MakeService,
) -> None:
    service = await make_service(SUCCESS, GOOD, HANG)
    trained = await service.make_model()
    ranked = (await service.fine_tuning.RankBackbones(request())).job.job_id
    await service.ended(ranked)
    open_job = (await service.fine_tuning.RankBackbones(request())).job.job_id

    async def listed(kind: pb.JobKind) -> list[str]:
        answer = await service.fine_tuning.ListJobs(pb.ListJobsRequest(kind=kind))
        return [job.job_id for job in answer.jobs]

    assert await listed(pb.JOB_KIND_FINE_TUNE) == [trained.job_id]
    assert await listed(pb.JOB_KIND_RANKING) == [open_job, ranked]
    assert (await refusal(service.fine_tuning.ListJobs(pb.ListJobsRequest(kind=9)))).field == "kind"

    refused = await refusal(service.fine_tuning.DeleteJob(pb.DeleteJobRequest(job_id=open_job)))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "JOB_NOT_FINISHED",
    )
    for job_id in (trained.job_id, ranked):
        await service.fine_tuning.DeleteJob(pb.DeleteJobRequest(job_id=job_id))
        for call in (
            service.fine_tuning.DeleteJob(pb.DeleteJobRequest(job_id=job_id)),
            service.fine_tuning.GetJob(pb.GetJobRequest(job_id=job_id)),
        ):
            assert (await refusal(call)).reason == "JOB_NOT_FOUND"
    assert await listed(pb.JOB_KIND_UNSPECIFIED) == [open_job]
    await service.fine_tuning.CancelJob(pb.CancelJobRequest(job_id=open_job))
    assert (await service.ended(open_job)).state == pb.JOB_STATE_CANCELLED


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"inline_images": None}, "data"),
        ({"backbones": [pb.PretrainedBackbone()]}, "backbones[0].backbone"),
        ({"backbones": [pb.PretrainedBackbone(backbone="auto")]}, "backbones[0].backbone"),
        (
            {
                "backbones": [
                    pb.PretrainedBackbone(backbone="resnet18"),
                    pb.PretrainedBackbone(backbone="resnet18", weights="../../etc"),
                ]
            },
            "backbones[1].weights",
        ),
        ({"backbones": [pb.PretrainedBackbone(backbone="resnet18")] * 2}, "backbones[1]"),
        (
            {
                "backbones": [
                    pb.PretrainedBackbone(backbone="resnet18", weights=f"W{n}") for n in range(33)
                ]
            },
            "backbones",
        ),
        ({"time_budget": Duration(seconds=0)}, "time_budget"),
        ({"time_budget": Duration(seconds=601)}, "time_budget"),
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_stored_or_started(
    fields: dict[str, object], field: str, service: Service
) -> None:
    refused = await refusal(service.fine_tuning.RankBackbones(request(**fields)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refused.field == field
    assert await dataset_ids(service) == []
    assert service.launcher.trainers == []


async def test_data_that_is_not_there_or_not_allowed_is_refused(service: Service) -> None:
    gone = request(inline_images=None, dataset_id="ds-0123456789abcdef")
    refused = await refusal(service.fine_tuning.RankBackbones(gone))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND")
    assert refused.field == "dataset_id"
    outside = request(inline_images=None, server_path=pb.ServerPath(path="/etc"))
    refused = await refusal(service.fine_tuning.RankBackbones(outside))
    assert refused.reason == "PATH_NOT_ALLOWED"


async def test_a_dataset_without_classes_is_refused(service: Service) -> None:
    parts = [
        dataset_pb2.UploadDatasetRequest(
            header=dataset_pb2.UploadDatasetHeader(is_unlabelled=True)
        ),
        dataset_pb2.UploadDatasetRequest(image=dataset_pb2.LabelledImage(content=image("red"))),
        dataset_pb2.UploadDatasetRequest(end=dataset_pb2.UploadDatasetEnd(message_count=1)),
    ]
    stored = (await service.datasets.UploadDataset(iter(parts))).dataset.dataset_id
    asked = request(inline_images=None, dataset_id=stored)
    refused = await refusal(service.fine_tuning.RankBackbones(asked))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "DATASET_UNUSABLE",
    )
    assert refused.field == "dataset_id"
    assert service.launcher.trainers == []


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.DATASET_UNUSABLE, grpc.StatusCode.INVALID_ARGUMENT),
        (Reason.DEVICE_UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION),
        (Reason.OUT_OF_MEMORY, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_what_the_trainer_finds_wrong_is_the_jobs_error(
    reason: Reason, code: grpc.StatusCode, make_service: MakeService
) -> None:
    failed = Script(records=[Failed(reason, "one class only")], exit_code=ExitCode.FAILED)
    service = await make_service(failed)
    job_id = (await service.fine_tuning.RankBackbones(request())).job.job_id
    job = await service.ended(job_id)
    error = of_status(job.error)
    assert (error.code, error.reason, error.message) == (code, reason, "one class only")


async def test_a_refused_ranking_leaves_nothing_behind(make_service: MakeService) -> None:
    service = await make_service(HANG, max_queued_jobs=1, ranking_jobs=0)
    await service.fine_tuning.RankBackbones(request())
    (stored,) = await dataset_ids(service)
    more = request(
        inline_images=pb.InlineImages(
            images=[
                dataset_pb2.LabelledImage(label=label, content=image(label))
                for label in ("red", "green")
            ]
        )
    )
    refused = await refusal(service.fine_tuning.RankBackbones(more))
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert await dataset_ids(service) == [stored]
