"""Messages of a call: read within a time and counted before they are parsed; answers sent in time.

A message of two-byte empty sub-messages takes fifty times its size once it is parsed, and a
list of a million numbers holds up whoever walks it. So each method has a largest message and
a largest number of elements (fields set, entries of lists), and a request beyond either is
refused unparsed.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from grpc import aio

from service.errors import Expired, InvalidInput, Reason
from service.rpc.admission import HEALTH, Slot
from service.rpc.handlers import Context

MAX_ELEMENTS: Final = 50_000
"""Limit on the elements of a request that brings images or files."""
SMALL_BYTES: Final = 64 * 1024
SMALL_ELEMENTS: Final = 1000
"""Limits of a request that brings neither."""
LOOP_ELEMENTS: Final = 600
"""Limit on the elements that are counted on the event loop, in a millisecond or two; a thread
counts more. A request of 256 images as files has fewer."""
HEALTH_BYTES: Final = 1024
"""Limit of a health check's request, which anybody may send."""
ELEMENT_BYTES: Final = 100
"""Estimated memory of one parsed element, beyond its bytes on the wire."""

_BRING_FILES: Final = {
    "/graft.v1.BackboneService/RegisterBackbone",
    "/graft.v1.DatasetService/AddImages",
    # Not files, but ten thousand digests.
    "/graft.v1.DatasetService/RelabelImages",
    "/graft.v1.DatasetService/RemoveImages",
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


async def receive(context: Context, parser: "Parser", slot: Slot, timeout_s: float) -> Any:
    """Returns the request of a call that brings one; `slot` counts the bytes that it holds.

    Raises Expired if it does not arrive in time, Exhausted if the slot may not hold it, and
    InvalidInput if there is none, it is larger than its method allows, or no such message.
    """
    try:
        async with asyncio.timeout(timeout_s):
            raw = await context.read()
    except TimeoutError:
        raise Expired(
            Reason.DEADLINE_EXCEEDED,
            f"the request did not arrive within {timeout_s:g} s: send it again",
        ) from None
    if raw is aio.EOF:
        raise InvalidInput(Reason.INVALID_FIELD, "the call brought no request: send one")
    slot.hold(await parser.cost(raw))
    return parser.parse(raw)


async def send(context: Context, response: Any, timeout_s: float) -> None:
    """Sends one answer of a stream; raises Expired if its reader does not take it in time.

    Raises CancelledError if the reader is gone.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(response)
    except TimeoutError:
        raise Expired(
            Reason.DEADLINE_EXCEEDED, f"the reader took no answer for {timeout_s:g} s: read faster"
        ) from None
    except aio.InternalError:
        # gRPC takes nothing more for a caller who is gone, and may say so before it cancels.
        raise asyncio.CancelledError from None


class Parser:
    """Counts and parses the requests of one method."""

    def __init__(
        self, method: str, deserialise: Callable[[bytes], Any], threads: Executor | None = None
    ) -> None:
        """`threads` count what has too many elements for the event loop."""
        self._deserialise = deserialise
        self._threads = threads
        self._method = method.rpartition("/")[2]
        brings_files = method in _BRING_FILES
        small_bytes = HEALTH_BYTES if method.startswith(HEALTH) else SMALL_BYTES
        # None: gRPC's own limit on messages.
        self._max_bytes = None if brings_files else small_bytes
        self._max_elements = MAX_ELEMENTS if brings_files else SMALL_ELEMENTS
        # The generated `FromString` is bound to its message's class.
        message = getattr(deserialise, "__self__", None)
        self._descriptor: Descriptor | None = getattr(message, "DESCRIPTOR", None)

    async def cost(self, raw: bytes) -> int:
        """Estimates the bytes that the parsed message holds.

        Raises InvalidInput (INVALID_FIELD) for one that is larger than the method allows, and
        for bytes that end within a field.
        """
        if self._max_bytes is not None and len(raw) > self._max_bytes:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the request has {len(raw)} bytes: one of {self._method} has at most "
                f"{self._max_bytes}",
            )
        if self._descriptor is None:
            return len(raw)
        elements = count(raw, self._descriptor, LOOP_ELEMENTS)
        if elements is None:
            elements = await asyncio.get_running_loop().run_in_executor(
                self._threads, count, raw, self._descriptor, self._max_elements
            )
        if elements is None:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"the request brings more than {self._max_elements} fields and list elements: "
                "bring fewer, and tensors as bytes",
            )
        return len(raw) + ELEMENT_BYTES * elements

    def parse(self, raw: bytes) -> Any:
        """Parses a message; raises InvalidInput if the bytes are none."""
        try:
            return self._deserialise(raw)
        except DecodeError:
            raise _no_message(raw) from None


def count(raw: bytes, message: Descriptor, most: int) -> int | None:
    """Counts the elements of a message on the wire: fields set, entries of lists.

    Returns None beyond `most`. Raises InvalidInput where the bytes end within a field.
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
                        waiting.append((at, at + size, _fields(inner)))
                    at += size
                elif kind == _VARINT:
                    _, at = _varint(raw, at)
                else:
                    # What is in a group, which no message of ours has, counts as beside it.
                    at += _FIXED_BYTES.get(kind, 0)
                if elements > most:
                    return None
                if at > end:
                    raise _no_message(raw)
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
        Reason.INVALID_FIELD, f"the request's {len(raw)} bytes are not a message of its kind"
    )
