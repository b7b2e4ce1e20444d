"""RankBackbones: what the trainer is told, what comes back, and what ends a ranking early."""

import asyncio
import tarfile
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from graft.v1 import dataset_pb2
from graft.v1 import fine_tuning_pb2 as pb
from grpc import aio

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
from service.jobs.fake_launcher import FakeTrainer, Script
from service.jobs.ranking import MAX_WAITING
from service.ops import cgroups
from tests.rpc.conftest import (
    GUARD_S,
    SUCCESS,
    MakeService,
    Service,
    close,
    colours,
    image,
    refusal,
)
from tests.rpc.test_wire import handlers, settled

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


def work_folders(service: Service) -> list[Path]:
    return list((service.data_dir / "work").glob("ranking-*"))


async def dataset_ids(service: Service) -> list[str]:
    listed = await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())
    return [dataset.dataset_id for dataset in listed.datasets]


async def test_a_ranking_is_told_in_full_and_leaves_no_folder(make_service: MakeService) -> None:
    service = await make_service(GOOD)
    answer = await service.fine_tuning.RankBackbones(
        request(
            backbones=[
                pb.PretrainedBackbone(backbone="resnet18"),
                pb.PretrainedBackbone(backbone="resnet50", weights="random"),
            ],
            time_budget=Duration(seconds=7),
            seed=3,
        )
    )
    first, second = answer.backbones
    assert (first.backbone, first.weights) == ("resnet18", "IMAGENET1K_V1")
    assert (first.log_loss, first.log_me) == (0.3, -0.1)
    assert (first.image_ms, first.feature_dim, first.problem) == (4.5, 512, "")
    assert second.problem == "no time was left"
    assert not any(second.HasField(name) for name in ("log_loss", "log_me", "image_ms"))
    assert (answer.explanation, answer.image_count) == ("resnet18 is first.", 42)

    (trainer,) = service.launcher.trainers
    spec = trainer.spec
    assert isinstance(spec, RankSpec)
    (stored,) = await dataset_ids(service)
    assert stored in spec.data_dir
    assert [(c.backbone, c.weights) for c in spec.backbones] == [
        ("resnet18", ""),
        ("resnet50", "random"),
    ]
    assert (spec.time_budget_s, spec.seed, spec.only_available) == (7.0, 3, False)
    assert Path(spec.work_dir).parent == service.data_dir / "work"
    assert trainer.stopped.is_set()
    assert work_folders(service) == []


async def test_without_candidates_those_available_are_ranked_with_what_is_exported(
    make_service: MakeService,
) -> None:
    service = await make_service(SUCCESS, GOOD)
    (service.data_dir / "weights").mkdir()
    (service.data_dir / "weights" / "resnet34-b627a593.pth").touch()
    await service.make_model()
    await service.fine_tuning.RankBackbones(request())
    spec = service.launcher.trainers[-1].spec
    lite = [f"efficientnet_lite{n}" for n in range(3)]
    assert [c.backbone for c in spec.backbones] == [*lite, "resnet34"]
    assert [known.weights for known in spec.backbones[0].exported] == ["pretrained"]
    assert (spec.time_budget_s, spec.seed, spec.only_available) == (60.0, 0, True)


async def test_folders_and_archives_on_the_server_are_taken(make_service: MakeService) -> None:
    service = await make_service(GOOD)
    folder = service.allowed / "colours"
    (folder / "red").mkdir(parents=True)
    (folder / "blue").mkdir()
    for label in ("red", "blue"):
        (folder / label / "a.png").write_bytes(image(label))
    with tarfile.open(service.allowed / "colours.tar", "w") as archive:
        archive.add(folder, "colours")
    for name in ("colours", "colours.tar"):
        await service.fine_tuning.RankBackbones(
            pb.RankBackbonesRequest(server_path=pb.ServerPath(path=str(service.allowed / name)))
        )
    in_place, unpacked = (trainer.spec.data_dir for trainer in service.launcher.trainers)
    assert in_place == str(folder)
    assert (await dataset_ids(service))[0] in unpacked


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
async def test_what_the_trainer_finds_wrong_is_the_callers_answer(
    reason: Reason, code: grpc.StatusCode, make_service: MakeService
) -> None:
    failed = Script(records=[Failed(reason, "one class only")], exit_code=ExitCode.FAILED)
    service = await make_service(failed)
    refused = await refusal(service.fine_tuning.RankBackbones(request()))
    assert (refused.code, refused.reason, refused.message) == (code, reason, "one class only")
    assert work_folders(service) == []


