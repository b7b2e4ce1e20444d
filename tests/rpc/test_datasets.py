"""Uploads of every kind, and archives that mean harm."""

import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator

import grpc
import pytest
from graft.v1 import dataset_pb2 as pb
from graft.v1 import fine_tuning_pb2

from tests.rpc.conftest import CLASSES, HANG, MakeService, Service, image, refusal

Files = dict[str, bytes]


def good() -> Files:
    return {f"{label}/{n}.png": image(label, (40 + n, 40)) for label in CLASSES for n in range(3)}


def tar(files: Files, mode: str = "w", extra: Iterable[tarfile.TarInfo] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return out.getvalue()


def zipped(files: Files) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def upload(
    archive: bytes, archive_format: int = 0, chunk: int = 1000
) -> Iterator[pb.UploadDatasetRequest]:
    header = pb.UploadDatasetHeader(display_name="colours", format=archive_format)  # type: ignore[arg-type]
    yield pb.UploadDatasetRequest(header=header)
    starts = range(0, len(archive), chunk)
    for start in starts:
        yield pb.UploadDatasetRequest(archive_chunk=archive[start : start + chunk])
    yield end(len(starts))


def end(count: int) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(end=pb.UploadDatasetEnd(message_count=count))


@pytest.mark.parametrize(
    ("make", "archive_format"),
    [
        (tar, pb.ARCHIVE_FORMAT_TAR),
        (lambda files: tar(files, "w:gz"), pb.ARCHIVE_FORMAT_TAR_GZ),
        (zipped, pb.ARCHIVE_FORMAT_ZIP),
        (zipped, pb.ARCHIVE_FORMAT_UNSPECIFIED),
        (lambda files: tar(files, "w:gz"), pb.ARCHIVE_FORMAT_UNSPECIFIED),
    ],
)
async def test_an_archive_of_every_kind_becomes_the_same_dataset(
    service: Service, make: object, archive_format: int
) -> None:
    data = make({**good(), "red/notes.txt": b"not an image"})  # type: ignore[operator]
    answer = await service.datasets.UploadDataset(upload(data, archive_format))
    dataset = answer.dataset
    assert dataset.dataset_id == f"ds-{dataset.digest[:20]}"
    assert [(c.label, c.train_count) for c in dataset.classes] == [(c, 3) for c in CLASSES]
    assert (dataset.image_count, dataset.rejected_count) == (9, 1)
    assert dataset.rejected_files[0].path == "red/notes.txt"
    assert not dataset.has_validation_split
    again = await service.datasets.GetDataset(pb.GetDatasetRequest(dataset_id=dataset.dataset_id))
    assert again.dataset == dataset


async def test_images_sent_one_by_one_name_their_split(service: Service) -> None:
    def messages() -> Iterator[pb.UploadDatasetRequest]:
        yield pb.UploadDatasetRequest(header=pb.UploadDatasetHeader())
        for label in CLASSES:
            for n, split in enumerate((pb.SPLIT_TRAIN, pb.SPLIT_TRAIN, pb.SPLIT_VALIDATION)):
                yield pb.UploadDatasetRequest(
                    image=pb.LabelledImage(
                        label=label, content=image(label, (20 + n, 20)), split=split
                    )
                )
        yield end(3 * len(CLASSES))

    dataset = (await service.datasets.UploadDataset(messages())).dataset
    assert dataset.has_validation_split
    assert [(c.train_count, c.validation_count) for c in dataset.classes] == [(2, 1)] * 3


async def test_a_dataset_is_fine_tuned_on_listed_and_deleted(service: Service) -> None:
    dataset = (await service.datasets.UploadDataset(upload(tar(good())))).dataset
    again = (await service.datasets.UploadDataset(upload(zipped(good())))).dataset
    assert again == dataset
    started = await service.fine_tuning.FineTune(
        fine_tuning_pb2.FineTuneRequest(model="colours", dataset_id=dataset.dataset_id)
    )
    job = await service.ended(started.job.job_id)
    assert job.state == fine_tuning_pb2.JOB_STATE_SUCCEEDED
    listed = await service.datasets.ListDatasets(pb.ListDatasetsRequest())
    assert list(listed.datasets) == [dataset]
    await service.datasets.DeleteDataset(pb.DeleteDatasetRequest(dataset_id=dataset.dataset_id))
    found = await refusal(
        service.datasets.GetDataset(pb.GetDatasetRequest(dataset_id=dataset.dataset_id))
    )
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND")


async def test_a_dataset_that_a_job_needs_is_not_deleted(make_service: MakeService) -> None:
    service: Service = await make_service(HANG)
    dataset = (await service.datasets.UploadDataset(upload(tar(good())))).dataset
    await service.fine_tuning.FineTune(
        fine_tuning_pb2.FineTuneRequest(model="m", dataset_id=dataset.dataset_id)
    )
    request = pb.DeleteDatasetRequest(dataset_id=dataset.dataset_id)
    found = await refusal(service.datasets.DeleteDataset(request))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DATASET_IN_USE")


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


HARMFUL: dict[str, bytes] = {
    "parent in a tar": tar({**good(), "../evil.png": b"x"}),
    "parent in a zip": zipped({**good(), "red/../../evil.png": b"x"}),
    "absolute in a tar": tar({**good(), "/etc/evil.png": b"x"}),
    "absolute in a zip": zipped({**good(), "/etc/evil.png": b"x"}),
    "drive in a zip": zipped({**good(), "C:\\evil.png": b"x"}),
    "symbolic link": tar(good(), extra=[entry("red/link", tarfile.SYMTYPE, "/etc/passwd")]),
    "hard link": tar(good(), extra=[entry("red/link", tarfile.LNKTYPE, "red/0.png")]),
    "device": tar(good(), extra=[entry("red/null", tarfile.CHRTYPE)]),
}


@pytest.mark.parametrize("harm", HARMFUL)
async def test_an_archive_that_could_write_elsewhere_is_refused(
    service: Service, harm: str
) -> None:
    found = await refusal(service.datasets.UploadDataset(upload(HARMFUL[harm])))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ARCHIVE_UNSAFE")
    assert not list(service.data_dir.parent.rglob("evil.png"))
    kept = await service.datasets.ListDatasets(pb.ListDatasetsRequest())
    assert not kept.datasets


@pytest.mark.parametrize("make", [zipped, lambda files: tar(files, "w:gz")])
async def test_a_bomb_stops_at_the_bound(make_service: MakeService, make: object) -> None:
    service: Service = await make_service(max_unpacked_mb=1)
    bomb = make({**good(), "red/bomb.png": bytes(50 * 2**20)})  # type: ignore[operator]
    found = await refusal(service.datasets.UploadDataset(upload(bomb, chunk=2**16)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ARCHIVE_TOO_LARGE")
    assert not [p for p in (service.data_dir / "datasets").rglob("*") if p.is_file()]


async def test_more_files_than_allowed_are_refused(make_service: MakeService) -> None:
    service: Service = await make_service(max_dataset_files=5)
    found = await refusal(service.datasets.UploadDataset(upload(tar(good()))))
    assert found.reason == "ARCHIVE_TOO_LARGE"


async def test_bytes_that_are_no_whole_archive_are_refused(service: Service) -> None:
    whole = tar(good(), "w:gz")
    for data in (b"hello", b"", whole[: len(whole) // 2], zipped(good())[:-30]):
        found = await refusal(service.datasets.UploadDataset(upload(data)))
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT
        assert found.reason in ("ARCHIVE_UNREADABLE", "DATASET_UNUSABLE", "INVALID_FIELD")


async def test_one_class_only_is_refused(service: Service) -> None:
    files = {f"red/{n}.png": image("red", (30 + n, 30)) for n in range(4)}
    found = await refusal(service.datasets.UploadDataset(upload(tar(files))))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE")


async def test_streams_out_of_order_are_refused(service: Service) -> None:
    header = pb.UploadDatasetRequest(header=pb.UploadDatasetHeader())
    chunk = pb.UploadDatasetRequest(archive_chunk=b"x")
    one = pb.UploadDatasetRequest(image=pb.LabelledImage(label="red", content=image("red")))
    empty = pb.UploadDatasetRequest()
    for messages in (
        [],
        [chunk],
        [header, header],
        [header, chunk, one, end(2)],
        [header, empty],
    ):
        found = await refusal(service.datasets.UploadDataset(iter(messages)))
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT, messages
    kept = await service.datasets.ListDatasets(pb.ListDatasetsRequest())
    assert not kept.datasets
    assert not list((service.data_dir / "datasets" / "tmp").iterdir())


async def test_an_upload_that_was_cut_off_stores_nothing(service: Service) -> None:
    whole = [
        pb.UploadDatasetRequest(header=pb.UploadDatasetHeader()),
        *(
            pb.UploadDatasetRequest(
                image=pb.LabelledImage(label=label, content=image(label, (20 + n, 20)))
            )
            for label in CLASSES
            for n in range(3)
        ),
        end(9),
    ]
    # Without its end, and with images missing before it.
    for messages in (whole[:-1], [*whole[:4], whole[-1]]):
        found = await refusal(service.datasets.UploadDataset(iter(messages)))
        assert (found.code, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, "end")
        assert "cut off" in found.message
    kept = await service.datasets.ListDatasets(pb.ListDatasetsRequest())
    assert not kept.datasets
    assert (await service.datasets.UploadDataset(iter(whole))).dataset.image_count == 9
