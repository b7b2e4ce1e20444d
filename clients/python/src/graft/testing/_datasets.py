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
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from graft import _uploads
from graft.errors import InvalidArgument, NotFound, Reason
from graft.testing._models import now
from graft.testing._refusals import page, refuse
from graft.v1 import dataset_pb2 as pb
from graft.v1 import dataset_pb2_grpc

Image = tuple[str, str, bytes]
"""Split ("", "train", "val" or "test"), class, bytes."""

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
        self.images: dict[str, list[Image]] = {}
        """What was uploaded, by dataset id."""

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
        header, archive, is_whole = pb.UploadDatasetHeader(), io.BytesIO(), False
        images: list[Image] = []
        groups: list[str] = []
        left_out: list[pb.LeftOutFile] = []
        for index, message in enumerate(request_iterator):
            part = message.WhichOneof("part")
            if (part == "header") != (index == 0):
                raise _invalid("the stream must begin with the header, and hold it once")
            if part == "header":
                header = message.header
            elif part == "archive_chunk":
                archive.write(message.archive_chunk)
            elif part == "image":
                image = message.image
                images.append((_SPLITS[image.split], image.label, image.content))
                groups.append(image.group)
            elif part == "end":
                is_whole = message.end.message_count == index - 1
        if not is_whole:
            raise _invalid("the upload was cut off: it ended without the `end` that fits")
        if archive.tell():
            images, left_out = _unpack(archive.getvalue(), header.is_unlabelled)
            groups = [""] * len(images)
        return pb.UploadDatasetResponse(dataset=self._store(header, images, groups, left_out))

    def inline(self, images: Sequence[pb.LabelledImage], *, is_unlabelled: bool) -> str:
        """Stores the images of a request; returns the id of their dataset."""
        header = pb.UploadDatasetHeader(is_unlabelled=is_unlabelled)
        found = [(_SPLITS[image.split], image.label, image.content) for image in images]
        return self._store(header, found, [image.group for image in images], []).dataset_id

    def _store(
        self,
        header: pb.UploadDatasetHeader,
        images: list[Image],
        groups: list[str],
        left_out: list[pb.LeftOutFile],
    ) -> pb.Dataset:
        # The labels of an unlabelled dataset are to measure with: they are no classes.
        named = [] if header.is_unlabelled else images
        counts = Counter((label, split or "train") for split, label, _ in named if label)
        labels = sorted({label for label, _ in counts})
        if not images:
            raise refuse(InvalidArgument, Reason.DATASET_UNUSABLE, "there are no images")
        lines = sorted(
            f"{split}\0{label}\0{hashlib.sha256(content).hexdigest()}\0{group}"
            for (split, label, content), group in zip(images, groups, strict=True)
        )
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        dataset = pb.Dataset(
            dataset_id=f"ds-{digest[:16]}",
            display_name=header.display_name,
            digest=digest,
            create_time=now(),
            size_bytes=sum(len(d) for _, _, d in images),
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
            self.images[dataset.dataset_id] = images
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
            del self._datasets[request.dataset_id], self.images[request.dataset_id]
        return pb.DeleteDatasetResponse()


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
