"""Uploads of every kind, and archives that mean harm."""

import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import grpc
import pytest
from graftml_stubs.v1 import dataset_pb2 as pb
from graftml_stubs.v1 import fine_tuning_pb2

from service.rpc.codec.datasets import read_summary
from tests.rpc.conftest import CLASSES, HANG, SUMMARY, MakeService, Service, image, refusal

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
    archive: bytes, archive_format: int = 0, chunk: int = 1000, name: str = "colours"
) -> Iterator[pb.UploadDatasetRequest]:
    header = pb.UploadDatasetHeader(display_name=name, format=archive_format)  # type: ignore[arg-type]
    yield pb.UploadDatasetRequest(header=header)
    starts = range(0, len(archive), chunk)
    for start in starts:
        yield pb.UploadDatasetRequest(archive_chunk=archive[start : start + chunk])
    yield end(len(starts))


def end(count: int) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(end=pb.UploadDatasetEnd(message_count=count))


def one_by_one(
    images: Sequence[pb.LabelledImage], **header: bool
) -> Iterator[pb.UploadDatasetRequest]:
    yield pb.UploadDatasetRequest(header=pb.UploadDatasetHeader(**header))
    for labelled in images:
        yield pb.UploadDatasetRequest(image=labelled)
    yield end(len(images))


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


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
    assert dataset.image_count == 9
    [file] = dataset.summary.left_out_files
    assert file.detail
    wrong = pb.LEFT_OUT_REASON_WRONG_FORMAT
    assert dataset.summary == pb.ReadSummary(
        seen_count=10,
        used_count=9,
        left_out=[pb.LeftOut(reason=wrong, label="red", count=1)],
        left_out_files=[
            pb.LeftOutFile(path="red/notes.txt", label="red", reason=wrong, detail=file.detail)
        ],
    )
    again = await service.datasets.GetDataset(pb.GetDatasetRequest(dataset_id=dataset.dataset_id))
    assert again.dataset == dataset


async def test_what_is_left_out_of_an_upload_is_told_with_its_reason(service: Service) -> None:
    link = entry("green/link.png", tarfile.SYMTYPE, "/etc/passwd")
    data = tar(
        {
            **good(),
            "red/deep/er.png": image("red", (9, 9)),
            "red/.hidden.png": b"",
            "Thumbs.db": b"",
            "readme.txt": b"words",
            "blue/bad.png": image("blue")[:-30],
            "blue/again.png": good()["blue/0.png"],
        },
        extra=[link],
    )
    summary = (await service.datasets.UploadDataset(upload(data))).dataset.summary
    assert (summary.seen_count, summary.used_count, summary.nested_count) == (16, 10, 1)
    assert {(row.reason, row.label, row.count) for row in summary.left_out} == {
        (pb.LEFT_OUT_REASON_HIDDEN, "", 1),
        (pb.LEFT_OUT_REASON_SYSTEM, "", 1),
        (pb.LEFT_OUT_REASON_STRAY, "", 1),
        (pb.LEFT_OUT_REASON_LINK, "green", 1),
        (pb.LEFT_OUT_REASON_UNREADABLE, "blue", 1),
        (pb.LEFT_OUT_REASON_COPY, "blue", 1),
    }
    assert {file.path for file in summary.left_out_files} == {
        "red/.hidden.png",
        "Thumbs.db",
        "readme.txt",
        "green/link.png",
        "blue/bad.png",
        "blue/again.png",
    }
    assert all(file.detail for file in summary.left_out_files)


async def test_images_sent_one_by_one_name_their_split(service: Service) -> None:
    splits = (pb.SPLIT_TRAIN, pb.SPLIT_TRAIN, pb.SPLIT_VALIDATION, pb.SPLIT_TEST)
    images = [
        pb.LabelledImage(label=label, content=image(label, (20 + n, 20)), split=split)
        for label in CLASSES
        for n, split in enumerate(splits)
    ]
    dataset = (await service.datasets.UploadDataset(one_by_one(images))).dataset
    counts = [(c.train_count, c.validation_count, c.test_count) for c in dataset.classes]
    assert counts == [(2, 1, 1)] * 3
    packed = tar(
        {
            f"{part}/{image.label}/{n}.png": image.content
            for n, image in enumerate(images)
            for part in [{1: "train", 2: "Validation", 3: "testing"}[image.split]]
        }
    )
    again = (await service.datasets.UploadDataset(upload(packed))).dataset
    assert again.dataset_id == dataset.dataset_id


async def test_labels_that_differ_in_case_alone_are_two_classes_for_who_says_so(
    service: Service,
) -> None:
    images = [
        pb.LabelledImage(label=label, content=image(label, (20 + n, 20)))
        for label in ("red", "Red")
        for n in range(label == "Red", 6, 2)
    ]
    found = await refusal(service.datasets.UploadDataset(one_by_one(images)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE")
    assert "'red' and 'Red'" in found.message
    assert "case_sensitive_labels" in found.message
    answer = await service.datasets.UploadDataset(one_by_one(images, case_sensitive_labels=True))
    assert answer.dataset.case_sensitive_labels
    assert [c.label for c in answer.dataset.classes] == ["Red", "red"]

    inline = fine_tuning_pb2.InlineImages(images=images)
    request = fine_tuning_pb2.FineTuneRequest(model="m", inline_images=inline)
    found = await refusal(service.fine_tuning.FineTune(request))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE")
    request.case_sensitive_labels = True
    started = await service.fine_tuning.FineTune(request)
    assert started.job.request.case_sensitive_labels
    assert started.job.request.dataset_id == answer.dataset.dataset_id
    await service.ended(started.job.job_id)
    assert service.launcher.trainers[0].spec.case_sensitive_labels


async def test_a_jobs_summary_is_in_its_events_and_stays_with_it(service: Service) -> None:
    job = await service.make_model()
    watching = service.fine_tuning.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id=job.job_id))
    [told] = [event.event.data async for event in watching if event.event.HasField("data")]
    assert told.summary == read_summary(SUMMARY)
    assert told.summary.seen_count == 10
    assert job.data_summary == told.summary