async def test_a_crash_is_our_fault_and_its_words_go_to_the_log_alone(
    make_service: MakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service = await make_service(
        Script(exit_code=ExitCode.CRASHED, words=["Traceback: secret"]),
        Script(exit_code=-9),
        Script(fails_to_start=True),
        GOOD,
    )
    refused = await refusal(service.fine_tuning.RankBackbones(request()))
    assert (refused.code, refused.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refused.message
    assert "Traceback: secret" in caplog.text
    refused = await refusal(service.fine_tuning.RankBackbones(request()))
    assert refused.reason == "OUT_OF_MEMORY"
    refused = await refusal(service.fine_tuning.RankBackbones(request()))
    assert refused.code is grpc.StatusCode.INTERNAL
    # The next one has its turn.
    assert (await service.fine_tuning.RankBackbones(request())).image_count == 42


async def test_a_ranking_whose_trainer_the_kernel_killed_for_memory_says_so_for_certain(
    make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([4, 5, 5, 5])
    monkeypatch.setattr(cgroups, "kill_count", lambda: next(counts))
    service = await make_service(Script(exit_code=-9))
    for told in ("the system killed the trainer because memory ran out", "unless somebody"):
        refused = await refusal(service.fine_tuning.RankBackbones(request()))
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OUT_OF_MEMORY",
        )
        assert told in refused.message
        assert "name smaller backbones" in refused.message


async def hanging(service: Service) -> tuple["asyncio.Future[object]", FakeTrainer]:
    """A ranking whose trainer hangs."""
    call = service.fine_tuning.RankBackbones(request())
    waiting = asyncio.ensure_future(call)
    async with asyncio.timeout(GUARD_S):
        trainer = await service.launcher.started.get()
        await trainer.said_all.wait()
    return waiting, trainer


async def late(service: Service, timeout_s: float) -> FakeTrainer:
    """The trainer of a ranking that its caller did not wait for any longer."""
    while True:
        with pytest.raises(aio.AioRpcError) as caught:
            await service.fine_tuning.RankBackbones(request(), timeout=timeout_s)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await settled(lambda: not handlers())
        if not service.launcher.started.empty():
            return service.launcher.started.get_nowait()
        # On a slow machine it had not come so far.
        timeout_s *= 3


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_a_call_that_ends_early_takes_its_trainer_with_it(
    how: str, make_service: MakeService
) -> None:
    service = await make_service(HANG, GOOD)
    if how == "cancelled":
        waiting, trainer = await hanging(service)
        waiting.cancel()
    else:
        trainer = await late(service, 0.2)
    async with asyncio.timeout(GUARD_S):
        await trainer.stopped.wait()
    # Its turn is over too, and its folder gone.
    assert (await service.fine_tuning.RankBackbones(request())).image_count == 42
    assert work_folders(service) == []


async def test_one_ranks_at_a_time_some_wait_and_more_are_refused_at_once(
    make_service: MakeService,
) -> None:
    service = await make_service(HANG, GOOD)
    first, trainer = await hanging(service)
    (stored,) = await dataset_ids(service)
    by_id = pb.RankBackbonesRequest(dataset_id=stored)
    calls = {
        asyncio.ensure_future(service.fine_tuning.RankBackbones(by_id))
        for _ in range(MAX_WAITING + 1)
    }
    # Whichever comes last finds no room; the others wait.
    (late,), waiting = await asyncio.wait(
        calls, timeout=GUARD_S, return_when=asyncio.FIRST_COMPLETED
    )
    refused = await refusal(late)
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert refused.retry_s == 15.0
    assert (await refusal(service.fine_tuning.RankBackbones(request()))).reason == "QUEUE_FULL"
    # What was refused left nothing behind.
    assert await dataset_ids(service) == [stored]
    assert len(service.launcher.trainers) == 1
    first.cancel()
    answers = await asyncio.gather(*waiting)
    assert [answer.image_count for answer in answers] == [42] * MAX_WAITING
    assert trainer.stopped.is_set()
    assert len(service.launcher.trainers) == 1 + MAX_WAITING


async def test_a_ranking_does_not_outlive_the_service(make_service: MakeService) -> None:
    service = await make_service(HANG)
    waiting, trainer = await hanging(service)
    answer = asyncio.create_task(refusal(waiting))
    await service.app.__aexit__(None, None, None)
    assert trainer.stopped.is_set()
    refused = await answer
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert work_folders(service) == []
    await close(service)


async def test_jobs_train_while_backbones_are_ranked(make_service: MakeService) -> None:
    service = await make_service(HANG, SUCCESS)
    waiting, _ = await hanging(service)
    job = await service.make_model()
    assert job.state == pb.JOB_STATE_SUCCEEDED
    waiting.cancel()
