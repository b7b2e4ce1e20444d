import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_LAYOUT_UNSPECIFIED: _ClassVar[ImageLayout]
    IMAGE_LAYOUT_NCHW: _ClassVar[ImageLayout]
    IMAGE_LAYOUT_NHWC: _ClassVar[ImageLayout]

class BackboneSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BACKBONE_SOURCE_UNSPECIFIED: _ClassVar[BackboneSource]
    BACKBONE_SOURCE_REGISTERED: _ClassVar[BackboneSource]
    BACKBONE_SOURCE_PACKAGE: _ClassVar[BackboneSource]
    BACKBONE_SOURCE_TORCHVISION: _ClassVar[BackboneSource]
    BACKBONE_SOURCE_TIMM: _ClassVar[BackboneSource]
IMAGE_LAYOUT_UNSPECIFIED: ImageLayout
IMAGE_LAYOUT_NCHW: ImageLayout
IMAGE_LAYOUT_NHWC: ImageLayout
BACKBONE_SOURCE_UNSPECIFIED: BackboneSource
BACKBONE_SOURCE_REGISTERED: BackboneSource
BACKBONE_SOURCE_PACKAGE: BackboneSource
BACKBONE_SOURCE_TORCHVISION: BackboneSource
BACKBONE_SOURCE_TIMM: BackboneSource

class BackboneDescription(_message.Message):
    __slots__ = ("name", "size", "mean", "std", "layout", "output", "licence", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    layout: ImageLayout
    output: str
    licence: str
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ..., layout: _Optional[_Union[ImageLayout, str]] = ..., output: _Optional[str] = ..., licence: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class RegisterBackboneEnd(_message.Message):
    __slots__ = ("message_count",)
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    message_count: int
    def __init__(self, message_count: _Optional[int] = ...) -> None: ...

class RegisterBackboneRequest(_message.Message):
    __slots__ = ("description", "chunk", "end")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    description: BackboneDescription
    chunk: bytes
    end: RegisterBackboneEnd
    def __init__(self, description: _Optional[_Union[BackboneDescription, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[RegisterBackboneEnd, _Mapping]] = ...) -> None: ...

class RegisterBackboneResponse(_message.Message):
    __slots__ = ("backbone",)
    BACKBONE_FIELD_NUMBER: _ClassVar[int]
    backbone: Backbone
    def __init__(self, backbone: _Optional[_Union[Backbone, _Mapping]] = ...) -> None: ...

class Backbone(_message.Message):
    __slots__ = ("name", "source", "size", "feature_dim", "licence", "digest", "weights", "source_digest", "size_bytes", "create_time")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_DIM_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: BackboneSource
    size: int
    feature_dim: int
    licence: str
    digest: str
    weights: str
    source_digest: str
    size_bytes: int
    create_time: _timestamp_pb2.Timestamp
    def __init__(self, name: _Optional[str] = ..., source: _Optional[_Union[BackboneSource, str]] = ..., size: _Optional[int] = ..., feature_dim: _Optional[int] = ..., licence: _Optional[str] = ..., digest: _Optional[str] = ..., weights: _Optional[str] = ..., source_digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListBackbonesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBackbonesResponse(_message.Message):
    __slots__ = ("backbones", "next_page_token")
    BACKBONES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    backbones: _containers.RepeatedCompositeFieldContainer[Backbone]
    next_page_token: str
    def __init__(self, backbones: _Optional[_Iterable[_Union[Backbone, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteBackboneRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteBackboneResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
