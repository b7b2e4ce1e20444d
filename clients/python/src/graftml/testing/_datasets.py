"""DatasetService, in memory: archives are unpacked and counted, images are not decoded.

Hidden files, files of systems, links and what lies beside the classes are left out, as the
service does.
"""

# ruff: noqa: ARG002, N802 - a servicer has gRPC's names and takes what gRPC gives

import hashlib
import io
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from graftml_stubs.v1 import dataset_pb2 as pb
from graftml_stubs.v1 import dataset_pb2_grpc

from graftml import _uploads
from graftml.errors import InvalidArgument, NotFound, Reason
from graftml.testing._models import now
from graftml.testing._refusals import page, refuse

Image = tuple[str, str, bytes]
"""Split ("", "train", "val" or "test"), class, bytes."""


class _Stored(NamedTuple):
    split: str
    label: str
    content: bytes
    group: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


_SPLITS = {
    pb.SPLIT_UNSPECIFIED: "",
    pb.SPLIT_TRAIN: "train",
    pb.SPLIT_VALIDATION: "val",
    pb.SPLIT_TEST: "test",
}


class Datasets(dataset_pb2_grpc.DatasetServiceServicer):
    """Datasets by id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._datasets: dict[str, pb.Dataset] = {}
        self._images: dict[str, list[_Stored]] = {}
        self._erased: set[str] = set()
        """Digests of the images that were erased."""

    def images(self, dataset_id: str) -> list[Image]:
        """Returns what was uploaded."""
        return [image[:3] for image in self._images[dataset_id]]

    def get(self, dataset_id: str, field: str = "dataset_id") -> pb.Dataset:
        """The dataset, or the service's error."""
        with self._lock:
            if dataset_id not in self._datasets:
                message = f"there is no {dataset_id!r}"
                raise refuse(NotFound, Reason.DATASET_NOT_FOUND, message, field)
            return self._datasets[dataset_id]

    def labelled(self, dataset_id: str, *, is_alone: bool = True) -> pb.Dataset:
        """Returns the dataset; raises the service's error where there is none to learn from.

        One that `is_alone`, without a base, needs two classes.
        """
        dataset = self.get(dataset_id)
        if is_alone and not dataset.is_unlabelled and len(dataset.classes) < 2:
            raise refuse(
                InvalidArgument,
                Reason.DATASET_UNUSABLE,
                f"the images are of {len(dataset.classes)} class, and 2 are needed to tell apart",
                "dataset_id",
            )
        if dataset.is_unlabelled:
            raise refuse(
                InvalidArgument,
                Reason.DATASET_UNUSABLE,
                f"{dataset_id!r} is unlabelled: it can be the target of a domain adaptation alone",
                "dataset_id",
            )
        return dataset

    def UploadDataset(
        self, request_iterator: Iterator[pb.UploadDatasetRequest], context: Any
    ) -> pb.UploadDatasetResponse:
        header, images, left_out = _received(request_iterator, lambda header: header.is_unlabelled)
        return pb.UploadDatasetResponse(dataset=self._store(header, images, left_out))

    def AddImages(
        self, request_iterator: Iterator[pb.AddImagesRequest], context: Any
    ) -> pb.AddImagesResponse:
        header, images, left_out = _received(
            request_iterator, lambda header: self.get(header.dataset_id).is_unlabelled
        )
        kept = self._images[header.dataset_id]
        digests = {image.digest for image in kept}
        left_out += [_left_out(i.label, "COPY") for i in images if i.digest in digests]
        added = [image for image in images if image.digest not in digests]
        made = self._made_of(header.dataset_id, header.display_name, [*kept, *added], left_out)
        return pb.AddImagesResponse(dataset=made)

    def RemoveImages(
        self, request: pb.RemoveImagesRequest, context: Any
    ) -> pb.RemoveImagesResponse:
        images = self._known(request.dataset_id, request.digests)
        kept = [image for image in images if image.digest not in request.digests]
        made = self._made_of(request.dataset_id, request.display_name, kept)
        return pb.RemoveImagesResponse(dataset=made)

    def RelabelImages(
        self, request: pb.RelabelImagesRequest, context: Any
    ) -> pb.RelabelImagesResponse:
        labels = request.labels
        images = [
            image._replace(label=labels.get(image.digest, image.label))
            for image in self._known(request.dataset_id, labels)
        ]
        made = self._made_of(request.dataset_id, request.display_name, images)
        return pb.RelabelImagesResponse(dataset=made)

    def ListImages(self, request: pb.ListImagesRequest, context: Any) -> pb.ListImagesResponse:
        self.get(request.dataset_id)
        images = [self._listed(image) for image in self._images[request.dataset_id]]
        items, token = page(images, request.page_size, request.page_token)
        return pb.ListImagesResponse(images=items, next_page_token=token)

    def EraseImage(self, request: pb.EraseImageRequest, context: Any) -> pb.EraseImageResponse:
        digest = request.image_digest
        found = [key for key, images in self._images.items() if digest in _digests(images)]
        if not found:
            raise _no_image(digest)
        with self._lock:
            self._erased.add(digest)
            for key in found:
                erased = len(_digests(self._images[key]) & self._erased)
                dataset = self._datasets[key]
                dataset.image_count = len(self._images[key]) - erased
                dataset.erased_image_count = erased
        return pb.EraseImageResponse(dataset_ids=found)

    def _known(self, dataset_id: str, digests: Iterable[str]) -> list[_Stored]:
        """Returns the images of a dataset that has all those of some digests."""
        self.get(dataset_id)
        images = self._images[dataset_id]
        if unknown := sorted({*digests} - _digests(images)):
            raise _no_image(unknown[0])
        return images

    def _listed(self, image: _Stored) -> pb.DatasetImage:
        is_erased = image.digest in self._erased
        return pb.DatasetImage(
            digest=image.digest,
            label=image.label,
            split=next(key for key, split in _SPLITS.items() if split == image.split),
            group=image.group,
            size_bytes=0 if is_erased else len(image.content),
            is_erased=is_erased,
        )

    def _made_of(
        self,
        dataset_id: str,
        display_name: str,
        images: list[_Stored],
        left_out: list[pb.LeftOutFile] | None = None,
    ) -> pb.Dataset:
        base = self.get(dataset_id)
        header = pb.UploadDatasetHeader(
            display_name=display_name or base.display_name,
            is_unlabelled=base.is_unlabelled,
            case_sensitive_labels=base.case_sensitive_labels,
        )
        return self._store(header, images, left_out or [])

    def inline(self, images: Sequence[pb.LabelledImage], *, is_unlabelled: bool) -> str:
        """Stores the images of a request; returns the id of their dataset."""
        header = pb.UploadDatasetHeader(is_unlabelled=is_unlabelled)
        return self._store(header, [_stored(image) for image in images], []).dataset_id

    def _store(
        self,
        header: pb.UploadDatasetHeader,
        images: list[_Stored],
        left_out: list[pb.LeftOutFile],
    ) -> pb.Dataset:
        # The labels of an unlabelled dataset are to measure with: they are no classes.
        named = [] if header.is_unlabelled else images
        counts = Counter((i.label, i.split or "train") for i in named if i.label)
        labels = sorted({label for label, _ in counts})
        if not images:
            raise refuse(InvalidArgument, Reason.DATASET_UNUSABLE, "there are no images")
        lines = sorted(f"{i.split}\0{i.label}\0{i.digest}\0{i.group}" for i in images)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        dataset = pb.Dataset(
            dataset_id=f"ds-{digest[:16]}",
            display_name=header.display_name,
            digest=digest,
            create_time=now(),
            size_bytes=sum(len(image.content) for image in images),
            classes=[
                pb.ClassCount(
                    label=label,
                    train_count=counts[label, "train"],
                    validation_count=counts[label, "val"],
                    test_count=counts[label, "test"],
                )
                for label in labels
            ],
            image_count=len(images),
            summary=_summary(len(images), left_out),
            is_unlabelled=header.is_unlabelled,
            case_sensitive_labels=header.case_sensitive_labels,
        )
        with self._lock:
            self._images[dataset.dataset_id] = images
            known = self._datasets.setdefault(dataset.dataset_id, dataset)
            known.display_name = header.display_name or known.display_name
            known.summary.CopyFrom(dataset.summary)
            known.case_sensitive_labels |= header.case_sensitive_labels
            return known

    def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.GetDatasetResponse:
        return pb.GetDatasetResponse(dataset=self.get(request.dataset_id))

    def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Any
    ) -> pb.ListDatasetsResponse:
        with self._lock:
            newest_first: list[Any] = list(reversed(self._datasets.values()))
        items, token = page(newest_first, request.page_size, request.page_token)
        return pb.ListDatasetsResponse(datasets=items, next_page_token=token)

    def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: Any
    ) -> pb.DeleteDatasetResponse:
        self.get(request.dataset_id)
        with self._lock:
            del self._datasets[request.dataset_id], self._images[request.dataset_id]
        return pb.DeleteDatasetResponse()


