"""FineTune to the first answer, jobs watched and cancelled, and what is refused at the door."""

import asyncio
import tarfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from graftml_stubs.v1 import dataset_pb2, fine_tuning_pb2_grpc, model_pb2, prediction_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb
from grpc import aio

from service.app import App
from service.config import Config
from service.contract import (
    ExitCode,
    Failed,
    Note,
    Progressed,
    Spec,
)
from service.errors import Reason
from service.jobs.launchers import WarmLauncher
from tests.fake_launcher import FakeLauncher, Script
from tests.fake_runtime import FakeRuntime
from tests.rpc.conftest import (
    GUARD_S,
    HANG,
    SUCCESS,
    MakeService,
    Service,
    close,
    colours,
    image,
    of_status,
    refusal,
)


def request(**fields: object) -> pb.FineTuneRequest:
    return pb.FineTuneRequest(
        **{"model": "colours", "inline_images": colours(), **fields}  # type: ignore[arg-type]
    )


async def watch(service: Service, job_id: str, after: int = 0) -> list[pb.JobEvent]:
    call = service.fine_tuning.WatchJob(
        pb.WatchJobRequest(job_id=job_id, after_sequence=after), timeout=GUARD_S
    )
    return [answer.event async for answer in call]


async def test_fine_tune_answers_at_once_and_its_model_is_served_when_it_succeeds(
    service: Service,
) -> None:
    started = await service.fine_tuning.FineTune(request(labels={"team": "birds"}))
    assert started.job.state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)
    job = await service.ended(started.job.job_id)
    assert (job.state, job.version, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 1, 1)
    assert job.request.labels == {"team": "birds"}
    assert job.request.dataset_id.startswith("ds-")
    assert job.create_time.ToSeconds() <= job.end_time.ToSeconds()
    answer = await service.prediction.Predict(
        prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model="colours")],
            images=[prediction_pb2.Image(encoded=image("green"))],
        )
    )
    assert answer.answers[0].results[0].classification.scores[0].label == "green"
    # Warm before it was announced: the call above loaded nothing.
    assert len(service.runtime.loads) == 1


async def test_events_are_numbered_without_gaps_and_tell_the_whole_story(
    service: Service,
) -> None:
    started = await service.fine_tuning.FineTune(request())
    events = await watch(service, started.job.job_id)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    kinds = [event.WhichOneof("payload") for event in events]
    assert kinds[0] == "state_change"
    assert events[0].state_change.state == pb.JOB_STATE_QUEUED
    assert events[1].state_change.state == pb.JOB_STATE_RUNNING
    assert {"data", "epoch", "published", "progress"} <= set(kinds)
    assert events[-1].state_change.state == pb.JOB_STATE_SUCCEEDED
    epoch = next(event.epoch for event in events if event.WhichOneof("payload") == "epoch")
    assert (epoch.epoch, epoch.epochs, epoch.validation_accuracy) == (1, 1, 1.0)
    out = next(event.published for event in events if event.WhichOneof("payload") == "published")
    assert (out.accuracy, out.accuracy_low, out.accuracy_high) == (1.0, 0.75, 1.0)
    assert out.measured_on == model_pb2.MEASURED_ON_CROSS_VALIDATION
    assert (out.measured_count, out.measured_group_count) == (3, 3)


async def test_a_watcher_that_comes_back_misses_nothing_and_sees_nothing_twice(
    service: Service,
) -> None:
    job_id = (await service.fine_tuning.FineTune(request())).job.job_id
    every = await watch(service, job_id)
    for seen in range(len(every) + 1):
        assert await watch(service, job_id, after=seen) == every[seen:]


async def test_a_second_request_with_the_same_id_answers_with_the_first_job(
    service: Service,
) -> None:
    first = await service.fine_tuning.FineTune(request(request_id="once"))
    again = await service.fine_tuning.FineTune(request(request_id="once"))
    assert again.job.job_id == first.job.job_id
    found = await refusal(
        service.fine_tuning.FineTune(request(request_id="once", backbone="resnet18"))
    )
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    listed = await service.fine_tuning.ListJobs(pb.ListJobsRequest())
    assert len(listed.jobs) == 1


