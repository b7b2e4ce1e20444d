"""Request parsing that first counts, on the wire, what a message would become.

A message of two-byte empty sub-messages takes fifty times its size once it is parsed,
and a list of a million numbers holds up whoever walks it. So each method has a largest
message and a most number of elements, and a request beyond either is refused unparsed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from service.errors import InvalidInput, Reason

MAX_ELEMENTS: Final = 50_000
"""Limit on the elements of a request that brings images or files: fields set, entries of lists."""
SMALL_BYTES: Final = 64 * 1024
SMALL_ELEMENTS: Final = 1000
"""The limits of a request that brings neither."""
ELEMENT_BYTES: Final = 100
"""Estimated memory of one parsed element, beyond its bytes on the wire."""

_BRING_FILES: Final = {
    "/graft.v1.BackboneService/RegisterBackbone",
    "/graft.v1.DatasetService/UploadDataset",
    "/graft.v1.FineTuningService/FineTune",
    "/graft.v1.FineTuningService/RankBackbones",
    "/graft.v1.PredictionService/Predict",
    "/graft.v1.PredictionService/PredictStream",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
}
_TENSOR: Final = "inference.InferTensorContents"

_TENSOR_NUMBER: Final = 1 / 20
"""Weight of a number in a tensor: it is not walked, and takes eight bytes at most."""

_VARINT, _BYTES = 0, 2
_FIXED_BYTES: Final = {1: 8, 5: 4}
"""Sizes of the wire types that have a fixed one."""
_NUMBER_BYTES: Final = {
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
}
"""Least size of a packed number by its type; one byte where none is named."""


class Parser:
    """Parses the requests of one method."""

    def __init__(self, method: str, deserialise: Callable[[bytes], Any]) -> None:
        self._deserialise = deserialise
        self._method = method.rpartition("/")[2]
        brings_files = method in _BRING_FILES
        self._max_bytes = None if brings_files else SMALL_BYTES
        self._max_elements = MAX_ELEMENTS if brings_files else SMALL_ELEMENTS
        # The generated `FromString` is bound to its message's class.
        message = getattr(deserialise, "__self__", None)
        self._descriptor: Descriptor | None = getattr(message, "DESCRIPTOR", None)

    def cost(self, raw: bytes) -> int:
        """Estimates the bytes that the parsed message takes.

        Raises InvalidInput (INVALID_FIELD) for one that is larger than the method allows.
        """
        if self._max_bytes is not None and len(raw) > self._max_bytes:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the request has {len(raw)} bytes: one of {self._method} has at most "
                f"{self._max_bytes}",
            )
        if self._descriptor is None:
            return len(raw)
        return len(raw) + ELEMENT_BYTES * count(raw, self._descriptor, self._max_elements)

    def parse(self, raw: bytes) -> Any:
        """Parses a message; raises InvalidInput if the bytes are none."""
        try:
            return self._deserialise(raw)
        except DecodeError:
            raise _no_message(raw) from None


def count(raw: bytes, message: Descriptor, most: int) -> int:
    """Counts the elements of a message on the wire: fields set, entries of lists.

    Raises InvalidInput beyond `most`, and where the bytes end within a number.
    """
    elements = 0.0
    waiting = [(0, len(raw), _fields(message))]
    try:
        while waiting:
            at, end, fields = waiting.pop()
            while at < end:
                tag, at = _varint(raw, at)
                elements += 1
                kind = tag & 7
                if kind == _BYTES:
                    size, at = _varint(raw, at)
                    inner = fields.get(tag >> 3)
                    if isinstance(inner, float):
                        elements += size * inner
                    elif inner is not None:
                        waiting.append((at, min(at + size, end), _fields(inner)))
                    at += size
                elif kind == _VARINT:
                    _, at = _varint(raw, at)
                else:
                    # What is in a group, which no message of ours has, counts as beside it.
                    at += _FIXED_BYTES.get(kind, 0)
                if elements > most:
                    raise InvalidInput(
                        Reason.INVALID_FIELD,
                        f"the request brings more than {most} fields and list elements: bring "
                        "fewer, and tensors as bytes",
                    )
    except IndexError:
        # Refused here, since the parser reads what lies inside before it finds this out.
        raise _no_message(raw) from None
    return int(elements)


@cache
def _fields(message: Descriptor) -> dict[int, Descriptor | float]:
    """Maps field numbers to message types, or for packed lists to elements per byte."""
    found: dict[int, Descriptor | float] = {}
    for field in message.fields:
        if field.message_type is not None:
            found[field.number] = field.message_type
        elif field.is_packed:
            weight = _TENSOR_NUMBER if message.full_name == _TENSOR else 1.0
            found[field.number] = weight / _NUMBER_BYTES.get(field.type, 1)
    return found


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """Reads a varint; returns it and its end. Raises IndexError beyond ten bytes."""
    byte = raw[at]
    if byte < 0x80:
        return byte, at + 1
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _no_message(raw: bytes) -> InvalidInput:
    return InvalidInput(
        Reason.INVALID_FIELD, f"the request's {len(raw)} bytes are no message of its kind"
    )
