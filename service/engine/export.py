"""Composes one self-contained ONNX classifier of a backbone and a head.

uint8 images [n, size, size, 3] in, probabilities float32 [n, classes] out;
the normalisation comes with the backbone, the softmax and the temperature with
the head. The labels are in the metadata under "labels", as a JSON list. Under "preprocess"
is how an image becomes pixels, as a JSON object: what `preprocess.describe` returns, and the
fields of the version's `ImageDecoding`. Under "calibrated" is `Head.is_calibrated` as JSON, and
under "decision" how probabilities become an answer: the fields of the version's `Decision`, and
`prior`, the classes' shares in its training (null where all are alike).
"""

import json

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from service.domain import ImageDecoding
from service.engine import preprocess
from service.engine.head import Head


def compose(
    backbone: bytes, head: Head, metadata: dict[str, str], decoding: ImageDecoding
) -> bytes:
    """Appends the head to the backbone's graph and returns the new file's bytes."""
    model = onnx.load_from_string(backbone)
    graph = model.graph
    (features,) = (value.name for value in graph.output)
    # The temperature divides the logits, so it goes into the weights.
    scale = 1 / head.temperature
    if head.feature_dim < graph.output[0].type.tensor_type.shape.dim[1].dim_value:
        ends = [("head.from", 0), ("head.to", head.feature_dim), ("head.axis", 1)]
        graph.initializer.extend(
            numpy_helper.from_array(np.array([at], np.int64), name) for name, at in ends
        )
        names = [name for name, _ in ends]
        graph.node.append(helper.make_node("Slice", [features, *names], ["head.features"]))
        features = "head.features"
    graph.initializer.extend(
        [
            numpy_helper.from_array((head.matrix.T * scale).astype("float32"), "head.weight"),
            numpy_helper.from_array((head.bias * scale).astype("float32"), "head.bias"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Gemm", [features, "head.weight", "head.bias"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ]
    )
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(
            "probabilities", onnx.TensorProto.FLOAT, ["n", len(head.classes)]
        )
    )
    properties = {
        "labels": json.dumps(head.classes, ensure_ascii=False),
        "preprocess": json.dumps(preprocess.describe(decoding) | msgspec.structs.asdict(decoding)),
        "calibrated": json.dumps(head.is_calibrated),
        "decision": json.dumps(_decision(head), ensure_ascii=False),
        **metadata,
    }
    del model.metadata_props[:]
    helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def _decision(head: Head) -> dict[str, object]:
    prior = None if head.prior is None else head.prior.tolist()
    return {**msgspec.structs.asdict(head.decision), "prior": prior}
