import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Split(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SPLIT_UNSPECIFIED: _ClassVar[Split]
    SPLIT_TRAIN: _ClassVar[Split]
    SPLIT_VALIDATION: _ClassVar[Split]
    SPLIT_TEST: _ClassVar[Split]

class ArchiveFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ARCHIVE_FORMAT_UNSPECIFIED: _ClassVar[ArchiveFormat]
    ARCHIVE_FORMAT_TAR: _ClassVar[ArchiveFormat]
    ARCHIVE_FORMAT_TAR_GZ: _ClassVar[ArchiveFormat]
    ARCHIVE_FORMAT_ZIP: _ClassVar[ArchiveFormat]

class LeftOutReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEFT_OUT_REASON_UNSPECIFIED: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_UNREADABLE: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_WRONG_FORMAT: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_LINK: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_HIDDEN: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_SYSTEM: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_STRAY: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_COPY: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_CONTRADICTION: _ClassVar[LeftOutReason]
    LEFT_OUT_REASON_ERASED: _ClassVar[LeftOutReason]
SPLIT_UNSPECIFIED: Split
SPLIT_TRAIN: Split
SPLIT_VALIDATION: Split
SPLIT_TEST: Split
ARCHIVE_FORMAT_UNSPECIFIED: ArchiveFormat
ARCHIVE_FORMAT_TAR: ArchiveFormat
ARCHIVE_FORMAT_TAR_GZ: ArchiveFormat
ARCHIVE_FORMAT_ZIP: ArchiveFormat
LEFT_OUT_REASON_UNSPECIFIED: LeftOutReason
LEFT_OUT_REASON_UNREADABLE: LeftOutReason
LEFT_OUT_REASON_WRONG_FORMAT: LeftOutReason
LEFT_OUT_REASON_LINK: LeftOutReason
LEFT_OUT_REASON_HIDDEN: LeftOutReason
LEFT_OUT_REASON_SYSTEM: LeftOutReason
LEFT_OUT_REASON_STRAY: LeftOutReason
LEFT_OUT_REASON_COPY: LeftOutReason
LEFT_OUT_REASON_CONTRADICTION: LeftOutReason
LEFT_OUT_REASON_ERASED: LeftOutReason

class LabelledImage(_message.Message):
    __slots__ = ("label", "content", "filename", "split", "group")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FILENAME_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    label: str
    content: bytes
    filename: str
    split: Split
    group: str
    def __init__(self, label: _Optional[str] = ..., content: _Optional[bytes] = ..., filename: _Optional[str] = ..., split: _Optional[_Union[Split, str]] = ..., group: _Optional[str] = ...) -> None: ...

class UploadDatasetHeader(_message.Message):
    __slots__ = ("display_name", "format", "is_unlabelled", "case_sensitive_labels")
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    IS_UNLABELLED_FIELD_NUMBER: _ClassVar[int]
    CASE_SENSITIVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    display_name: str
    format: ArchiveFormat
    is_unlabelled: bool
    case_sensitive_labels: bool
    def __init__(self, display_name: _Optional[str] = ..., format: _Optional[_Union[ArchiveFormat, str]] = ..., is_unlabelled: _Optional[bool] = ..., case_sensitive_labels: _Optional[bool] = ...) -> None: ...

class UploadDatasetEnd(_message.Message):
    __slots__ = ("message_count",)
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    message_count: int
    def __init__(self, message_count: _Optional[int] = ...) -> None: ...

class UploadDatasetRequest(_message.Message):
    __slots__ = ("header", "archive_chunk", "image", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ARCHIVE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: UploadDatasetHeader
    archive_chunk: bytes
    image: LabelledImage
    end: UploadDatasetEnd
    def __init__(self, header: _Optional[_Union[UploadDatasetHeader, _Mapping]] = ..., archive_chunk: _Optional[bytes] = ..., image: _Optional[_Union[LabelledImage, _Mapping]] = ..., end: _Optional[_Union[UploadDatasetEnd, _Mapping]] = ...) -> None: ...

class UploadDatasetResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class ClassCount(_message.Message):
    __slots__ = ("label", "train_count", "validation_count", "test_count")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    TRAIN_COUNT_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_COUNT_FIELD_NUMBER: _ClassVar[int]
    TEST_COUNT_FIELD_NUMBER: _ClassVar[int]
    label: str
    train_count: int
    validation_count: int
    test_count: int
    def __init__(self, label: _Optional[str] = ..., train_count: _Optional[int] = ..., validation_count: _Optional[int] = ..., test_count: _Optional[int] = ...) -> None: ...

class LeftOut(_message.Message):
    __slots__ = ("reason", "label", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: LeftOutReason
    label: str
    count: int
    def __init__(self, reason: _Optional[_Union[LeftOutReason, str]] = ..., label: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class LeftOutFile(_message.Message):
    __slots__ = ("path", "label", "reason", "detail")
    PATH_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    path: str
    label: str
    reason: LeftOutReason
    detail: str
    def __init__(self, path: _Optional[str] = ..., label: _Optional[str] = ..., reason: _Optional[_Union[LeftOutReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class ReadSummary(_message.Message):
    __slots__ = ("seen_count", "used_count", "left_out", "left_out_files", "nested_count", "warnings")
    SEEN_COUNT_FIELD_NUMBER: _ClassVar[int]
    USED_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FILES_FIELD_NUMBER: _ClassVar[int]
    NESTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    seen_count: int
    used_count: int
    left_out: _containers.RepeatedCompositeFieldContainer[LeftOut]
    left_out_files: _containers.RepeatedCompositeFieldContainer[LeftOutFile]
    nested_count: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, seen_count: _Optional[int] = ..., used_count: _Optional[int] = ..., left_out: _Optional[_Iterable[_Union[LeftOut, _Mapping]]] = ..., left_out_files: _Optional[_Iterable[_Union[LeftOutFile, _Mapping]]] = ..., nested_count: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Dataset(_message.Message):
    __slots__ = ("dataset_id", "display_name", "digest", "create_time", "size_bytes", "classes", "image_count", "summary", "is_unlabelled", "case_sensitive_labels", "erased_image_count")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    IS_UNLABELLED_FIELD_NUMBER: _ClassVar[int]
    CASE_SENSITIVE_LABELS_FIELD_NUMBER: _ClassVar[int]
    ERASED_IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    display_name: str
    digest: str
    create_time: _timestamp_pb2.Timestamp
    size_bytes: int
    classes: _containers.RepeatedCompositeFieldContainer[ClassCount]
    image_count: int
    summary: ReadSummary
    is_unlabelled: bool
    case_sensitive_labels: bool
    erased_image_count: int
    def __init__(self, dataset_id: _Optional[str] = ..., display_name: _Optional[str] = ..., digest: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., size_bytes: _Optional[int] = ..., classes: _Optional[_Iterable[_Union[ClassCount, _Mapping]]] = ..., image_count: _Optional[int] = ..., summary: _Optional[_Union[ReadSummary, _Mapping]] = ..., is_unlabelled: _Optional[bool] = ..., case_sensitive_labels: _Optional[bool] = ..., erased_image_count: _Optional[int] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class GetDatasetResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets", "next_page_token")
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    next_page_token: str
    def __init__(self, datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteDatasetRequest(_message.Message):
    __slots__ = ("dataset_id",)
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    def __init__(self, dataset_id: _Optional[str] = ...) -> None: ...

class DeleteDatasetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AddImagesHeader(_message.Message):
    __slots__ = ("dataset_id", "display_name", "format")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    display_name: str
    format: ArchiveFormat
    def __init__(self, dataset_id: _Optional[str] = ..., display_name: _Optional[str] = ..., format: _Optional[_Union[ArchiveFormat, str]] = ...) -> None: ...

class AddImagesRequest(_message.Message):
    __slots__ = ("header", "archive_chunk", "image", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ARCHIVE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: AddImagesHeader
    archive_chunk: bytes
    image: LabelledImage
    end: UploadDatasetEnd
    def __init__(self, header: _Optional[_Union[AddImagesHeader, _Mapping]] = ..., archive_chunk: _Optional[bytes] = ..., image: _Optional[_Union[LabelledImage, _Mapping]] = ..., end: _Optional[_Union[UploadDatasetEnd, _Mapping]] = ...) -> None: ...

class AddImagesResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class RemoveImagesRequest(_message.Message):
    __slots__ = ("dataset_id", "digests", "display_name")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    digests: _containers.RepeatedScalarFieldContainer[str]
    display_name: str
    def __init__(self, dataset_id: _Optional[str] = ..., digests: _Optional[_Iterable[str]] = ..., display_name: _Optional[str] = ...) -> None: ...

class RemoveImagesResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class RelabelImagesRequest(_message.Message):
    __slots__ = ("dataset_id", "labels", "display_name")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    labels: _containers.ScalarMap[str, str]
    display_name: str
    def __init__(self, dataset_id: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., display_name: _Optional[str] = ...) -> None: ...

class RelabelImagesResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: Dataset
    def __init__(self, dataset: _Optional[_Union[Dataset, _Mapping]] = ...) -> None: ...

class ListImagesRequest(_message.Message):
    __slots__ = ("dataset_id", "page_size", "page_token")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    page_size: int
    page_token: str
    def __init__(self, dataset_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class DatasetImage(_message.Message):
    __slots__ = ("digest", "name", "label", "split", "group", "size_bytes", "is_erased")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IS_ERASED_FIELD_NUMBER: _ClassVar[int]
    digest: str
    name: str
    label: str
    split: Split
    group: str
    size_bytes: int
    is_erased: bool
    def __init__(self, digest: _Optional[str] = ..., name: _Optional[str] = ..., label: _Optional[str] = ..., split: _Optional[_Union[Split, str]] = ..., group: _Optional[str] = ..., size_bytes: _Optional[int] = ..., is_erased: _Optional[bool] = ...) -> None: ...

class ListImagesResponse(_message.Message):
    __slots__ = ("images", "next_page_token")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[DatasetImage]
    next_page_token: str
    def __init__(self, images: _Optional[_Iterable[_Union[DatasetImage, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class EraseImageRequest(_message.Message):
    __slots__ = ("image_digest",)
    IMAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    image_digest: str
    def __init__(self, image_digest: _Optional[str] = ...) -> None: ...

class AffectedVersion(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class EraseImageResponse(_message.Message):
    __slots__ = ("dataset_ids", "versions")
    DATASET_IDS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    dataset_ids: _containers.RepeatedScalarFieldContainer[str]
    versions: _containers.RepeatedCompositeFieldContainer[AffectedVersion]
    def __init__(self, dataset_ids: _Optional[_Iterable[str]] = ..., versions: _Optional[_Iterable[_Union[AffectedVersion, _Mapping]]] = ...) -> None: ...