async def test_trainers_that_wait_are_there_until_the_jobs_are_back_in_the_queue(
    tmp_path: Path,
) -> None:
    trainers = FakeLauncher(HANG)
    still_at_work: list[bool] = []

    class Warm(WarmLauncher):
        async def start(self, spec: Spec, folder: Path) -> Any:
            return await trainers.start(spec, folder)

        async def close(self) -> None:
            still_at_work.extend(not trainer.stopped.is_set() for trainer in trainers.trainers)
            await super().close()

    config = Config(port=0, metrics_port=0, data_dir=tmp_path / "data", drain_s=GUARD_S)
    app = App(config, {}, runtime=FakeRuntime(), launcher=Warm({}, 0))
    async with app, aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        stub: Any = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        await stub.FineTune(request())
        trainer = await asyncio.wait_for(trainers.started.get(), GUARD_S)
        await asyncio.wait_for(trainer.said_all.wait(), GUARD_S)
    assert still_at_work == [False]


async def test_a_running_job_is_cancelled_and_a_finished_one_cannot_be(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(HANG)
    job_id = (await service.fine_tuning.FineTune(request())).job.job_id
    async with asyncio.timeout(GUARD_S):
        await service.launcher.started.get()
    answer = await service.fine_tuning.CancelJob(pb.CancelJobRequest(job_id=job_id))
    assert answer.job.cancel_requested or answer.job.state == pb.JOB_STATE_CANCELLED
    assert (await service.ended(job_id)).state == pb.JOB_STATE_CANCELLED
    found = await refusal(service.fine_tuning.CancelJob(pb.CancelJobRequest(job_id=job_id)))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_FINISHED")


async def test_a_queued_job_is_cancelled_at_once(make_service: MakeService) -> None:
    service: Service = await make_service(HANG)
    await service.fine_tuning.FineTune(request())
    second = (await service.fine_tuning.FineTune(request(model="other"))).job.job_id
    answer = await service.fine_tuning.CancelJob(pb.CancelJobRequest(job_id=second))
    assert answer.job.state == pb.JOB_STATE_CANCELLED


async def test_a_job_that_cannot_succeed_says_why(make_service: MakeService) -> None:
    why = "classes with fewer than 2 images: cat (1)"
    failing = Script(
        records=[Note("warning", "few images"), Failed(Reason.DATASET_UNUSABLE, why)],
        exit_code=ExitCode.FAILED,
    )
    service: Service = await make_service(failing)
    job = await service.ended((await service.fine_tuning.FineTune(request())).job.job_id)
    assert job.state == pb.JOB_STATE_FAILED
    found = of_status(job.error)
    assert (found.reason, found.message) == ("DATASET_UNUSABLE", why)
    assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert job.attempts == 1


async def test_a_trainer_that_crashes_is_started_again_and_then_given_up(
    make_service: MakeService,
) -> None:
    crash = Script(records=[Progressed("training", 0.2)], exit_code=ExitCode.CRASHED)
    service: Service = await make_service(crash, crash, crash, SUCCESS)
    job = await service.ended((await service.fine_tuning.FineTune(request())).job.job_id)
    assert job.state == pb.JOB_STATE_FAILED
    assert of_status(job.error).reason == "TRAINER_CRASHED"
    # The service stands, and the next job succeeds.
    assert (await service.make_model("next")).state == pb.JOB_STATE_SUCCEEDED


async def test_a_restart_serves_what_was_finished_and_runs_what_was_not(
    make_service: MakeService,
) -> None:
    first: Service = await make_service(SUCCESS, HANG)
    await first.make_model()
    running = (await first.fine_tuning.FineTune(request(model="second"))).job.job_id
    async with asyncio.timeout(GUARD_S):
        while (await first.launcher.started.get()).spec.job_id != running:
            pass
    queued = (await first.fine_tuning.FineTune(request(model="third"))).job.job_id
    await close(first)

    second: Service = await make_service(SUCCESS)
    answer = await second.prediction.Predict(
        prediction_pb2.PredictRequest(
            models=[prediction_pb2.ModelSpec(model="colours")],
            images=[prediction_pb2.Image(encoded=image("red"))],
        )
    )
    assert answer.answers[0].results[0].classification.scores[0].label == "red"
    for job_id in (running, queued):
        assert (await second.ended(job_id)).state == pb.JOB_STATE_SUCCEEDED


async def test_jobs_are_listed_newest_first_by_pages_state_and_model(
    make_service: MakeService,
) -> None:
    service: Service = await make_service()
    made = [(await service.make_model(name)).job_id for name in ("a", "b", "c")]
    page = await service.fine_tuning.ListJobs(pb.ListJobsRequest(page_size=2))
    assert [job.job_id for job in page.jobs] == made[:0:-1]
    rest = await service.fine_tuning.ListJobs(
        pb.ListJobsRequest(page_size=2, page_token=page.next_page_token)
    )
    assert [job.job_id for job in rest.jobs] == made[:1]
    assert not rest.next_page_token
    of_b = await service.fine_tuning.ListJobs(pb.ListJobsRequest(model="b"))
    assert [job.job_id for job in of_b.jobs] == [made[1]]
    failed = await service.fine_tuning.ListJobs(pb.ListJobsRequest(states=[pb.JOB_STATE_FAILED]))
    assert not failed.jobs
    found = await refusal(service.fine_tuning.ListJobs(pb.ListJobsRequest(states=[77])))
    assert found.field == "states"


async def test_images_are_read_from_an_allowed_folder_or_archive(service: Service) -> None:
    folder = service.allowed / "images"
    for label in ("red", "green", "blue"):
        (folder / label).mkdir(parents=True)
        for n in range(3):
            (folder / label / f"{n}.png").write_bytes(image(label, (50 + n, 50)))
    archive = service.allowed / "images.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "images")
    for path in (folder, archive):
        started = await service.fine_tuning.FineTune(
            pb.FineTuneRequest(model="colours", server_path=pb.ServerPath(path=str(path)))
        )
        job = await service.ended(started.job.job_id)
        assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
        assert job.request.server_path.path == str(path)


async def test_paths_outside_the_allowed_folders_are_refused(
    service: Service, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (service.allowed / "link").symlink_to(outside)
    for path in ("/etc", str(outside), f"{service.allowed}/../outside", f"{service.allowed}/link"):
        call = service.fine_tuning.FineTune(
            pb.FineTuneRequest(model="m", server_path=pb.ServerPath(path=path))
        )
        found = await refusal(call)
        assert (found.code, found.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "PATH_NOT_ALLOWED",
        )
    missing = pb.ServerPath(path=str(service.allowed / "missing"))
    found = await refusal(
        service.fine_tuning.FineTune(pb.FineTuneRequest(model="m", server_path=missing))
    )
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "PATH_NOT_FOUND")


BAD_FIELDS: dict[str, dict[str, object]] = {
    "model": {"model": "No Name"},
    "backbone": {"backbone": "vgg16"},
    "validation_fraction": {"validation_fraction": 0.9},
    "outlier_false_alarm_rate": {"outlier_false_alarm_rate": 0.6},
    "time_budget": {"time_budget": Duration(seconds=0)},
    "weights": {"backbone": "auto", "weights": "random"},
    "feature_based.augmented_views": {"feature_based": pb.FeatureBased(augmented_views=17)},
    "baselines": {"baselines": [pb.BASELINE_UNSPECIFIED]},
    "grouping": {"grouping": pb.Grouping()},
    "grouping.folder_level": {"grouping": pb.Grouping(folder_level=-1)},
    "grouping.name_pattern": {"grouping": pb.Grouping(name_pattern="*.jpg")},
    "augmentation": {
        "augmentation": pb.Augmentation(mirror=False),
        "feature_based": pb.FeatureBased(),
    },
    "augmentation.min_scale": {"augmentation": pb.Augmentation(min_scale=0)},
    "image.group": {
        "inline_images": pb.InlineImages(
            images=[dataset_pb2.LabelledImage(label="red", content=b"x", group="g" * 129)]
        )
    },
    "gate.min_accuracy": {"gate": pb.Gate(min_accuracy=1.5)},
    "gate.min_class_recall": {"gate": pb.Gate(min_class_recall=-0.1)},
    "gate.class_recalls[red]": {"gate": pb.Gate(class_recalls={"red": float("nan")})},
    "gate.class_recalls": {"gate": pb.Gate(class_recalls={"a/b": 0.5})},
    "gate.max_regression": {"gate": pb.Gate(not_worse_than="latest", max_regression=0.51)},
    "gate.when_uncertain": {"gate": pb.Gate(when_uncertain=99)},  # type: ignore[arg-type]
    "gate.max_latency": {"gate": pb.Gate(max_latency=Duration(seconds=0))},
    "gate.max_parity_difference": {"gate": pb.Gate(max_parity_difference=0)},
    "gate.not_worse_than": {"gate": pb.Gate(not_worse_than="No Name")},
    "gate.alias": {"gate": pb.Gate(alias="latest")},
    "domain_adaptation.target": {"domain_adaptation": pb.DomainAdaptation()},
    "domain_adaptation.technique": {
        "domain_adaptation": pb.DomainAdaptation(target_images=colours(), technique=99)  # type: ignore[arg-type]
    },
    "domain_adaptation.epochs": {
        "domain_adaptation": pb.DomainAdaptation(target_images=colours(), epochs=3)
    },
    "domain_adaptation.batch_size": {
        "domain_adaptation": pb.DomainAdaptation(
            target_images=colours(), technique=pb.ADAPTATION_TECHNIQUE_CDAN, batch_size=1
        )
    },
    "domain_adaptation.target_path.path": {
        "domain_adaptation": pb.DomainAdaptation(target_path=pb.ServerPath(path="here"))
    },
    "feature_based.l2": {"feature_based": pb.FeatureBased(l2=-1)},
    "model_based.epochs": {"model_based": pb.ModelBased(epochs=0)},
    "model_based.learning_rate": {"model_based": pb.ModelBased(learning_rate=float("nan"))},
    "model_based.train_from_stage": {"model_based": pb.ModelBased(train_from_stage="roof")},
    "model_based.recipe": {"model_based": pb.ModelBased(recipe=99)},  # type: ignore[arg-type]
    "device": {"device": 99},
    "request_id": {"request_id": "x" * 129},
    "labels": {"labels": {str(n): "" for n in range(33)}},
}


@pytest.mark.parametrize("field", BAD_FIELDS)
async def test_a_field_with_a_bad_value_is_named(service: Service, field: str) -> None:
    found = await refusal(service.fine_tuning.FineTune(request(**BAD_FIELDS[field])))
    assert (found.code, found.reason, found.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        field,
    )
    # Nothing was kept of it.
    kept = await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())
    assert not kept.datasets


