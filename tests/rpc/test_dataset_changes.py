"""Datasets that are made of others, and images that are erased, over the wire."""

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from graftml_stubs.v1 import dataset_pb2 as pb
from graftml_stubs.v1 import fine_tuning_pb2 as ft

from service.contract import Spec
from service.ingest import index
from tests.rpc.conftest import CLASSES, HANG, MakeService, Service, image, refusal
from tests.rpc.test_datasets import end, one_by_one, tar, upload

NEW = image("red", (99, 40))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pictures() -> list[pb.LabelledImage]:
    """Returns three images of each class."""
    return [
        pb.LabelledImage(label=label, content=image(label, (40 + n, 40)), filename=f"{label}{n}")
        for label in CLASSES
        for n in range(3)
    ]


def adding(
    dataset_id: str, *parts: pb.AddImagesRequest, **header: Any
) -> Iterator[pb.AddImagesRequest]:
    yield pb.AddImagesRequest(header=pb.AddImagesHeader(dataset_id=dataset_id, **header))
    yield from parts
    yield pb.AddImagesRequest(end=end(len(parts)).end)


def more(*images: pb.LabelledImage) -> list[pb.AddImagesRequest]:
    return [pb.AddImagesRequest(image=each) for each in images]


async def stored(service: Service) -> pb.Dataset:
    """Uploads three images of each class."""
    found: pb.Dataset = (await service.datasets.UploadDataset(one_by_one(pictures()))).dataset
    return found


async def labels(service: Service, dataset_id: str) -> dict[str, str]:
    """Returns the classes of a dataset's images by digest, page by page."""
    found, token = {}, ""
    while True:
        request = pb.ListImagesRequest(dataset_id=dataset_id, page_size=4, page_token=token)
        answer = await service.datasets.ListImages(request)
        found |= {i.digest: i.label for i in answer.images if not i.is_erased}
        if not (token := answer.next_page_token):
            return found


def contents(spec: Spec) -> list[bytes]:
    """Returns what the packs hold that a job was told of."""
    return [Path(spec.files[pack]).read_bytes() for pack in spec.data.packs]


