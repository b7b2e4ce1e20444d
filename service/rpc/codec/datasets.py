"""Datasets as messages, and what an upload's header names."""

from graftml_stubs.v1 import dataset_pb2 as pb

from service.domain import ClassCount, LeftOutReason, PartName, ReadSummary
from service.errors import bad_field
from service.ingest.archives import ArchiveFormat
from service.ingest.index import IndexedImage
from service.rpc.codec.models import timestamp
from service.storage.dataset_rows import DatasetRecord

SPLITS: dict[int, PartName] = {
    pb.SPLIT_UNSPECIFIED: "",
    pb.SPLIT_TRAIN: "train",
    pb.SPLIT_VALIDATION: "val",
    pb.SPLIT_TEST: "test",
}
_SPLITS_BY_PART = {part: pb.Split.Name(split) for split, part in SPLITS.items()}
_REASONS = {reason: f"LEFT_OUT_REASON_{reason.name}" for reason in LeftOutReason}

_ARCHIVE_FORMATS: dict[int, ArchiveFormat] = {
    pb.ARCHIVE_FORMAT_UNSPECIFIED: "",
    pb.ARCHIVE_FORMAT_TAR: "tar",
    pb.ARCHIVE_FORMAT_TAR_GZ: "tar.gz",
    pb.ARCHIVE_FORMAT_ZIP: "zip",
}


def archive_format(value: int) -> ArchiveFormat:
    """Reads a number of ArchiveFormat; raises InvalidInput for one that names no format."""
    if value not in _ARCHIVE_FORMATS:
        raise bad_field(
            "header.format", f"header.format {value} is none: use a value of ArchiveFormat"
        )
    return _ARCHIVE_FORMATS[value]


def class_counts(counts: list[ClassCount]) -> list[pb.ClassCount]:
    return [
        pb.ClassCount(
            label=count.label,
            train_count=count.train,
            validation_count=count.validation,
            test_count=count.test,
        )
        for count in counts
    ]


def read_summary(summary: ReadSummary) -> pb.ReadSummary:
    return pb.ReadSummary(
        seen_count=summary.seen,
        used_count=summary.used,
        left_out=[
            pb.LeftOut(reason=_REASONS[row.reason], label=row.label, count=row.count)
            for row in summary.left_out
        ],
        left_out_files=[
            pb.LeftOutFile(
                path=file.path, label=file.label, reason=_REASONS[file.reason], detail=file.detail
            )
            for file in summary.files
        ],
        nested_count=summary.nested,
        warnings=summary.warnings,
    )


def dataset(record: DatasetRecord) -> pb.Dataset:
    return pb.Dataset(
        dataset_id=record.dataset_id,
        display_name=record.display_name,
        digest=record.digest,
        create_time=timestamp(record.create_time_s),
        size_bytes=record.size_bytes,
        classes=class_counts(record.classes),
        image_count=record.image_count,
        summary=read_summary(record.summary),
        is_unlabelled=record.is_unlabelled,
        case_sensitive_labels=record.case_sensitive,
        erased_image_count=record.erased_count,
    )


def image(indexed: IndexedImage) -> pb.DatasetImage:
    return pb.DatasetImage(
        digest=indexed.digest,
        name=indexed.name,
        label=indexed.label,
        split=_SPLITS_BY_PART[indexed.part],
        group=indexed.group,
        size_bytes=indexed.size,
        is_erased=indexed.is_erased,
    )