async def test_a_request_without_images_is_refused(service: Service) -> None:
    found = await refusal(service.fine_tuning.FineTune(pb.FineTuneRequest(model="m")))
    assert (found.code, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, "data")


async def test_images_of_one_class_only_are_refused(service: Service) -> None:
    one = [
        dataset_pb2.LabelledImage(label="red", content=image("red", (30 + n, 30))) for n in range(4)
    ]
    found = await refusal(
        service.fine_tuning.FineTune(request(inline_images=pb.InlineImages(images=one)))
    )
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE")
    assert "2 are needed" in found.message
    kept = await service.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest())
    assert not kept.datasets


async def test_unknown_jobs_and_datasets_are_not_found(service: Service) -> None:
    calls = {
        "JOB_NOT_FOUND": [
            service.fine_tuning.GetJob(pb.GetJobRequest(job_id="job-0")),
            service.fine_tuning.CancelJob(pb.CancelJobRequest(job_id="job-0")),
            service.fine_tuning.WatchJob(pb.WatchJobRequest(job_id="job-0")),
        ],
        "DATASET_NOT_FOUND": [
            service.fine_tuning.FineTune(pb.FineTuneRequest(model="m", dataset_id="ds-0")),
        ],
    }
    for reason, all_calls in calls.items():
        for call in all_calls:
            found = await refusal(call)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, reason)


async def test_more_jobs_than_the_queue_takes_are_refused(make_service: MakeService) -> None:
    service: Service = await make_service(HANG, max_queued_jobs=1)
    await service.fine_tuning.FineTune(request())
    async with asyncio.timeout(GUARD_S):
        await service.launcher.started.get()
    await service.fine_tuning.FineTune(request())
    found = await refusal(service.fine_tuning.FineTune(request()))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert found.retry_s > 0