async def test_images_are_added_by_themselves_or_in_an_archive(service: Service) -> None:
    first = await stored(service)
    known = pictures()[0]
    fresh = pb.LabelledImage(label="red", content=NEW)
    answer = await service.datasets.AddImages(
        adding(first.dataset_id, *more(known, fresh), display_name="more")
    )
    made = answer.dataset
    assert (made.image_count, made.display_name) == (10, "more")
    assert [(row.reason, row.count) for row in made.summary.left_out] == [
        (pb.LEFT_OUT_REASON_COPY, 1)
    ]
    archive = tar({"red/new.png": NEW})
    answer = await service.datasets.AddImages(
        adding(first.dataset_id, pb.AddImagesRequest(archive_chunk=archive))
    )
    assert answer.dataset.dataset_id == made.dataset_id
    assert await labels(service, made.dataset_id) == await labels(service, first.dataset_id) | {
        digest(NEW): "red"
    }


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "DATASET_UNUSABLE"),
        (more(pb.LabelledImage(label="a/b", content=NEW)), "INVALID_FIELD"),
        (more(pb.LabelledImage(label="Red", content=NEW)), "DATASET_UNUSABLE"),
        ([pb.AddImagesRequest()], "INVALID_FIELD"),
        ([pb.AddImagesRequest(archive_chunk=b"no archive")], "ARCHIVE_UNREADABLE"),
    ],
    ids=["nothing", "label", "case", "empty", "archive"],
)
async def test_what_cannot_be_added_is_refused_and_leaves_nothing(
    service: Service, parts: Sequence[pb.AddImagesRequest], reason: str
) -> None:
    first = await stored(service)
    found = await refusal(service.datasets.AddImages(adding(first.dataset_id, *parts)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    listed = await service.datasets.ListDatasets(pb.ListDatasetsRequest())
    assert list(listed.datasets) == [first]
    assert not list((service.data_dir / "uploads").iterdir())


async def test_images_are_removed_and_relabelled(service: Service) -> None:
    first = await stored(service)
    gone = digest(pictures()[0].content)
    request = pb.RemoveImagesRequest(
        dataset_id=first.dataset_id, digests=[gone], display_name="less"
    )
    less = (await service.datasets.RemoveImages(request)).dataset
    assert (less.image_count, less.display_name) == (8, "less")
    moved = digest(pictures()[1].content)
    relabel = pb.RelabelImagesRequest(dataset_id=less.dataset_id, labels={moved: "violet"})
    other = (await service.datasets.RelabelImages(relabel)).dataset
    found = await labels(service, other.dataset_id)
    assert gone not in found
    assert found[moved] == "violet"
    assert await labels(service, less.dataset_id) == found | {moved: pictures()[1].label}


@pytest.mark.parametrize(
    ("call", "request_", "code", "reason"),
    [
        (
            "RemoveImages", pb.RemoveImagesRequest(digests=["0" * 64]),
            "NOT_FOUND", "IMAGE_NOT_FOUND",
        ),
        ("RemoveImages", pb.RemoveImagesRequest(), "INVALID_ARGUMENT", "INVALID_FIELD"),
        (
            "RemoveImages",
            pb.RemoveImagesRequest(digests=[digest(each.content) for each in pictures()]),
            "INVALID_ARGUMENT", "DATASET_UNUSABLE",
        ),
        (
            "RelabelImages", pb.RelabelImagesRequest(labels={"0" * 64: "red"}),
            "NOT_FOUND", "IMAGE_NOT_FOUND",
        ),
        (
            "RelabelImages",
            pb.RelabelImagesRequest(labels={digest(pictures()[0].content): "Blue"}),
            "INVALID_ARGUMENT", "DATASET_UNUSABLE",
        ),
        ("ListImages", pb.ListImagesRequest(page_size=-1), "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("ListImages", pb.ListImagesRequest(page_token="x"), "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("EraseImage", pb.EraseImageRequest(image_digest="0" * 64), "NOT_FOUND", "IMAGE_NOT_FOUND"),
        ("EraseImage", pb.EraseImageRequest(), "INVALID_ARGUMENT", "INVALID_FIELD"),
    ],
)  # fmt: skip
async def test_what_is_not_there_or_cannot_be_is_refused(
    service: Service, call: str, request_: Any, code: str, reason: str
) -> None:
    first = await stored(service)
    if call != "EraseImage":
        request_.dataset_id = first.dataset_id
    found = await refusal(getattr(service.datasets, call)(request_))
    assert (found.code.name, found.reason) == (code, reason)
    if call != "EraseImage":
        request_.dataset_id = "ds-0"
        found = await refusal(getattr(service.datasets, call)(request_))
        assert found.reason in ("DATASET_NOT_FOUND", "INVALID_FIELD")


async def test_ten_thousand_images_are_named_in_a_call(service: Service) -> None:
    first = await stored(service)
    named = [f"{n:064x}" for n in range(10_000)]
    request = pb.RemoveImagesRequest(dataset_id=first.dataset_id, digests=named)
    assert (await refusal(service.datasets.RemoveImages(request))).reason == "IMAGE_NOT_FOUND"
    relabel = pb.RelabelImagesRequest(
        dataset_id=first.dataset_id, labels=dict.fromkeys(named, "x" * 128)
    )
    found = await refusal(service.datasets.RelabelImages(relabel))
    assert found.reason == "IMAGE_NOT_FOUND"
    assert len(found.message) < 400


async def test_an_erased_image_is_in_no_answer_and_no_job_learns_from_it(
    make_service: MakeService,
) -> None:
    service = await make_service(HANG)
    first = await stored(service)
    gone = digest(pictures()[0].content)
    copies = pictures()[0]
    copies.filename = "secret name"
    again = (await service.datasets.AddImages(adding(first.dataset_id, *more(copies)))).dataset
    assert "secret name" in str(again.summary)
    erased = await service.datasets.EraseImage(pb.EraseImageRequest(image_digest=gone))
    assert list(erased.dataset_ids) == [first.dataset_id]
    assert not erased.versions
    answer = await service.datasets.GetDataset(pb.GetDatasetRequest(dataset_id=first.dataset_id))
    now = answer.dataset
    assert (now.image_count, now.erased_image_count, now.digest) == (8, 1, first.digest)
    assert "secret name" not in str(now)
    listed = await service.datasets.ListImages(pb.ListImagesRequest(dataset_id=first.dataset_id))
    (row,) = (each for each in listed.images if each.is_erased)
    assert row == pb.DatasetImage(digest=gone, label=pictures()[0].label, is_erased=True)
    request = ft.FineTuneRequest(model="colours", dataset_id=first.dataset_id)
    await service.fine_tuning.FineTune(request)
    spec = (await service.launcher.started.get()).spec
    images = index.load(Path(spec.files[spec.data.index])).images
    assert [each.digest for each in images if each.is_erased] == [gone]
    assert not any(pictures()[0].content in content for content in contents(spec))


async def test_features_of_an_erased_image_are_forgotten(service: Service) -> None:
    await stored(service)
    gone = digest(pictures()[0].content)
    file = service.data_dir / "features.sqlite"
    with sqlite3.connect(file) as connection:
        connection.executescript(
            "CREATE TABLE spaces (id INTEGER PRIMARY KEY, name TEXT);"
            "CREATE TABLE rows (id INTEGER PRIMARY KEY, space INTEGER, image TEXT);"
            "CREATE TABLE features (id INTEGER PRIMARY KEY, data BLOB);"
            "INSERT INTO spaces VALUES (1, 'd cpu'), (2, 'acme/d cpu');"
            f"INSERT INTO rows VALUES (1, 1, '{gone}'), (2, 2, '{gone}'), (3, 1, '{gone} 0 view');"
        )
    await service.datasets.EraseImage(pb.EraseImageRequest(image_digest=gone))
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT id FROM rows").fetchall() == [(2,)]
    connection.close()


async def test_a_whole_archive_s_images_can_be_listed(service: Service) -> None:
    files = {f"{label}/{n}.png": image(label, (40 + n, 40)) for label in CLASSES for n in range(2)}
    made = (await service.datasets.UploadDataset(upload(tar(files)))).dataset
    answer = await service.datasets.ListImages(
        pb.ListImagesRequest(dataset_id=made.dataset_id, page_size=1000)
    )
    assert [(each.name, each.size_bytes) for each in answer.images] == [
        (name, len(content)) for name, content in sorted(files.items())
    ]
    assert answer.next_page_token == ""
