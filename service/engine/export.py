"""Composes self-contained ONNX files of published versions, one at a time."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from service.domain import ImageDecoding, ModelFiles
from service.engine import head as heads
from service.engine import preprocess
from service.engine.engine import ReadFile
from service.engine.head import Head


class Exporter:
    """Composes files in a thread of its own. Stops with `close`."""

    def __init__(self, read: ReadFile) -> None:
        self._read = read
        # One thread: each that composed a file would keep the memory that it took.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="export")

    async def export(self, files: ModelFiles, metadata: dict[str, str]) -> bytes:
        """Returns the ONNX file with its metadata; raises Damaged (MODEL_UNLOADABLE)."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._export, files, metadata)

    def close(self) -> None:
        """Ends the thread; waits for the file that it composes."""
        self._threads.shutdown()

    def _export(self, files: ModelFiles, metadata: dict[str, str]) -> bytes:
        head = heads.load(self._read(files.head_digest, "head"))
        backbone = self._read(files.backbone_digest, "backbone")
        return compose(backbone, head, metadata, files.decoding)


def compose(
    backbone: bytes, head: Head, metadata: dict[str, str], decoding: ImageDecoding
) -> bytes:
    """Appends the head to the backbone's graph and returns the new file's bytes.

    uint8 images [n, size, size, 3] in, probabilities float32 [n, classes] out; the normalisation
    comes with the backbone, the softmax and the temperature with the head. The labels are in the
    metadata under "labels", as a JSON list. Under "preprocess" is how an image becomes pixels, as a
    JSON object: what `preprocess.describe` returns, and the fields of the version's
    `ImageDecoding`. Under "calibrated" is `Head.is_calibrated` as JSON, and under "decision" how
    probabilities become an answer: the fields of the version's `Decision`, and `prior`, the
    classes' shares in its training (null where all are alike).
    """
    # Imported late: a third of a second and 30 MB that serving does without.
    import onnx  # noqa: PLC0415
    from onnx import helper, numpy_helper  # noqa: PLC0415

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
