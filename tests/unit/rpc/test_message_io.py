"""Requests are counted on the wire, and refused before they are parsed; answers are sent."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, prediction_pb2
from grpc import aio
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidInput, Reason
from service.rpc import message_io
from service.rpc.message_io import Parser
from service.rpc.open_inference import grpc_predict_v2_pb2

PREDICT = "/graft.v1.PredictionService/Predict"
STREAM = "/graft.v1.PredictionService/PredictStream"
FINE_TUNE = "/graft.v1.FineTuningService/FineTune"
LIST_JOBS = "/graft.v1.FineTuningService/ListJobs"
INFER = "/inference.GRPCInferenceService/ModelInfer"


def counted(message: Message) -> int | None:
    return message_io.count(message.SerializeToString(), message.DESCRIPTOR, 10**9)


def test_fields_list_elements_and_map_entries_count_each() -> None:
    image = prediction_pb2.Image(encoded=bytes(1000))
    assert (
        counted(
            prediction_pb2.PredictRequest(
                models=[prediction_pb2.ModelSpec(model="m")], images=[image] * 3
            )
        )
        == 2 + 3 * 2
    )
    tensor = prediction_pb2.Tensor(data_type="DATA_TYPE_UINT8", shape=[2, 1, 3], data=bytes(6))
    # The list's own field, and its three numbers of one byte.
    assert counted(tensor) == 1 + (1 + 3) + 1
    assert counted(fine_tuning_pb2.FineTuneRequest(labels={"a": "b", "c": "d"})) == 2 * 3
    assert counted(fine_tuning_pb2.ListJobsRequest(states=[1, 2, 3])) == 1 + 3


@pytest.mark.parametrize(
    ("field", "number_bytes"), [("uint_contents", 1), ("fp32_contents", 4), ("fp64_contents", 8)]
)
def test_a_tensors_numbers_count_a_twentieth_each(field: str, number_bytes: int) -> None:
    contents: Any = grpc_predict_v2_pb2.InferTensorContents(**{field: [1] * 4000})
    assert counted(contents) == 1 + 4000 // 20


AMPLIFIED = {
    "empty images": (
        PREDICT,
        prediction_pb2.PredictRequest,
        b"\x12\x00" * (message_io.MAX_ELEMENTS + 1),
    ),
    "a tensor's shape": (
        PREDICT,
        prediction_pb2.PredictRequest,
        prediction_pb2.PredictRequest(
            images=[
                prediction_pb2.Image(
                    tensor=prediction_pb2.Tensor(shape=[1] * message_io.MAX_ELEMENTS)
                )
            ]
        ).SerializeToString(),
    ),
    "labels": (
        FINE_TUNE,
        fine_tuning_pb2.FineTuneRequest,
        b"\xf2\x01\x00" * (message_io.MAX_ELEMENTS + 1),
    ),
    "fields that nobody knows": (
        FINE_TUNE,
        fine_tuning_pb2.FineTuneRequest,
        b"\xfa\x7f\x00" * (message_io.MAX_ELEMENTS + 1),
    ),
    "states": (
        LIST_JOBS,
        fine_tuning_pb2.ListJobsRequest,
        fine_tuning_pb2.ListJobsRequest(states=[1] * message_io.SMALL_ELEMENTS).SerializeToString(),
    ),
    "numbers of a tensor": (
        INFER,
        grpc_predict_v2_pb2.ModelInferRequest,
        grpc_predict_v2_pb2.ModelInferRequest(
            inputs=[
                grpc_predict_v2_pb2.ModelInferRequest.InferInputTensor(
                    contents=grpc_predict_v2_pb2.InferTensorContents(
                        uint_contents=[1] * 20 * message_io.MAX_ELEMENTS
                    )
                )
            ]
        ).SerializeToString(),
    ),
}


@pytest.mark.parametrize("name", AMPLIFIED)
async def test_a_request_of_very_many_elements_is_refused_without_being_parsed(name: str) -> None:
    method, kind, raw = AMPLIFIED[name]
    with pytest.raises(InvalidInput, match="fields and list elements") as caught:
        await Parser(method, kind.FromString).cost(raw)
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_a_method_that_brings_no_images_takes_64_kib_and_the_others_what_grpc_takes() -> None:
    large = bytes(message_io.SMALL_BYTES + 1)
    with pytest.raises(InvalidInput, match="one of ListJobs has at most 65536"):
        await Parser(LIST_JOBS, fine_tuning_pb2.ListJobsRequest.FromString).cost(large)
    upload = dataset_pb2.UploadDatasetRequest(archive_chunk=large).SerializeToString()
    method = "/graft.v1.DatasetService/UploadDataset"
    parser = Parser(method, dataset_pb2.UploadDatasetRequest.FromString)
    assert await parser.cost(upload) == len(upload) + message_io.ELEMENT_BYTES
    assert parser.parse(upload).archive_chunk == large


def test_every_method_that_brings_images_or_files_is_one_of_the_contracts() -> None:
    named = {
        f"/{service.full_name}/{method.name}"
        for file in (
            backbone_pb2,
            dataset_pb2,
            fine_tuning_pb2,
            prediction_pb2,
            grpc_predict_v2_pb2,
        )
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert named > message_io._BRING_FILES


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_counted_or_refused_and_what_is_refused_is_no_message(raw: bytes) -> None:
    kind = grpc_predict_v2_pb2.ModelInferRequest
    try:
        counted = message_io.count(raw, kind.DESCRIPTOR, 10**9)
        assert counted is not None
        assert 0 <= counted <= len(raw) + 1
    except InvalidInput:
        with pytest.raises(DecodeError):
            kind.FromString(raw)


def test_a_number_without_end_ends_the_count_at_once() -> None:
    raw = b"\x28" + b"\x80" * 10_000_000
    with pytest.raises(InvalidInput, match="not a message of its kind"):
        message_io.count(raw, prediction_pb2.PredictRequest.DESCRIPTOR, 10)


async def test_a_cut_end_hides_nothing_of_what_lies_inside() -> None:
    # The parser would make the inner message before it meets the end.
    inner = b"\x12\x00" * 500_000
    request = prediction_pb2.PredictStreamRequest(id="x")
    request.request.MergeFromString(inner)
    parser = Parser(STREAM, prediction_pb2.PredictStreamRequest.FromString)
    for end in (b"", b"\x80", b"\x0a", b"\x28\xff"):
        with pytest.raises(InvalidInput):
            await parser.cost(request.SerializeToString() + end)


async def test_many_elements_are_counted_in_a_thread_and_few_on_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[tuple[int, bool]] = []
    count = message_io.count

    def noted(raw: bytes, message: Any, most: int) -> int | None:
        counted.append((most, threading.current_thread() is threading.main_thread()))
        return count(raw, message, most)

    monkeypatch.setattr(message_io, "count", noted)
    with ThreadPoolExecutor(1) as threads:
        parser = Parser(PREDICT, prediction_pb2.PredictRequest.FromString, threads)
        few = prediction_pb2.PredictRequest(images=[prediction_pb2.Image(encoded=b"x")] * 256)
        assert await parser.cost(few.SerializeToString()) > 512 * message_io.ELEMENT_BYTES
        assert counted == [(message_io.LOOP_ELEMENTS, True)]
        many = few.SerializeToString() * 10
        assert await parser.cost(many) == len(many) + 5120 * message_io.ELEMENT_BYTES
    assert counted[1:] == [(message_io.LOOP_ELEMENTS, True), (message_io.MAX_ELEMENTS, False)]


class Gone:
    """The context of a caller who is gone."""

    async def write(self, response: object) -> None:
        raise aio.InternalError('Failed "execute_batch"')


async def test_an_answer_to_a_caller_who_is_gone_ends_the_call_as_a_cancel_does() -> None:
    context: Any = Gone()
    with pytest.raises(asyncio.CancelledError):
        await message_io.send(context, b"answer", 1.0)
