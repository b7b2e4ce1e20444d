"""ONNX files that are to be backbones, from their bytes to the form that serves; none is run."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from service.ingest import backbone_graph
from service.ingest.backbone_process import Asked
from tests.extractors import MEAN, SIZE, STD, convolution, extractor, pooling, weights
from tests.fuzz.promise import Broken, Target

ASKED = (
    Asked(size=SIZE, mean=MEAN, std=STD),
    Asked(size=SIZE, mean=MEAN, std=STD, layout="nhwc", output="map"),
)
_MEMORY = Path("/dev/shm")


@cache
def _file() -> Path:
    where = _MEMORY if _MEMORY.is_dir() else None
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=where)) / "given.onnx"


def run(data: bytes) -> None:
    """Reads it under one of two descriptions; what is taken has our form, and names no file."""
    asked = ASKED[len(data) % 2]
    _file().write_bytes(data)
    model = backbone_graph.read(_file(), asked)
    backbone_graph.into_our_form(model, asked, 12, is_map=bool(data[-1:] > b"\x7f"))
    graph = model.graph
    if [value.name for value in (*graph.input, *graph.output)] != ["images", "features"]:
        raise Broken(f"it has {graph.input} and {graph.output}")
    if model.functions or {entry.domain for entry in model.opset_import} != {""}:
        raise Broken("it has operators of its own")
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute)]
    if any(tensor.external_data or tensor.data_location for tensor in tensors):
        raise Broken("its weights lie elsewhere")


def seeds() -> list[bytes]:
    """Whole files, small, with what may be in one."""
    small = numpy_helper.from_array(np.ones((2, 3, 8, 8), np.float32), "kernels")
    node = helper.make_node("Constant", [], ["kernels"], value=small)
    models = [
        extractor(initializers=[small]),
        extractor([node, *convolution(), *pooling()], initializers=[]),
        extractor(initializers=[weights(1)], opsets={"": 11, "com.microsoft": 1}),
        extractor(outputs=["map"], inputs={"pixel_values": None}),
        extractor(inputs={"pixel_values": (1, SIZE, SIZE, 3)}, initializers=[small]),
    ]
    models[0].graph.value_info.append(
        helper.make_tensor_value_info("conv", TensorProto.FLOAT, ["n", 2, 6, 6])
    )
    models[1].metadata_props.add(key="license", value="MIT")
    return [model.SerializeToString() for model in models]


TARGET = Target(
    "backbones",
    run,
    seeds,
    modules=("service.ingest.backbone_graph",),
    max_bytes=8192,
)
