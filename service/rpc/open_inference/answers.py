"""The outputs that a request asks for, made of classified images."""

from collections.abc import Callable, Sequence

import numpy as np

from service.engine.engine import Classified, Outcome
from service.engine.head import NONE, Floats
from service.errors import GraftError, bad_field
from service.rpc.codec.predictions import best, check_scores
from service.rpc.open_inference import grpc_predict_v2_pb2 as pb
from service.rpc.open_inference import tensors

Written = tuple[str, list[int], bytes]
"""An output's datatype, shape and elements."""
Write = Callable[[Sequence[Classified]], Written]
"""Makes one output of all images."""


def outputs(request: pb.ModelInferRequest) -> dict[str, Write]:
    """Returns a writer for each output that is asked for, in order; raises InvalidInput."""
    if not request.outputs:
        return {name: _OUTPUTS[name] for name in ("probabilities", "labels")}
    asked: dict[str, Write] = {}
    for index, output in enumerate(request.outputs):
        field = f"outputs[{index}]"
        if output.name not in _OUTPUTS:
            raise bad_field(
                f"{field}.name",
                f"there is no output {output.name[:80]!r}: ask for {', '.join(_OUTPUTS)}",
            )
        if output.name in asked:
            raise bad_field(f"{field}.name", f"the output {output.name} is asked for twice")
        tensors.refuse_shared_memory(output.parameters, field)
        asked[output.name] = _OUTPUTS[output.name]
        if "classification" in output.parameters:
            k = output.parameters["classification"].int64_param
            if output.name != "probabilities" or k < 1:
                raise bad_field(
                    f"{field}.parameters",
                    "classification is for the output probabilities, with a number of classes "
                    "from 1",
                )
            asked[output.name] = _best(k)
    return asked


def answer(
    request: pb.ModelInferRequest,
    asked: dict[str, Write],
    version: int,
    by_model: Sequence[Sequence[Outcome]],
) -> pb.ModelInferResponse:
    """Makes the one model's answer; raises the first bad image's error, as it can carry none."""
    (outcomes,) = by_model
    classified = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, GraftError):
            raise _whole(outcome, index)
        classified.append(outcome)
    response = pb.ModelInferResponse(
        model_name=request.model_name, model_version=str(version), id=request.id
    )
    response.parameters["calibrated"].bool_param = all(image.is_calibrated for image in classified)
    for name, write in asked.items():
        datatype, shape, elements = write(classified)
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(elements)
    return response


def _whole(error: GraftError, index: int) -> GraftError:
    if error.field:  # it is about the tensor, not about one image
        return error
    return type(error)(
        error.reason,
        f"image {index} (from 0), and so the whole call: {error.message}",
        field=f"inputs[0][{index}]",
        retry_after_s=error.retry_after_s,
    )


def _floats(rows: list[Floats]) -> Written:
    return "FP32", [len(rows), len(rows[0])], np.stack(rows).astype("<f4").tobytes()


def _labels(images: Sequence[Classified]) -> Written:
    # No class has an empty name.
    named = ["" if image.answer == NONE else image.classes[image.answer] for image in images]
    return "BYTES", [len(named)], tensors.texts(named)


def _best(k: int) -> Write:
    def write(images: Sequence[Classified]) -> Written:
        check_scores([len(image.classes) for image in images], k, "outputs")
        rows = [_ranked(image, k) for image in images]
        elements = tensors.texts(text for row in rows for text in row)
        return "BYTES", [len(rows), len(rows[0])], elements

    return write


def _ranked(image: Classified, k: int) -> list[str]:
    # Six digits, as Triton prints them.
    return [
        f"{image.probabilities[i]:f}:{i}:{image.classes[i]}"
        for i in best(image.probabilities, k).tolist()
    ]


_OUTPUTS: dict[str, Write] = {
    "probabilities": lambda images: _floats([image.probabilities for image in images]),
    "labels": _labels,
    "features": lambda images: _floats([image.features for image in images]),
}
