"""A base is pinned at the door: its version, its choices, its images."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from service.contract import MANIFEST_FILE, Augmentation, Grouping, decode_manifest
from service.domain import WHITE, Base, ImageDecoding, ModelKey, VersionSource
from service.errors import GraftError, Reason, WrongState
from service.jobs.lineage import Lineage
from service.storage.database import Database
from service.storage.datasets import DatasetStore
from service.storage.models import ModelStore
from service.storage.version_rows import NewVersion
from tests.keys import BIRDS, key
from tests.unit.jobs.conftest import request
from tests.unit.jobs.house import class_folders
from tests.unit.storage.conftest import TENANT, write_result
from tests.unit.storage.test_datasets import IMAGES, upload


@pytest.fixture
def lineage(models: ModelStore, datasets: DatasetStore, tmp_path: Path) -> Lineage:
    return Lineage(models, datasets, lambda _: (tmp_path / "allowed",))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(class_folders(tmp_path / "allowed" / "pets"))


Train = Callable[..., int]


@pytest.fixture
def train(models: ModelStore, database: Database, tmp_path: Path) -> Train:
    """Publishes a version as a job of such a request would; answers with its number."""

    def train(
        model: ModelKey = BIRDS,
        chosen: str = "resnet34",
        server_path: str = "",
        dataset_id: str = "",
        sources: Sequence[VersionSource] = (),
        background: str = WHITE,
        weights: str = "",
        **asked: object,
    ) -> int:
        numbers = itertools.count(1)
        job_id = next(f"job-{n}" for n in numbers if not (tmp_path / "out" / f"job-{n}").exists())
        out = write_result(tmp_path / "out" / job_id, job_id, model.name)
        manifest = msgspec.structs.replace(
            decode_manifest((out / MANIFEST_FILE).read_bytes()),
            backbone=chosen,
            decoding=ImageDecoding(background, 12),
            weights_asked=weights,
            **asked,
        )
        (out / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
        stored = models.put_result(out)
        own = VersionSource("source", dataset_id, server_path)
        target = VersionSource("target", "", "/target")
        with database.transaction() as connection:
            new = NewVersion(
                model=model, job_id=job_id, stored=stored, sources=[*sources, own, target]
            )
            return models.publish(connection, new).version

    return train


def refused(error: pytest.ExceptionInfo[GraftError]) -> tuple[Reason, str]:
    return error.value.reason, error.value.field


def test_a_base_is_pinned_to_the_number_that_its_name_stands_for(
    lineage: Lineage, models: ModelStore, train: Train, folder: str
) -> None:
    train(server_path=folder)
    train(server_path=folder)
    models.set_alias(BIRDS, "prod", 1)
    asked = request()
    for which, number in (((None, None), 2), ((None, "prod"), 1), ((1, None), 1)):
        assert lineage.grow(asked, "", *which).base == Base("birds", number)
    train(key("bears"), server_path=folder)
    assert lineage.grow(asked, "bears", None, None).base == Base("bears", 1)


def test_what_the_request_leaves_open_is_the_bases(
    lineage: Lineage, train: Train, folder: str
) -> None:
    groups = Grouping(folder_level=1)
    train(server_path=folder, chosen="resnet18", grouping=groups)
    train(key("bears"), server_path=folder, chosen="resnet50", weights="W")
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
    train(key("bears"), server_path=folder)
    assert lineage.grow(request(), "birds", None, None).background == "#102030"
    assert lineage.grow(request(), "bears", None, None).background_or_white == "#ffffff"
    other = request(background="#AABBCC")
    assert lineage.grow(other, "birds", None, None).background_or_white == "#aabbcc"


def test_what_an_augmentation_leaves_open_is_the_bases(
    lineage: Lineage, train: Train, folder: str
) -> None:
    train(server_path=folder, augmentation=Augmentation(mirror=False, colour=0.2))
    train(key("bears"), server_path=folder)
    own = request(augmentation=Augmentation(colour=0.0, min_scale=0.5))
    assert lineage.grow(request(), "birds", None, None).augmentation == Augmentation(
        mirror=False, colour=0.2
    )
    assert lineage.grow(own, "birds", None, None).augmentation == Augmentation(
        mirror=False, colour=0.0, min_scale=0.5
    )
    assert lineage.grow(own, "bears", None, None).augmentation == own.augmentation
    assert lineage.grow(request(), "bears", None, None).augmentation is None


def test_a_version_whose_images_are_not_known_cannot_be_grown(
    lineage: Lineage, models: ModelStore, database: Database, tmp_path: Path
) -> None:
    stored = models.put_result(write_result(tmp_path / "out", "job-of-elsewhere"))
    with database.transaction() as connection:
        new = NewVersion(model=BIRDS, job_id="job-of-elsewhere", stored=stored)
        models.publish(connection, new)
    with pytest.raises(WrongState, match="none") as caught:
        lineage.grow(request(), "", None, None)
    assert refused(caught) == (Reason.BASE_DATA_GONE, "base")


def test_the_sources_are_kept_though_the_versions_between_are_deleted(
    lineage: Lineage, models: ModelStore, train: Train, datasets: DatasetStore, folder: str
) -> None:
    dataset_id = upload(datasets, IMAGES).dataset_id
    train(server_path="", dataset_id=dataset_id)
    grown = lineage.grow(request(server_path=folder), "", None, None)
    train(server_path=folder, sources=grown.base_sources)
    models.delete_version(BIRDS, 1)
    assert lineage.grow(request(), "", None, None).base_sources == [
        VersionSource("source", dataset_id),
        VersionSource("source", folder=folder),
    ]


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
