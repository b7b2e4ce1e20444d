"""Domain adaptation and datasets without classes, over the wire."""

from pathlib import Path

import grpc
import pytest
from graftml_stubs.v1 import dataset_pb2, model_pb2
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.contract import DomainAdaptation, Finished
from service.ingest import index
from tests.fake_launcher import Script
from tests.rpc.conftest import (
    HANG,
    MakeService,
    Service,
    colours,
    image,
    refusal,
    write_result,
)
from tests.rpc.test_datasets import end, zipped


def adapting(**fields: object) -> pb.FineTuneRequest:
    return pb.FineTuneRequest(
        model="colours",
        inline_images=colours(),
        domain_adaptation=pb.DomainAdaptation(**fields),  # type: ignore[arg-type]
    )


def target(*labels: str) -> pb.InlineImages:
    """An image a label."""
    return pb.InlineImages(
        images=[
            dataset_pb2.LabelledImage(label=label, content=image("red", (60 + n, 60)))
            for n, label in enumerate(labels)
        ]
    )


async def test_an_adaptation_reaches_the_trainer_and_comes_back(service: Service) -> None:
    asked = pb.DomainAdaptation(
        target_images=target("red", "", ""),
        technique=pb.ADAPTATION_TECHNIQUE_CDAN,
        always_adapt=True,
        evaluate_on_target=True,
        epochs=3,
        batch_size=2,
        learning_rate=0.01,
    )
    started = await service.fine_tuning.FineTune(
        pb.FineTuneRequest(model="colours", inline_images=colours(), domain_adaptation=asked)
    )
    await service.ended(started.job.job_id)
    back = started.job.request.domain_adaptation
    stored = back.target_dataset_id
    asked.target_dataset_id = stored
    assert back == asked
    spec = service.launcher.trainers[0].spec
    assert spec.method == DomainAdaptation(
        technique="cdan", always_adapt=True, evaluate_on_target=True, epochs=3, batch_size=2,
        learning_rate=0.01,
    )  # fmt: skip
    assert spec.target.name == stored
    read = index.load(Path(spec.files[spec.target.index]))
    assert sorted(image.label for image in read.images) == ["", "", "red"]
    got = await service.datasets.GetDataset(dataset_pb2.GetDatasetRequest(dataset_id=stored))
    assert got.dataset.is_unlabelled
    assert (got.dataset.image_count, len(got.dataset.classes)) == (3, 0)


@pytest.mark.parametrize("name", sorted(pb.AdaptationTechnique.keys()))
async def test_every_technique_has_a_word_of_its_own(make_service: MakeService, name: str) -> None:
    service: Service = await make_service(HANG)
    number = pb.AdaptationTechnique.Value(name)
    started = await service.fine_tuning.FineTune(
        adapting(target_images=target(""), technique=number)
    )
    spec = (await service.launcher.started.get()).spec
    assert isinstance(spec.method, DomainAdaptation)
    word = name.removeprefix("ADAPTATION_TECHNIQUE_").lower().replace("unspecified", "auto")
    assert spec.method.technique == word
    back = started.job.request.domain_adaptation.technique
    assert back == number


async def test_an_adapted_version_says_so(make_service: MakeService) -> None:
    adapted = Script(
        [Finished(1.0, 3)],
        before_last=lambda spec: write_result(spec, method="domain_adaptation", technique="mcc"),
    )
    service: Service = await make_service(adapted)
    started = await service.fine_tuning.FineTune(adapting(target_images=target("")))
    await service.ended(started.job.job_id)
    got = await service.models.GetVersion(model_pb2.GetVersionRequest(model="colours"))
    assert got.version.method == model_pb2.TRANSFER_METHOD_DOMAIN_ADAPTATION


async def test_a_target_lies_in_an_allowed_folder_or_archive_and_nowhere_else(
    service: Service,
) -> None:
    folder = service.allowed / "target"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").write_bytes(image("red"))
    archive = service.allowed / "target.zip"
    archive.write_bytes(zipped({"a.png": image("red")}))
    for path in (folder, archive):
        started = await service.fine_tuning.FineTune(
            adapting(target_path=pb.ServerPath(path=str(path)))
        )
        job = await service.ended(started.job.job_id)
        assert job.state == pb.JOB_STATE_SUCCEEDED, job.error
        assert job.request.domain_adaptation.target_path.path == str(path)
    for path, reason in (("/etc", "PATH_NOT_ALLOWED"), (f"{folder}/none", "PATH_NOT_FOUND")):
        found = await refusal(
            service.fine_tuning.FineTune(adapting(target_path=pb.ServerPath(path=path)))
        )
        assert (found.reason, found.field) == (reason, "domain_adaptation.target_path.path")


async def test_images_without_classes_are_uploaded_for_a_target_and_for_nothing_else(
    make_service: MakeService,
) -> None:
    service: Service = await make_service(HANG)
    header = dataset_pb2.UploadDatasetHeader(display_name="target", is_unlabelled=True)
    packed = zipped({"deep/er/a.png": image("red"), "b.png": image("green")})
    answer = await service.datasets.UploadDataset(
        iter(
            [
                dataset_pb2.UploadDatasetRequest(header=header),
                dataset_pb2.UploadDatasetRequest(archive_chunk=packed),
                end(1),
            ]
        )
    )
    kept = answer.dataset
    assert kept.is_unlabelled
    assert kept.image_count == 2
    refused = await refusal(
        service.fine_tuning.FineTune(
            pb.FineTuneRequest(model="colours", dataset_id=kept.dataset_id)
        )
    )
    assert (refused.code, refused.reason, refused.field) == (
        grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE", "dataset_id",
    )  # fmt: skip
    job = (await service.fine_tuning.FineTune(adapting(target_dataset_id=kept.dataset_id))).job
    in_use = await refusal(
        service.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(dataset_id=kept.dataset_id))
    )
    assert (in_use.reason, job.job_id in in_use.message) == ("DATASET_IN_USE", True)
    gone = await refusal(service.fine_tuning.FineTune(adapting(target_dataset_id="ds-0")))
    assert (gone.reason, gone.field) == (
        "DATASET_NOT_FOUND", "domain_adaptation.target_dataset_id",
    )  # fmt: skip
