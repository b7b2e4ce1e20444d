"""Tensors of any shape and content."""

import contextlib
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.domain import DEFAULT_DECODING
from service.errors import InvalidInput
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference import tensors

Input = pb.ModelInferRequest.InferInputTensor


@given(
    datatype=st.sampled_from(["BYTES", "UINT8", "FP32"]),
    shape=st.lists(st.integers(-2, 4) | st.sampled_from([3, 2**40]), max_size=5),
    raw=st.none() | st.binary(max_size=200),
    numbers=st.lists(st.integers(0, 300), max_size=30),
)
def test_any_tensor_gives_images_or_is_refused(
    datatype: str, shape: list[int], raw: bytes | None, numbers: list[int]
) -> None:
    tensor = Input(datatype=datatype, shape=shape)
    if raw is None:
        tensor.contents.uint_contents.extend(numbers)
        tensor.contents.fp32_contents.extend(number / 256 for number in numbers)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[] if raw is None else [raw])
    # Anything but InvalidInput is a fault of ours, and fails here.
    try:
        images = tensors.decodes(request, 256)
    except InvalidInput:
        return
    assert len(images) == (1 if len(shape) == 3 else shape[0])
    for decode in images:
        with contextlib.suppress(InvalidInput):
            assert decode(DEFAULT_DECODING).shape == (224, 224, 3)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_texts_that_were_written_are_read_again(elements: list[str]) -> None:
    tensor = Input(datatype="BYTES", shape=[len(elements)])
    raw = tensors.texts(elements)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[raw])
    found: list[Any] = tensors.decodes(request, 256)
    assert [image.data.decode() for image in found] == elements


def test_each_image_gets_its_own_part_of_a_tensor() -> None:
    array = np.zeros((3, 4, 4, 3), np.uint8)
    array[:] = np.array([10, 20, 30], np.uint8)[:, None, None, None]
    tensor = Input(datatype="UINT8", shape=array.shape)
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[array.tobytes()])
    decoded = [decode(DEFAULT_DECODING) for decode in tensors.decodes(request, 3)]
    assert [int(pixels.mean()) for pixels in decoded] == [10, 20, 30]
