"""Tensors of the protocol: images out of a request, elements into an answer.

A request is refused by its tensor's type and shape; its elements are first touched by the
worker that decodes an image.
"""

import math
import struct
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from service.engine import preprocess
from service.engine.engine import Decode
from service.errors import InvalidInput, Reason, bad_field
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb

_SHARED_MEMORY = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
"""Parameters of a tensor that lies in shared memory."""
_FIELDS = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}
"""The field of `InferTensorContents` that holds the elements of a datatype."""

_LENGTH = struct.Struct("<I")


def decodes(request: pb.ModelInferRequest, max_images: int) -> list[Decode]:
    """Returns a function for each image of the request; raises InvalidInput."""
    if len(request.inputs) != 1:
        raise bad_field(
            "inputs", f"the request has {len(request.inputs)} inputs: send one tensor of images"
        )
    tensor = request.inputs[0]
    if tensor.datatype not in _FIELDS:
        raise bad_field(
            "inputs[0].datatype",
            f"the input's datatype is {tensor.datatype[:40]!r}: send BYTES (image files), UINT8 "
            "or FP32",
        )
    refuse_shared_memory(tensor.parameters, "inputs[0]")
    count = _count(tensor.datatype, tensor.shape)
    if count > max_images:
        raise bad_field(
            "inputs[0].shape",
            f"the request holds {count} images, more than the {max_images} that one call may "
            "bring: send them in several calls",
        )
    _check_raw(request)
    elements = _Elements(request, count)
    if tensor.datatype == "BYTES":
        return [preprocess.Encoded(partial(elements.image, index)) for index in range(count)]
    size, is_float = tensor.shape[-3:], tensor.datatype == "FP32"
    return [
        preprocess.Tensor(partial(elements.image, index), size, is_float=is_float)
        for index in range(count)
    ]


def _count(datatype: str, given: Sequence[int]) -> int:
    """Returns how many images a tensor of this shape holds; raises InvalidInput."""
    shape = list(given[:5])
    if datatype == "BYTES":
        is_fitting = len(shape) in (1, 2) and shape[1:] in ([], [1]) and shape[0] >= 1
        wanted = "[n] or [n, 1]"
    else:
        is_fitting = len(shape) in (3, 4) and shape[-1] == 3 and min(shape) >= 1
        wanted = "[n, height, width, 3] or [height, width, 3]"
    if not is_fitting:
        raise bad_field(
            "inputs[0].shape",
            f"the shape of a {datatype} input must be {wanted} with n from 1; it is {shape}",
        )
    return 1 if len(shape) == 3 else shape[0]


def _check_raw(request: pb.ModelInferRequest) -> None:
    if len(request.raw_input_contents) > 1:
        raise bad_field(
            "raw_input_contents",
            f"there are {len(request.raw_input_contents)} raw_input_contents for one input",
        )
    if request.raw_input_contents and request.inputs[0].HasField("contents"):
        raise bad_field(
            "inputs[0].contents",
            "the input has contents beside raw_input_contents: send one of the two",
        )


class _Elements:
    """A request's tensor, taken apart when its first image is read."""

    def __init__(self, request: pb.ModelInferRequest, count: int) -> None:
        self._request = request
        self._tensor = request.inputs[0]
        self._count = count
        self._once = threading.Lock()
        self._images: Callable[[int], bytes] | InvalidInput | None = None

    def image(self, index: int) -> bytes:
        """Copies one image's bytes; raises InvalidInput, with a field where the tensor is bad."""
        with self._once:
            if self._images is None:
                try:
                    self._images = self._taken_apart()
                except InvalidInput as error:
                    self._images = error
        if isinstance(self._images, InvalidInput):
            raise self._images
        return self._images(index)

    def _taken_apart(self) -> Callable[[int], bytes]:
        """Returns a function from an image's index to its bytes."""
        kind, count = self._tensor.datatype, self._count
        given: Any
        if self._request.raw_input_contents:
            given, unit = memoryview(self._request.raw_input_contents[0]), "bytes"
        else:
            unit = _FIELDS[kind]
            given = getattr(self._tensor.contents, unit)
        if kind == "BYTES":
            elements = _split(given, count) if unit == "bytes" else given
            if len(elements) != count:
                raise _unfit(f"it has {len(elements)} elements where its shape needs {count}")
            return lambda index: bytes(elements[index])
        each = math.prod(self._tensor.shape[-3:])
        if unit == "bytes" and kind == "FP32":
            each *= 4
        if len(given) != each * count:
            raise _unfit(f"it has {len(given)} {unit} where its shape and type need {each * count}")
        encode = bytes if unit == "bytes" else _float_bytes if kind == "FP32" else _uint8_bytes
        return lambda index: encode(given[index * each : (index + 1) * each])


def _split(raw: memoryview, count: int) -> list[memoryview]:
    """Returns the elements of a BYTES tensor, which must be `count`."""
    elements: list[memoryview] = []
    at = 0
    while at < len(raw) and len(elements) < count:
        start = at + _LENGTH.size
        if start > len(raw):
            raise _unfit("it ends within an element's length")
        (length,) = _LENGTH.unpack_from(raw, at)
        at = start + length
        if at > len(raw):
            raise _unfit(
                f"element {len(elements)} has {length} bytes by its length where {len(raw) - start}"
                " are left: each element begins with its length, 4 bytes little-endian"
            )
        elements.append(raw[start:at])
    if at < len(raw):
        raise _unfit(f"{len(raw) - at} bytes follow the {count} elements that its shape names")
    return elements


def _float_bytes(numbers: Sequence[float]) -> bytes:
    return np.asarray(numbers, dtype="<f4").tobytes()


def _uint8_bytes(numbers: Sequence[int]) -> bytes:
    array = np.asarray(numbers, dtype=np.uint32)
    if array.max() > 255:
        raise InvalidInput(
            Reason.TENSOR_INVALID, f"the tensor has the value {array.max()}; UINT8 ends at 255"
        )
    return array.astype(np.uint8).tobytes()


def texts(elements: Iterable[str]) -> bytes:
    """Encodes the elements of a BYTES tensor."""
    encoded = (element.encode() for element in elements)
    return b"".join(_LENGTH.pack(len(data)) + data for data in encoded)


def refuse_shared_memory(parameters: Container[str], field: str) -> None:
    """Raises InvalidInput for the parameters of a tensor in shared memory."""
    if any(name in parameters for name in _SHARED_MEMORY):
        raise bad_field(
            f"{field}.parameters",
            "shared memory is not supported: send tensors in the request, take them from the "
            "answer",
        )


def _unfit(why: str) -> InvalidInput:
    return InvalidInput(
        Reason.TENSOR_INVALID, f"the input tensor is damaged: {why}", field="inputs[0]"
    )
