"""The Open Inference Protocol: what its calls answer, and what they refuse."""

import struct
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from graftml_stubs.v1 import model_pb2

from service.rpc.codec import predictions
from service.rpc.open_inference import answers
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from tests.rpc.conftest import CLASSES, GUARD_S, MakeService, Service, close, image, refusal

Input = pb.ModelInferRequest.InferInputTensor
Asked = pb.ModelInferRequest.InferRequestedOutputTensor


@pytest.fixture
def stub(service: Service) -> Any:
    return GRPCInferenceServiceStub(service.channel)


def bytes_tensor(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def texts(raw: bytes) -> list[str]:
    found = []
    while raw:
        (length,) = struct.unpack("<I", raw[:4])
        found.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    return found


def numbers(answer: pb.ModelInferResponse, name: str) -> npt.NDArray[np.float32]:
    index = [output.name for output in answer.outputs].index(name)
    assert answer.outputs[index].datatype == "FP32"
    raw = answer.raw_output_contents[index]
    return np.frombuffer(raw, "<f4").reshape(answer.outputs[index].shape)


def request(*images: bytes, **fields: Any) -> pb.ModelInferRequest:
    """Asks with image files."""
    given: dict[str, Any] = {
        "model_name": "colours",
        "inputs": [Input(name="images", datatype="BYTES", shape=[len(images)])],
        "raw_input_contents": [bytes_tensor(*images)],
    }
    return pb.ModelInferRequest(**(given | fields))


def pixels(*colours: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Decoded images of 6 x 8 pixels."""
    array = np.zeros((len(colours), 6, 8, 3), np.uint8)
    for row, colour in zip(array, colours, strict=True):
        row[:] = colour
    return array


RED, BLUE = (255, 0, 0), (0, 0, 255)


async def test_the_server_lives_is_ready_and_names_itself(service: Service, stub: Any) -> None:
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    answer = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert answer.name == "graft"
    assert answer.version
    assert "classification" in answer.extensions


async def test_a_model_is_ready_when_it_and_the_version_exist(service: Service, stub: Any) -> None:
    await service.make_model()
    for name, version, ready in (
        ("colours", "", True),
        ("colours", "1", True),
        ("colours", "latest", True),
        ("colours", "2", False),
        ("colours", "9" * 30, False),
        ("colours", "prod", False),
        ("nobody", "", False),
    ):
        answer = await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version))
        assert answer.ready is ready, (name, version)


async def test_metadata_and_configuration_describe_the_model(service: Service, stub: Any) -> None:
    await service.make_model()
    await service.make_model()
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="colours"))
    assert (metadata.name, list(metadata.versions)) == ("colours", ["2", "1"])
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [
        ("images", "BYTES", [-1, 1])
    ]
    assert [(o.name, o.datatype, list(o.shape)) for o in metadata.outputs] == [
        ("probabilities", "FP32", [-1, 3]),
        ("labels", "BYTES", [-1]),
        ("features", "FP32", [-1, 3]),
    ]
    one = await stub.ModelMetadata(pb.ModelMetadataRequest(name="colours", version="1"))
    assert list(one.versions) == ["1"]
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name="colours"))).config
    assert (config.name, config.max_batch_size) == ("colours", 256)
    assert [(i.name, i.data_type) for i in config.input] == [("images", pb.TYPE_STRING)]
    assert [list(o.dims) for o in config.output] == [[3], [], [3]]
    for call in (
        stub.ModelMetadata(pb.ModelMetadataRequest(name="nobody")),
        stub.ModelConfig(pb.ModelConfigRequest(name="nobody")),
    ):
        found = await refusal(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_image_files_are_answered_with_probabilities_and_labels(
    service: Service, stub: Any
) -> None:
    await service.make_model()
    files = [image("red"), image("blue", kind="JPEG")]
    for shape in ([2], [2, 1]):
        inputs = [Input(name="any", datatype="BYTES", shape=shape)]
        answer = await stub.ModelInfer(request(*files, inputs=inputs, id="my id"))
        assert (answer.model_name, answer.model_version, answer.id) == ("colours", "1", "my id")
        assert [output.name for output in answer.outputs] == ["probabilities", "labels"]
        assert answer.parameters["calibrated"].bool_param
        probabilities = numbers(answer, "probabilities")
        assert probabilities.shape == (2, 3)
        assert probabilities.argmax(axis=1).tolist() == [2, 0]
        assert probabilities.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
        assert list(answer.outputs[1].shape) == [2]
        assert texts(answer.raw_output_contents[1]) == ["red", "blue"]


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("datatype", ["BYTES", "UINT8", "FP32"])
async def test_every_datatype_raw_or_typed_gets_the_same_answer(
    service: Service, stub: Any, datatype: str, is_raw: bool
) -> None:
    await service.make_model()
    array = pixels(RED, BLUE)
    tensor = Input(name="images", datatype=datatype, shape=array.shape)
    raw = b""
    if datatype == "BYTES":
        files = [image("red"), image("blue")]
        tensor.shape[:] = [2]
        raw = bytes_tensor(*files)
        typed = pb.InferTensorContents(bytes_contents=files)
    elif datatype == "UINT8":
        raw = array.tobytes()
        typed = pb.InferTensorContents(uint_contents=array.ravel().tolist())
    else:
        scaled = (array / 255).astype("<f4")
        raw = scaled.tobytes()
        typed = pb.InferTensorContents(fp32_contents=scaled.ravel().tolist())
    if not is_raw:
        tensor.contents.CopyFrom(typed)
    asked = pb.ModelInferRequest(
        model_name="colours", inputs=[tensor], raw_input_contents=[raw] if is_raw else []
    )
    answer = await stub.ModelInfer(asked)
    assert texts(answer.raw_output_contents[1]) == ["red", "blue"]


async def test_one_decoded_image_needs_no_dimension_for_their_number(
    service: Service, stub: Any
) -> None:
    await service.make_model()
    (one,) = pixels(BLUE)
    inputs = [Input(name="images", datatype="UINT8", shape=one.shape)]
    answer = await stub.ModelInfer(request(inputs=inputs, raw_input_contents=[one.tobytes()]))
    assert numbers(answer, "probabilities").shape == (1, 3)
    assert texts(answer.raw_output_contents[1]) == ["blue"]


async def test_outputs_are_those_asked_for_in_that_order(service: Service, stub: Any) -> None:
    await service.make_model()
    outputs = [Asked(name="features"), Asked(name="labels")]
    answer = await stub.ModelInfer(request(image("red"), outputs=outputs))
    assert [output.name for output in answer.outputs] == ["features", "labels"]
    assert numbers(answer, "features").tolist() == [pytest.approx([1, 0, 0])]
    assert texts(answer.raw_output_contents[1]) == ["red"]


@pytest.mark.parametrize(("k", "answered"), [(1, 1), (2, 2), (99, 3)])
async def test_classes_are_texts_of_probability_index_and_label_best_first(
    service: Service, stub: Any, k: int, answered: int
) -> None:
    await service.make_model()
    parameters = {"classification": pb.InferParameter(int64_param=k)}
    outputs = [Asked(name="probabilities", parameters=parameters)]
    answer = await stub.ModelInfer(request(image("red"), image("blue"), outputs=outputs))
    (output,) = answer.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [2, answered])
    found = [text.split(":") for text in texts(answer.raw_output_contents[0])]
    assert [found[0][1:], found[answered][1:]] == [["2", "red"], ["0", "blue"]]
    for probability, index, label in found:
        assert CLASSES[int(index)] == label
        assert len(probability.partition(".")[2]) == 6
        assert 0 <= float(probability) <= 1


async def test_answers_are_built_in_a_workers_thread(
    service: Service, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make_model()
    built_in: list[str] = []
    build = answers.answer

    def noted(*args: Any) -> pb.ModelInferResponse:
        built_in.append(threading.current_thread().name)
        return build(*args)

    monkeypatch.setattr(answers, "answer", noted)
    await stub.ModelInfer(request(PNG))
    (name,) = built_in
    assert name.startswith("infer-")


async def test_an_answer_of_very_many_classes_as_texts_is_refused(
    service: Service, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await service.make_model()
    monkeypatch.setattr(predictions, "MAX_SCORES", 5)
    for k, refused in ((2, False), (3, True)):
        parameters = {"classification": pb.InferParameter(int64_param=k)}
        outputs = [Asked(name="probabilities", parameters=parameters)]
        call = stub.ModelInfer(request(image("red"), image("blue"), outputs=outputs))
        if refused:
            assert "are 6 scores" in (await refusal(call)).message
        else:
            await call


async def test_versions_are_named_by_number_and_alias(service: Service, stub: Any) -> None:
    await service.make_model()
    await service.make_model()
    await service.models.SetAlias(
        model_pb2.SetAliasRequest(model="colours", alias="prod", version=1)
    )
    for asked, answered in (("", "2"), ("1", "1"), ("prod", "1"), ("latest", "2")):
        answer = await stub.ModelInfer(request(image("red"), model_version=asked))
        assert answer.model_version == answered
    found = await refusal(stub.ModelInfer(request(image("red"), model_version="canary")))
    assert found.reason == "ALIAS_NOT_FOUND"
    found = await refusal(stub.ModelInfer(request(image("red"), model_version="7")))
    assert found.reason == "VERSION_NOT_FOUND"


async def test_a_bad_image_fails_the_call_and_is_named(service: Service, stub: Any) -> None:
    await service.make_model()
    found = await refusal(stub.ModelInfer(request(image("red"), b"no image", b"")))
    assert (found.code, found.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "IMAGE_UNREADABLE",
    )
    assert found.field == "inputs[0][1]"
    assert "image 1" in found.message
    inputs = [Input(datatype="FP32", shape=[1, 1, 3])]
    asked = request(inputs=inputs, raw_input_contents=[np.array([0, 9, 0], "<f4").tobytes()])
    found = await refusal(stub.ModelInfer(asked))
    assert (found.reason, found.field) == ("TENSOR_INVALID", "inputs[0][0]")


def typed(datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest:
    tensor = Input(datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))
    return request(inputs=[tensor], raw_input_contents=[])


SHARED = {"shared_memory_region": pb.InferParameter(string_param="mine")}
PNG = image("red")


REFUSED = [
    (request(inputs=[]), "inputs"),
    (request(inputs=[Input(), Input()]), "inputs"),
    (request(inputs=[Input(datatype="INT64", shape=[1])]), "inputs[0].datatype"),
    (request(inputs=[Input(datatype="BYTES")]), "inputs[0].shape"),
    (request(inputs=[Input(datatype="BYTES", shape=[0])]), "inputs[0].shape"),
    (request(inputs=[Input(datatype="BYTES", shape=[1, 2])]), "inputs[0].shape"),
    (request(inputs=[Input(datatype="BYTES", shape=[2**62])]), "inputs[0].shape"),
    (request(inputs=[Input(datatype="UINT8", shape=[224, 224])]), "inputs[0].shape"),
    (request(inputs=[Input(datatype="UINT8", shape=[1, 3, 2, 2])]), "inputs[0].shape"),
    (request(inputs=[Input(datatype="UINT8", shape=[-1, 2, 2, 3])]), "inputs[0].shape"),
    (request(PNG, PNG, inputs=[Input(datatype="BYTES", shape=[1])]), "inputs[0]"),
    (request(PNG, inputs=[Input(datatype="BYTES", shape=[2])]), "inputs[0]"),
    (request(PNG, raw_input_contents=[b"\x01\x00"]), "inputs[0]"),
    (request(PNG, raw_input_contents=[b"\xff\xff\xff\xff" + PNG]), "inputs[0]"),
    (request(PNG, raw_input_contents=[b"", b""]), "raw_input_contents"),
    (request(PNG, inputs=typed("BYTES", [1], bytes_contents=[PNG]).inputs),
     "inputs[0].contents"),
    (request(PNG, raw_input_contents=[]), "inputs[0]"),
    (typed("UINT8", [1, 1, 3], uint_contents=[0, 0]), "inputs[0]"),
    (typed("UINT8", [1, 1, 3], uint_contents=[0, 0, 256]), "inputs[0][0]"),
    (typed("FP32", [1, 1, 3], uint_contents=[0, 0, 1]), "inputs[0]"),
    (request(inputs=[Input(datatype="UINT8", shape=[2**40, 2**40, 3])]), "inputs[0]"),
    (request(inputs=[Input(datatype="BYTES", shape=[1], parameters=SHARED)]),
     "inputs[0].parameters"),
    (request(PNG, outputs=[Asked(name="logits")]), "outputs[0].name"),
    (request(PNG, outputs=[Asked(name="labels")] * 2), "outputs[1].name"),
    (request(PNG, outputs=[Asked(name="labels", parameters=SHARED)]),
     "outputs[0].parameters"),
    (request(PNG, outputs=[Asked(name="labels", parameters={
        "classification": pb.InferParameter(int64_param=1)})]), "outputs[0].parameters"),
    (request(PNG, outputs=[Asked(name="probabilities", parameters={
        "classification": pb.InferParameter(int64_param=0)})]), "outputs[0].parameters"),
    (request(PNG, parameters={"timeout": pb.InferParameter(int64_param=-1)}), "parameters"),
]  # fmt: skip


async def test_a_request_that_cannot_be_meant_is_refused_by_field(
    service: Service, stub: Any
) -> None:
    await service.make_model()
    for number, (asked, field) in enumerate(REFUSED):
        found = await refusal(stub.ModelInfer(asked))
        assert (number, found.code, found.field) == (
            number,
            grpc.StatusCode.INVALID_ARGUMENT,
            field,
        )


async def test_parameters_that_nobody_knows_are_ignored(service: Service, stub: Any) -> None:
    await service.make_model()
    unknown = {"priority": pb.InferParameter(uint64_param=3)}
    asked = request(image("red"), parameters=unknown)
    asked.inputs[0].parameters["binary_data_size"].int64_param = 1
    answer = await stub.ModelInfer(asked)
    assert texts(answer.raw_output_contents[1]) == ["red"]


async def test_a_timeout_in_the_request_shortens_the_deadline(service: Service, stub: Any) -> None:
    await service.make_model()
    assert (await stub.ModelInfer(request(PNG))).outputs
    (session,) = service.runtime.sessions.values()
    session.hold()
    try:
        parameters = {"timeout": pb.InferParameter(int64_param=50_000)}
        found = await refusal(stub.ModelInfer(request(PNG, parameters=parameters), timeout=GUARD_S))
        assert (found.code, found.reason) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "DEADLINE_EXCEEDED",
        )
        assert "0.05 s" in found.message
    finally:
        session.release()


async def test_a_stream_answers_every_request_and_outlives_errors(
    service: Service, stub: Any
) -> None:
    await service.make_model()

    async def requests() -> AsyncIterator[pb.ModelInferRequest]:
        for number in range(80):
            yield request(image("red") if number % 2 else b"none", id=str(number))

    found: dict[str, pb.ModelStreamInferResponse] = {}
    async for response in stub.ModelStreamInfer(requests()):
        found[response.infer_response.id] = response
    assert sorted(map(int, found)) == list(range(80))
    for number, response in ((int(name), r) for name, r in found.items()):
        if number % 2:
            assert not response.error_message
            answer = response.infer_response
            assert texts(answer.raw_output_contents[1]) == ["red"]
            assert answer.parameters["triton_final_response"].bool_param
        else:
            assert "image 0" in response.error_message
            assert not response.infer_response.outputs


async def test_answers_of_a_stream_come_as_they_are_ready(service: Service, stub: Any) -> None:
    await service.make_model()
    (session,) = service.runtime.sessions.values()
    session.hold()
    call = stub.ModelStreamInfer()
    try:
        await call.write(request(image("red"), id="slow"))
        await call.write(request(image("red"), id="wrong", model_name="nobody"))
        first = await call.read()
        assert (first.infer_response.id, first.infer_response.model_name) == ("wrong", "nobody")
        assert "nobody" in first.error_message
    finally:
        session.release()
    assert (await call.read()).infer_response.id == "slow"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_the_index_names_every_model_and_whether_it_is_in_memory(
    make_service: MakeService,
) -> None:
    service: Service = await make_service()
    for name in ("second", "first", "first"):
        await service.make_model(name)
    await close(service)

    service = await make_service()
    stub: Any = GRPCInferenceServiceStub(service.channel)

    async def index() -> list[tuple[str, ...]]:
        answer = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
        return [(m.name, m.version, m.state, m.reason) for m in answer.models]

    assert await index() == [
        ("first", "2", "READY", "loads on demand"),
        ("second", "1", "READY", "loads on demand"),
    ]
    await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="first"))
    assert (await index())[0] == ("first", "2", "READY", "in memory")


async def test_an_unloaded_model_answers_again_when_asked(service: Service, stub: Any) -> None:
    await service.make_model()
    load = pb.RepositoryModelLoadRequest(model_name="colours")
    unload = pb.RepositoryModelUnloadRequest(model_name="colours")
    await stub.RepositoryModelLoad(load)
    await stub.RepositoryModelLoad(load)
    await stub.RepositoryModelUnload(unload)
    await stub.RepositoryModelUnload(unload)
    answer = await stub.ModelInfer(request(image("red")))
    assert texts(answer.raw_output_contents[1]) == ["red"]


async def test_what_the_repository_cannot_do_is_refused(service: Service, stub: Any) -> None:
    await service.make_model()
    config = {"config": pb.ModelRepositoryParameter(string_param="{}")}
    cases = {
        "repository_name": (
            stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="other")),
            stub.RepositoryModelLoad(
                pb.RepositoryModelLoadRequest(repository_name="other", model_name="colours")
            ),
            stub.RepositoryModelUnload(
                pb.RepositoryModelUnloadRequest(repository_name="other", model_name="colours")
            ),
        ),
        "parameters": (
            stub.RepositoryModelLoad(
                pb.RepositoryModelLoadRequest(model_name="colours", parameters=config)
            ),
        ),
    }
    for field, calls in cases.items():
        for call in calls:
            found = await refusal(call)
            assert (found.code, found.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    for call in (
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nobody")),
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="nobody")),
    ):
        assert (await refusal(call)).reason == "MODEL_NOT_FOUND"


async def test_statistics_count_what_each_version_was_asked(service: Service, stub: Any) -> None:
    await service.make_model()
    await service.make_model()
    await stub.ModelInfer(request(image("red"), image("blue"), model_version="1"))
    await stub.ModelInfer(request(image("red"), model_version="1"))
    answer = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="colours"))
    first, second = answer.model_stats
    assert (first.name, first.version, second.version) == ("colours", "1", "2")
    assert (first.inference_count, first.execution_count) == (3, 2)
    assert first.last_inference > 1.7e12
    stats = first.inference_stats
    assert (stats.success.count, stats.fail.count, stats.queue.count) == (2, 0, 2)
    assert stats.success.ns >= stats.compute_input.ns > 0
    assert (second.inference_count, second.last_inference) == (0, 0)
    assert second.inference_stats.success.count == 0
    one = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="colours", version="latest"))
    assert [found.version for found in one.model_stats] == ["2"]
    every = await stub.ModelStatistics(pb.ModelStatisticsRequest())
    assert [(s.name, s.version) for s in every.model_stats] == [("colours", "1")]
    found = await refusal(stub.ModelStatistics(pb.ModelStatisticsRequest(name="nobody")))
    assert found.reason == "MODEL_NOT_FOUND"
