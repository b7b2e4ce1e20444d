"""A base is pinned at the door: its version, its choices, its images."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from service.contract import Augmentation, Grouping
from service.domain import WHITE, Base, ImageDecoding
from service.errors import GraftError, NotFound, Reason, WrongState
from service.jobs.lineage import Lineage
from service.jobs.store import JobRecord, JobStore
from service.storage.artifacts import Artifacts
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from tests.unit.jobs.conftest import Queue, request
from tests.unit.jobs.house import class_folders
from tests.unit.storage.conftest import TENANT, write_result
from tests.unit.storage.test_datasets import IMAGES, upload


@pytest.fixture
def lineage(jobs: JobStore, models: ModelStore, datasets: DatasetStore, tmp_path: Path) -> Lineage:
    return Lineage(jobs, models, datasets, lambda _: (tmp_path / "allowed",))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(class_folders(tmp_path / "allowed" / "pets"))


Train = Callable[..., JobRecord]


@pytest.fixture
def train(
    jobs: JobStore, models: ModelStore, artifacts: Artifacts, queue: Queue, tmp_path: Path
) -> Train:
    """Runs one job to its end; answers with it."""

    def train(model: str = "birds", chosen: str = "resnet34", **changes: object) -> JobRecord:
        job_id = queue(model, **changes).job_id
        assert jobs.claim(["auto"]) is not None
        stored = artifacts.put(write_result(tmp_path / "out" / job_id, job_id, model))
        manifest = msgspec.structs.replace(
            stored.manifest,
            backbone=chosen,
            decoding=ImageDecoding(str(changes.get("background") or WHITE), 12),
        )
        stored = dataclasses.replace(stored, manifest=manifest)
        return jobs.succeed(
            job_id,
            lambda connection: models.publish(connection, model, job_id, stored),
        )

    return train


def refused(error: pytest.ExceptionInfo[GraftError]) -> tuple[Reason, str]:
    return error.value.reason, error.value.field


def test_a_base_is_pinned_to_the_number_that_its_name_stands_for(
    lineage: Lineage, models: ModelStore, train: Train, folder: str
) -> None:
    first, second = train(server_path=folder), train(server_path=folder)
    models.set_alias("birds", "prod", 1)
    asked = request("birds")
    for which, number, job in (
        ((None, None), 2, second), ((None, "prod"), 1, first), ((1, None), 1, first),
    ):  # fmt: skip
        grown = lineage.grow(asked, "", *which)
        assert (grown.base, grown.base_job_id) == (Base("birds", number), job.job_id)
    train("bears", server_path=folder)
    assert lineage.grow(asked, "bears", None, None).base == Base("bears", 1)


def test_what_the_request_leaves_open_is_the_bases(
    lineage: Lineage, train: Train, folder: str
) -> None:
    groups = Grouping(folder_level=1)
    train(server_path=folder, backbone="auto", chosen="resnet18", grouping=groups, seed=7)
    train("bears", server_path=folder, backbone="resnet50", chosen="resnet50", weights="W")
    grown = lineage.grow(request(), "birds", None, None)
    assert (grown.backbone, grown.weights) == ("resnet18", "")
    assert (grown.grouping, grown.seed) == (groups, None)
    grown = lineage.grow(request(), "bears", None, None)
    assert (grown.backbone, grown.weights, grown.grouping) == ("resnet50", "W", None)
    other = Grouping(name_pattern="{group}_*")
    own = request(backbone="auto", seed=3, validation_fraction=0.3, grouping=other)
    grown = lineage.grow(own, "birds", None, None)
    assert (grown.backbone, grown.weights, grown.grouping) == ("auto", "", other)
    assert (grown.seed, grown.validation_fraction) == (3, 0.3)
    assert grown.base_digest == "d" * 64


def test_a_base_gives_its_background_unless_another_is_asked_for(
    lineage: Lineage, train: Train, folder: str
) -> None:
    train(server_path=folder, background="#102030")
    train("bears", server_path=folder)
    assert lineage.grow(request(), "birds", None, None).background == "#102030"
    assert lineage.grow(request(), "bears", None, None).background_or_white == "#ffffff"
    other = request(background="#AABBCC")
    assert lineage.grow(other, "birds", None, None).background_or_white == "#aabbcc"


def test_what_an_augmentation_leaves_open_is_the_bases(
    lineage: Lineage, train: Train, folder: str
) -> None:
    train(server_path=folder, augmentation=Augmentation(mirror=False, colour=0.2))
    train("bears", server_path=folder)
    own = request(augmentation=Augmentation(colour=0.0, min_scale=0.5))
    assert lineage.grow(request(), "birds", None, None).augmentation == Augmentation(
        mirror=False, colour=0.2
    )
    assert lineage.grow(own, "birds", None, None).augmentation == Augmentation(
        mirror=False, colour=0.0, min_scale=0.5
    )
    assert lineage.grow(own, "bears", None, None).augmentation == own.augmentation
    assert lineage.grow(request(), "bears", None, None).augmentation is None


def test_a_base_that_is_not_there_is_told(lineage: Lineage, train: Train, folder: str) -> None:
    with pytest.raises(NotFound) as caught:
        lineage.grow(request(), "", None, None)
    assert refused(caught) == (Reason.MODEL_NOT_FOUND, "base")
    train(server_path=folder)
    with pytest.raises(NotFound) as caught:
        lineage.grow(request(), "", 2, None)
    assert refused(caught) == (Reason.VERSION_NOT_FOUND, "base")
    with pytest.raises(NotFound) as caught:
        lineage.grow(request(), "", None, "prod")
    assert refused(caught) == (Reason.ALIAS_NOT_FOUND, "base")


def test_a_version_that_no_job_here_made_cannot_be_grown(
    lineage: Lineage, models: ModelStore, artifacts: Artifacts, database: Database, tmp_path: Path
) -> None:
    stored = artifacts.put(write_result(tmp_path / "out", "job-of-elsewhere"))
    with database.transaction() as connection:
        models.publish(connection, "birds", "job-of-elsewhere", stored)
    with pytest.raises(WrongState, match="not known here") as caught:
        lineage.grow(request(), "", None, None)
    assert refused(caught) == (Reason.BASE_DATA_GONE, "base")


def test_the_chain_is_followed_though_its_versions_are_deleted(
    lineage: Lineage, models: ModelStore, train: Train, datasets: DatasetStore, folder: str
) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    train(server_path="", dataset_id=dataset_id)
    grown = lineage.grow(request(server_path=folder), "", None, None)
    second = train(server_path=folder, base=grown.base, base_job_id=grown.base_job_id)
    models.delete_version("birds", 1)
    assert lineage.origins(second.job_id) == [dataset_id, Path(folder)]


def test_a_deleted_dataset_ends_growing_until_the_same_images_are_back(
    lineage: Lineage, train: Train, datasets: DatasetStore
) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    train(server_path="", dataset_id=dataset_id)
    datasets.delete(dataset_id, TENANT)
    with pytest.raises(WrongState, match="upload the same images again") as caught:
        lineage.grow(request(), "", None, None)
    assert refused(caught) == (Reason.BASE_DATA_GONE, "base")
    assert upload(datasets, IMAGES).dataset_id == dataset_id
    assert lineage.grow(request(), "", None, None).base == Base("birds", 1)


@pytest.mark.parametrize("what", ["gone", "a file", "a link out"])
def test_a_folder_that_is_not_what_it_was_ends_growing(
    lineage: Lineage, train: Train, folder: str, tmp_path: Path, what: str
) -> None:
    train(server_path=folder)
    Path(folder).rename(tmp_path / "elsewhere")
    if what == "a file":
        Path(folder).write_bytes(b"")
    elif what == "a link out":
        Path(folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WrongState, match="put it back") as caught:
        lineage.grow(request(), "", None, None)
    assert refused(caught) == (Reason.BASE_DATA_GONE, "base")
