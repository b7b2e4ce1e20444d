"""Tiny feature extractors as ONNX files, such as somebody may bring along."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

SIZE, WIDTH = 48, 12
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights(width: int = WIDTH, seed: int = 0) -> TensorProto:
    """Makes the kernels of a convolution that sees 8 by 8 pixels of three colours."""
    rng = np.random.default_rng(seed)
    return numpy_helper.from_array(
        rng.normal(0, 0.1, (width, 3, 8, 8)).astype(np.float32), "kernels"
    )


def convolution(images: str = "pixel_values") -> list[NodeProto]:
    """Makes the nodes from images to `map`, [n, width, size / 8, size / 8]."""
    return [
        helper.make_node("Conv", [images, "kernels"], ["conv"], "encoder/conv", strides=[8, 8]),
        helper.make_node("Relu", ["conv"], ["map"], "encoder/relu"),
    ]


def pooling() -> list[NodeProto]:
    """Makes the nodes from `map` to `embedding`, [n, width]."""
    return [
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["embedding"], "flatten"),
    ]


def layered(width: int = WIDTH, seed: int = 0) -> onnx.ModelProto:
    """Makes a model of three convolutions, the one between the ends over small maps.

    The later two change little: features tell apart what those of one convolution do.
    """
    rng = np.random.default_rng([seed, 1])

    def pointwise(name: str) -> TensorProto:
        kernels = np.eye(width) + rng.normal(0, 0.02, (width, width))
        return numpy_helper.from_array(kernels[..., None, None].astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernels"], ["conv1"], "stem", strides=[8, 8]),
        helper.make_node("Relu", ["conv1"], ["map1"], "stem/relu"),
        helper.make_node("Conv", ["map1", "between"], ["conv2"], "middle"),
        helper.make_node("Relu", ["conv2"], ["map2"], "middle/relu"),
        helper.make_node("Conv", ["map2", "late"], ["conv3"], "last"),
        helper.make_node("Relu", ["conv3"], ["map"], "last/relu"),
        *pooling(),
    ]
    kernels = [weights(width, seed), pointwise("between"), pointwise("late")]
    return extractor(nodes, initializers=kernels)


def extractor(
    nodes: Sequence[NodeProto] | None = None,
    *,
    outputs: Sequence[str] = ("embedding",),
    inputs: dict[str, Sequence[int | str | None] | None] | None = None,
    kind: int = TensorProto.FLOAT,
    initializers: Sequence[TensorProto] | None = None,
    opsets: dict[str, int] | None = None,
    **changes: Any,
) -> onnx.ModelProto:
    """Makes a model; by default one convolution over NCHW floats, pooled to 12 features."""
    graph = helper.make_graph(
        [*convolution(), *pooling()] if nodes is None else nodes,
        "torch_jit",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, shape in (inputs or {"pixel_values": ["batch", 3, SIZE, SIZE]}).items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [weights()] if initializers is None else initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(d, v) for d, v in (opsets or {"": 17}).items()],
        producer_name="pytorch",
        ir_version=8,
        **changes,
    )
    model.graph.doc_string = "made at /home/somebody"
    return model


def write(path: Path, model: onnx.ModelProto | None = None) -> Path:
    """Writes a model to a file."""
    path.write_bytes((model or extractor()).SerializeToString())
    return path
