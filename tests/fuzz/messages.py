"""Any message of any kind, made from bytes: numbers at their ends, texts that trick."""

import math
import struct
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_F = FieldDescriptor

INTEGERS = (0, 1, -1, 2, 224, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, 0.5, 1.0, -1.0, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1.7e308, 3.5e38, 0.2)
TEXTS = (
    "",
    "cats",
    "latest",
    "1",
    "train",
    "../../etc/passwd",
    "/",
    "/\0",
    "a/b",
    "a\\b",
    ".",
    "..",
    "nul\0l",
    "line\nfeed\r\x1b[31m",
    "\u202egnp.exe",
    "caf\u00e9",
    "cafe\u0301",
    "\uff43\uff41\uff54",
    "\u0441\u0430\u0442",
    "\u200d\u200b\ufeff",
    "\U0010ffff\ufffe",
    "\u2028",
    "%s%n{0}{}",
    "'; DROP TABLE jobs; --",
    "<script>alert(1)</script>",
    "x" * 64,
    "x" * 129,
    "x" * 70_000,
    "\u00e9" * 200,
    "9" * 400,
    "auto",
    "resnet18",
    "random",
    "layer4",
    "BYTES",
    "UINT8",
    "FP32",
    "probabilities",
    "labels",
    "features",
    "classification",
    "timeout",
)
"""Each is text that protobuf takes."""

_BITS32 = {_F.TYPE_INT32, _F.TYPE_SINT32, _F.TYPE_SFIXED32, _F.TYPE_UINT32, _F.TYPE_FIXED32}
_UNSIGNED = {_F.TYPE_UINT32, _F.TYPE_FIXED32, _F.TYPE_UINT64, _F.TYPE_FIXED64}
_REAL = {_F.TYPE_DOUBLE, _F.TYPE_FLOAT}
_MAX_DEPTH = 6


class Choices:
    """Takes bytes for decisions; at the end all are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, bound: int) -> int:
        """A number from 0 to below `bound`, which is at most 256."""
        if self._at >= len(self._data):
            return 0
        self._at += 1
        return self._data[self._at - 1] % bound

    def bytes(self, count: int) -> bytes:
        """At most so many of the bytes."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken


def extremes(field: Any) -> tuple[Any, ...]:
    """What a scalar field may hold at its worst."""
    if field.type in _REAL:
        return FLOATS
    if field.type == _F.TYPE_BOOL:
        return (False, True)
    if field.type == _F.TYPE_STRING:
        return TEXTS
    if field.type == _F.TYPE_BYTES:
        return (b"", b"\0", b"\xff" * 100)
    bits = 32 if field.type in _BITS32 or field.type == _F.TYPE_ENUM else 64
    low, high = (0, 2**bits) if field.type in _UNSIGNED else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return tuple(sorted({n for n in (*INTEGERS, high - 1, low) if low <= n < high}))


def fill(message: Message, choices: Choices, depth: int = 0) -> None:
    """Sets some fields, and those of messages within."""
    for field in message.DESCRIPTOR.fields:
        if choices.below(3) == 0:
            continue
        if field.is_repeated:
            for _ in range(choices.below(4)):
                _add(message, field, choices, depth)
        elif field.type == _F.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            inner.SetInParent()
            if depth < _MAX_DEPTH:
                fill(inner, choices, depth + 1)
        else:
            setattr(message, field.name, _value(field, choices))


def _add(message: Message, field: Any, choices: Choices, depth: int) -> None:
    into = getattr(message, field.name)
    if field.type != _F.TYPE_MESSAGE:
        into.append(_value(field, choices))
    elif field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        name = _value(key, choices)
        if value.type != _F.TYPE_MESSAGE:
            into[name] = _value(value, choices)
        elif depth < _MAX_DEPTH:
            fill(into[name], choices, depth + 1)
    elif depth < _MAX_DEPTH:
        fill(into.add(), choices, depth + 1)


def _value(field: Any, choices: Choices) -> Any:
    if field.type == _F.TYPE_BYTES:
        return choices.bytes(choices.below(200))
    known = extremes(field)
    which = choices.below(len(known) + 1)
    if which < len(known):
        return known[which]
    # Any other: what the bytes say.
    if field.type == _F.TYPE_STRING:
        return choices.bytes(choices.below(80)).decode(errors="replace")
    raw = choices.bytes(8).ljust(8, b"\0")
    if field.type in _REAL:
        return struct.unpack("<d", raw)[0]
    signed, unsigned = struct.unpack("<q", raw)[0], struct.unpack("<Q", raw)[0]
    if field.type in _UNSIGNED:
        return unsigned % (2**32 if field.type in _BITS32 else 2**64)
    is_small = field.type in _BITS32 or field.type == _F.TYPE_ENUM
    return signed % 2**31 if is_small else signed


def made(kinds: tuple[Callable[[], Any], ...], data: bytes) -> Any:
    """A message of one of the kinds: by the first byte from wire bytes, or field by field.

    Raises DecodeError for wire bytes that are none.
    """
    choices = Choices(data)
    message = kinds[choices.below(len(kinds))]()
    if choices.below(2):
        message.ParseFromString(data[2:])
    else:
        fill(message, choices)
    return message
