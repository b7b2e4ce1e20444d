from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Decision(_message.Message):
    __slots__ = ("argmax", "balanced", "thresholds")
    ARGMAX_FIELD_NUMBER: _ClassVar[int]
    BALANCED_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    argmax: Argmax
    balanced: Balanced
    thresholds: Thresholds
    def __init__(self, argmax: _Optional[_Union[Argmax, _Mapping]] = ..., balanced: _Optional[_Union[Balanced, _Mapping]] = ..., thresholds: _Optional[_Union[Thresholds, _Mapping]] = ...) -> None: ...

class Argmax(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Balanced(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Thresholds(_message.Message):
    __slots__ = ("classes", "others")
    class ClassesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.ScalarMap[str, float]
    others: float
    def __init__(self, classes: _Optional[_Mapping[str, float]] = ..., others: _Optional[float] = ...) -> None: ...
