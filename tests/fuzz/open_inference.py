"""Requests of the Open Inference Protocol: tensors, outputs, parameters, versions."""

import struct
from typing import Any

from google.protobuf.message import DecodeError

from service.auth.principal import EVERYBODY, enter
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference.servicer import OpenInferenceServicer
from tests.fuzz.messages import made
from tests.fuzz.promise import Broken, Target
from tests.fuzz.requests import Classifier, finished

KINDS = (pb.ModelInferRequest,)
_MAX_IMAGES = 8


def run(data: bytes) -> None:
    """One request: refused, or answered with an output for each that was asked for."""
    try:
        request = made(KINDS, data)
    except DecodeError:
        return
    enter(EVERYBODY)
    nothing: Any = None
    classifier: Any = Classifier()
    servicer: Any = OpenInferenceServicer(
        classifier,
        classifier,
        nothing,
        version="1",
        is_ready=lambda: True,
        max_images=_MAX_IMAGES,
        timeout_s=1.0,
    )
    answer = finished(servicer._infer(request, 1.0))
    if len(answer.outputs) != len(answer.raw_output_contents) or not answer.outputs:
        raise Broken(f"{len(answer.outputs)} outputs")
    answer.SerializeToString()


def seeds() -> list[bytes]:
    """Every datatype, raw and typed; outputs and parameters."""
    tensor = pb.ModelInferRequest.InferInputTensor
    output = pb.ModelInferRequest.InferRequestedOutputTensor
    best = {"classification": pb.InferParameter(int64_param=2)}
    asked = [
        _request([tensor(datatype="BYTES", shape=[1])], struct.pack("<I", 2) + b"\xff\xd8"),
        _request([tensor(datatype="BYTES", shape=[2, 1])], struct.pack("<I", 0) * 2),
        _request([tensor(datatype="UINT8", shape=[1, 1, 1, 3])], b"abc"),
        _request([tensor(datatype="FP32", shape=[1, 1, 3])], struct.pack("<3f", 0, 0.5, 1)),
        _request(
            [
                tensor(
                    datatype="UINT8",
                    shape=[2, 1, 1, 3],
                    contents=pb.InferTensorContents(uint_contents=range(6)),
                )
            ]
        ),
        _request(
            [
                tensor(
                    datatype="FP32",
                    shape=[1, 1, 3],
                    contents=pb.InferTensorContents(fp32_contents=[0, 0.5, 1]),
                )
            ],
            outputs=[output(name="probabilities", parameters=best), output(name="features")],
            parameters={
                "timeout": pb.InferParameter(int64_param=1000),
                "decision": pb.InferParameter(string_param="balanced"),
            },
            model_version="3",
        ),
    ]
    return [
        *(bytes([KINDS.index(type(m)), 1]) + m.SerializeToString() for m in asked),
        *(bytes([0, 0]) + bytes(range(start, 250)) for start in (1, 2, 60, 120)),
    ]


def _request(inputs: list[Any], *raw: bytes, **fields: Any) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="cats", inputs=inputs, raw_input_contents=raw, **fields)


TARGET = Target("open_inference", run, seeds, modules=("service", "tests.fuzz.messages"))