def _received(
    requests: Iterator[Any], is_unlabelled: Callable[[Any], bool]
) -> tuple[Any, list[_Stored], list[pb.LeftOutFile]]:
    """Returns the header of a stream, its images and what is left out of them."""
    header, archive, is_whole = None, io.BytesIO(), False
    images: list[_Stored] = []
    left_out: list[pb.LeftOutFile] = []
    for index, message in enumerate(requests):
        part = message.WhichOneof("part")
        if (part == "header") != (index == 0):
            raise _invalid("the stream must begin with the header, and hold it once")
        if part == "header":
            header = message.header
        elif part == "archive_chunk":
            archive.write(message.archive_chunk)
        elif part == "image":
            images.append(_stored(message.image))
        elif part == "end":
            is_whole = message.end.message_count == index - 1
    if not is_whole:
        raise _invalid("the upload was cut off: it ended without the `end` that fits")
    if archive.tell():
        found, left_out = _unpack(archive.getvalue(), is_unlabelled(header))
        images = [_Stored(*image) for image in found]
    return header, images, left_out


def _stored(image: pb.LabelledImage) -> _Stored:
    return _Stored(_SPLITS[image.split], image.label, image.content, image.group)


def _digests(images: list[_Stored]) -> set[str]:
    return {image.digest for image in images}


