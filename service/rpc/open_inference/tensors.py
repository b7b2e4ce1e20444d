"""Tensors of the protocol: images out of a request, elements into an answer.

Checks here are cheap; whatever touches an image's elements happens where the
images are decoded, in threads.
"""

import math
import struct
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from service.domain import ImageDecoding
from service.engine import preprocess
from service.engine.engine import Decode
from service.engine.preprocess import Pixels
from service.errors import InvalidInput, Reason
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb

_FIELDS = {"BYTES": "bytes_contents", "UINT8": "uint_contents", "FP32": "fp32_contents"}
"""Where the elements of a datatype lie, when they are in the message."""

_LENGTH = struct.Struct("<I")


def decodes(request: pb.ModelInferRequest, max_images: int) -> list[Decode]:
    """One function for each image of the request; raises InvalidInput."""
    if len(request.inputs) != 1:
        raise bad(
            "inputs",
            f"the request has {len(request.inputs)} inputs: send one tensor of images",
        )
    tensor = request.inputs[0]
    if tensor.datatype not in _FIELDS:
        raise bad(
            "inputs[0].datatype",
            f"the input's datatype is {tensor.datatype[:40]!r}: send BYTES (image files), UINT8 "
            "or FP32",
        )
    refuse_shared_memory(tensor.parameters, "inputs[0]")
    shape = list(tensor.shape)
    count = _count(tensor.datatype, shape)
    if count > max_images:
        raise bad(
            "inputs[0].shape",
            f"the request holds {count} images, more than the {max_images} that one call may "
            "bring: send them in several calls",
        )
    raw = _raw(request)
    if tensor.datatype == "BYTES":
        encoded = tensor.contents.bytes_contents if raw is None else _split(raw, count)
        if len(encoded) != count:
            raise _unfit(f"it has {len(encoded)} elements where its shape needs {count}")
        return [preprocess.Encoded(data) for data in encoded]
    return _decoded(tensor, shape[-3:], count, raw)


def _count(datatype: str, shape: list[int]) -> int:
    """How many images a tensor of this shape holds."""
    if datatype == "BYTES":
        is_fitting = len(shape) in (1, 2) and shape[1:] in ([], [1]) and shape[0] >= 1
        wanted = "[n] or [n, 1]"
    else:
        is_fitting = len(shape) in (3, 4) and shape[-1] == 3 and min(shape) >= 1
        wanted = "[n, height, width, 3] or [height, width, 3]"
    if not is_fitting:
        raise bad(
            "inputs[0].shape",
            f"the shape of a {datatype} input must be {wanted} with n from 1; it is {shape[:8]}",
        )
    return 1 if len(shape) == 3 else shape[0]


def _raw(request: pb.ModelInferRequest) -> bytes | None:
    """The input's elements as bytes; None when they are in its contents."""
    if not request.raw_input_contents:
        return None
    if len(request.raw_input_contents) != 1:
        raise bad(
            "raw_input_contents",
            f"there are {len(request.raw_input_contents)} raw_input_contents for one input",
        )
    if request.inputs[0].HasField("contents"):
        raise bad(
            "inputs[0].contents",
            "the input has contents beside raw_input_contents: send one of the two",
        )
    return request.raw_input_contents[0]


def _split(raw: bytes, count: int) -> list[bytes]:
    """The elements of a BYTES tensor, which must be `count`."""
    elements: list[bytes] = []
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


def _decoded(
    tensor: pb.ModelInferRequest.InferInputTensor, size: list[int], count: int, raw: bytes | None
) -> list[Decode]:
    is_float = tensor.datatype == "FP32"
    given: Any
    if raw is not None:
        given, unit, each = raw, "bytes", math.prod(size) * (4 if is_float else 1)
    else:
        unit = _FIELDS[tensor.datatype]
        given, each = getattr(tensor.contents, unit), math.prod(size)
    if len(given) != each * count:
        raise _unfit(f"it has {len(given)} {unit} where its shape and type need {each * count}")

    def pixels(index: int, decoding: ImageDecoding) -> Pixels:
        part = given[index * each : (index + 1) * each]
        data = part if raw is not None else _as_bytes(part, is_float=is_float)
        return preprocess.from_tensor(data, size, decoding, is_float=is_float)

    return [partial(pixels, index) for index in range(count)]


def _as_bytes(numbers: list[float], *, is_float: bool) -> bytes:
    if is_float:
        return np.asarray(numbers, dtype="<f4").tobytes()
    array = np.asarray(numbers, dtype=np.uint32)
    if array.max() > 255:
        raise _unfit(f"it has the value {array.max()}; UINT8 ends at 255")
    return array.astype(np.uint8).tobytes()


def floats(array: npt.NDArray[np.float32]) -> bytes:
    """An FP32 tensor's elements."""
    return array.astype("<f4").tobytes()


def texts(elements: Iterable[str]) -> bytes:
    """A BYTES tensor's elements."""
    encoded = (element.encode() for element in elements)
    return b"".join(_LENGTH.pack(len(data)) + data for data in encoded)


def refuse_shared_memory(parameters: Iterable[str], field: str) -> None:
    """Raises InvalidInput where a tensor is said to lie in shared memory."""
    if any(name.startswith("shared_memory_") for name in parameters):
        raise bad(
            f"{field}.parameters",
            "shared memory is not supported: send tensors in the request, take them from the "
            "answer",
        )


def bad(field: str, message: str) -> InvalidInput:
    """The error for a request that cannot be meant."""
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)


def _unfit(why: str) -> InvalidInput:
    return InvalidInput(
        Reason.TENSOR_INVALID, f"the input tensor is damaged: {why}", field="inputs[0]"
    )
