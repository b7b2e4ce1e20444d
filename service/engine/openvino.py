"""OpenVINO, by its own runtime: as quick as through ONNX Runtime's plugin, and on any make of CPU.

The only importer of `openvino`. Same files, same inputs, same outputs.
"""

import threading
from typing import Any

import numpy as np
import openvino as ov

from service.domain import Precision
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import openvino_config


class OpenVinoGraph:
    """Runs one compiled file, for as many threads at once as it has streams."""

    def __init__(self, model: bytes, precision: Precision, cores: int, streams: int) -> None:
        core = ov.Core()
        self._compiled = core.compile_model(
            core.read_model(model), "CPU", openvino_config(precision, cores, streams)
        )
        self.size = int(self._compiled.input(0).partial_shape[1].get_length())
        self.feature_dim = int(self._compiled.output(0).partial_shape[1].get_length())
        self._requests = threading.local()

    def run(self, images: Pixels) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]."""
        request: Any = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._compiled.create_infer_request()
        # Set by hand: the dispatch of Python's arguments costs more than a small run.
        # It shares only what it might write to; an image from Pillow is read-only.
        images = np.require(images, requirements=["C", "W"])
        request.set_input_tensor(ov.Tensor(images, shared_memory=True))
        request.infer()
        # A copy: the request's next run writes over its output.
        features: Floats = request.get_output_tensor().data.copy()
        return features