async def test_the_same_images_again_give_the_dataset_a_new_name_and_summary(
    service: Service,
) -> None:
    first = (await service.datasets.UploadDataset(upload(tar(good())))).dataset
    data = zipped({**good(), "red/notes.txt": b"not an image"})
    second = (await service.datasets.UploadDataset(upload(data, name="again"))).dataset
    assert (second.dataset_id, second.create_time) == (first.dataset_id, first.create_time)
    assert (second.display_name, second.summary.seen_count) == ("again", 10)
    listed = await service.datasets.ListDatasets(pb.ListDatasetsRequest())
    assert list(listed.datasets) == [second]
    # A name is kept where the last upload brings none.
    last = (await service.datasets.UploadDataset(upload(tar(good()), name=""))).dataset
    assert (last.display_name, last.summary) == ("again", first.summary)


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
    again = (await service.datasets.UploadDataset(upload(tar(good())))).dataset
    assert again.dataset_id == dataset.dataset_id


async def test_a_dataset_that_a_job_needs_is_not_deleted(make_service: MakeService) -> None:
    service: Service = await make_service(HANG)
    dataset = (await service.datasets.UploadDataset(upload(tar(good())))).dataset
    await service.fine_tuning.FineTune(
        fine_tuning_pb2.FineTuneRequest(model="m", dataset_id=dataset.dataset_id)
    )
    request = pb.DeleteDatasetRequest(dataset_id=dataset.dataset_id)
    found = await refusal(service.datasets.DeleteDataset(request))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "DATASET_IN_USE")


HARMFUL: dict[str, bytes] = {
    "parent in a tar": tar({**good(), "../evil.png": b"x"}),
    "parent in a zip": zipped({**good(), "red/../../evil.png": b"x"}),
    "absolute in a tar": tar({**good(), "/etc/evil.png": b"x"}),
    "absolute in a zip": zipped({**good(), "/etc/evil.png": b"x"}),
    "drive in a zip": zipped({**good(), "C:\\evil.png": b"x"}),
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


async def test_links_and_devices_of_an_archive_are_left_out_and_too_many_refuse_it(
    service: Service,
) -> None:
    strange = [
        entry("red/link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("red/hard", tarfile.LNKTYPE, "red/0.png"),
        entry("red/null", tarfile.CHRTYPE),
    ]
    dataset = (await service.datasets.UploadDataset(upload(tar(good(), extra=strange)))).dataset
    assert dataset.image_count == 9
    link = pb.LEFT_OUT_REASON_LINK
    assert list(dataset.summary.left_out) == [pb.LeftOut(reason=link, label="red", count=3)]
    more = [entry(f"blue/{n}", tarfile.SYMTYPE, "/etc/passwd") for n in range(2)]
    found = await refusal(service.datasets.UploadDataset(upload(tar(good(), extra=strange + more))))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE")
    assert "red/null" in found.message


@pytest.mark.parametrize("make", [zipped, lambda files: tar(files, "w:gz")])
async def test_a_bomb_stops_at_the_bound(make_service: MakeService, make: object) -> None:
    service: Service = await make_service(max_unpacked_mb=1)
    bomb = make({**good(), "red/bomb.png": bytes(50 * 2**20)})  # type: ignore[operator]
    found = await refusal(service.datasets.UploadDataset(upload(bomb, chunk=2**16)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ARCHIVE_TOO_LARGE")
    assert not list((service.data_dir / "uploads").iterdir())


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


async def test_one_class_alone_is_a_dataset_that_a_version_grows_by_and_none_is_made_of(
    service: Service,
) -> None:
    await service.make_model()
    files = {f"red/{n}.png": image("red", (30 + n, 30)) for n in range(4)}
    dataset = (await service.datasets.UploadDataset(upload(tar(files)))).dataset
    assert [(c.label, c.train_count) for c in dataset.classes] == [("red", 4)]
    request = fine_tuning_pb2.FineTuneRequest(model="colours", dataset_id=dataset.dataset_id)
    ranked = fine_tuning_pb2.RankBackbonesRequest(dataset_id=dataset.dataset_id)
    for call in (
        service.fine_tuning.FineTune(request),
        service.fine_tuning.RankBackbones(ranked),
    ):
        found = await refusal(call)
        assert (found.code, found.reason, found.field) == (
            grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE", "dataset_id",
        )  # fmt: skip
        assert "'red'" in found.message
    request.base.SetInParent()
    started = await service.fine_tuning.FineTune(request)
    job = await service.ended(started.job.job_id)
    assert job.state == fine_tuning_pb2.JOB_STATE_SUCCEEDED


async def test_a_class_without_images_is_refused_by_its_name(service: Service) -> None:
    data = tar(good(), extra=[entry("white", tarfile.DIRTYPE)])
    found = await refusal(service.datasets.UploadDataset(upload(data)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_UNUSABLE")
    assert "'white'" in found.message


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
    assert not list((service.data_dir / "uploads").iterdir())


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