def _no_image(digest: str) -> Exception:
    return refuse(NotFound, Reason.IMAGE_NOT_FOUND, f"there is no image {digest!r}")


def _unpack(archive: bytes, is_unlabelled: bool) -> tuple[list[Image], list[pb.LeftOutFile]]:
    left_out: list[pb.LeftOutFile] = []
    try:
        if zipfile.is_zipfile(io.BytesIO(archive)):
            with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
                entries = [(n, zipped.read(n)) for n in zipped.namelist() if not n.endswith("/")]
        else:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                members = [member for member in tar if not member.isdir()]
                left_out += [_left_out(m.name, "LINK") for m in members if not m.isfile()]
                entries = [(m.name, _content(tar, m)) for m in members if m.isfile()]
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise refuse(
            InvalidArgument, Reason.ARCHIVE_UNREADABLE, f"the archive cannot be read: {error}"
        ) from error
    files = []
    for name, data in entries:
        names = PurePosixPath(name).parts
        if noise := next(filter(_uploads.is_noise, names), ""):
            left_out.append(_left_out(name, "HIDDEN" if noise.startswith(".") else "SYSTEM"))
        else:
            files.append((names, data))
    if is_unlabelled:
        return [("", "", data) for _, data in files], left_out
    has_splits = len({names[0] for names, _ in files} & {"train", "val", "test"}) > 1
    images = []
    for names, data in files:
        if len(names) <= (2 if has_splits else 1):
            left_out.append(_left_out("/".join(names), "STRAY"))
        else:
            images.append((names[0], names[1], data) if has_splits else ("", names[0], data))
    return images, left_out


def _left_out(path: str, reason: str) -> pb.LeftOutFile:
    return pb.LeftOutFile(path=path, reason=f"LEFT_OUT_REASON_{reason}", detail=reason.lower())


def _summary(used: int, left_out: list[pb.LeftOutFile]) -> pb.ReadSummary:
    counts = Counter(file.reason for file in left_out)
    return pb.ReadSummary(
        seen_count=used + len(left_out),
        used_count=used,
        left_out=[pb.LeftOut(reason=r, count=n) for r, n in sorted(counts.items())],
        left_out_files=left_out[:100],
    )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _invalid(message: str) -> Exception:
    return refuse(InvalidArgument, Reason.INVALID_FIELD, message, "part")
