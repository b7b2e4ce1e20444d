"""Loads backbones into memory, and runs them on the chosen provider.

A session that does not run on the chosen provider is an error, never a silent
step down; but a backbone so small that OpenVINO's threads cost more than its
kernels runs on ONNX Runtime's CPU provider where that was measured to be quicker,
and the log says so. Tests put a fake `Runtime` in its place.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.domain import Precision
from service.engine import providers
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import Provider, ProviderUnavailable
from service.errors import Exhausted, GraftError, Reason, unloadable
from service.ops.cpus import available_cores

log = logging.getLogger(__name__)

_PAYS = 0.97
"""A batch twice as large pays when an image then takes at most this part of the time."""
_MEASURE_S = 0.5
"""Longest search for the largest batch that pays."""
_TRIES, _TRIED_S = 30, 0.01
"""Most runs that time a batch, and the time after which there are no more."""
_SMALL_S = 0.001
"""An image that takes less lets OpenVINO be compared with ONNX Runtime's CPU provider."""
_BESIDE = b"location"
"""Occurs in a graph whose weights lie in files beside it, and in none of ours."""
_AGAIN_S = 60.0
"""Time after which a narrow graph that could not be made is tried again."""


Read = Callable[[], bytes]
"""Reads a backbone's whole file, and checks that it is what was stored."""


class Session(Protocol):
    """A backbone in memory."""

    @property
    def size(self) -> int:
        """Side of the images that it takes, pixels."""

    @property
    def feature_dim(self) -> int:
        """Number of features of an image."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""

    @property
    def precision(self) -> str:
        """Precision that it computes in: `fp32`, `bf16`, `fp16` or `int8`."""

    @property
    def max_batch(self) -> int:
        """Largest batch that still pays."""

    @property
    def infer_s(self) -> float:
        """Seconds that one core computes for an image, about."""

    def run(self, images: Pixels, cores: int = 0) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]. Thread-safe; blocks.

        May use `cores` of the machine's cores (0: all that it was made for).
        """


class Runtime(Protocol):
    """Loads backbones."""

    @property
    def provider(self) -> str:
        """Name of the provider: `tensorrt`, `cuda`, `openvino` or `cpu`."""

    def load(self, read: Read) -> Session:
        """Loads a backbone; blocks.

        `read` may be called again later. Raises Damaged (MODEL_UNLOADABLE) for a file that
        cannot be loaded, Exhausted (OUT_OF_MEMORY), and what `read` raises.
        """


class Graph(Protocol):
    """A file that was made ready to run on a number of cores."""

    size: int
    feature_dim: int
    precision: str

    def run(self, images: Pixels) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]; thread-safe."""


Compile = Callable[[bytes, int], Graph]
"""Makes a graph of a file's bytes, for as many cores as a run may use."""


class OnnxRuntime:
    """Backbones on one chosen provider.

    `max_batch` above 1 lets every load search for the largest batch that pays, up to
    that; a load takes up to half a second longer, and its kernels are warm after.
    `is_narrow` makes the graph for one core at load, for those who have many
    images at once and run them side by side; the wide one is then never made.
    """

    def __init__(
        self,
        provider: Provider,
        threads: int = 0,
        precision: Precision = "exact",
        *,
        max_batch: int = 1,
        is_narrow: bool = False,
    ) -> None:
        self._is_narrow = is_narrow
        self._provider = provider
        self._precision = precision
        self._cores = threads or available_cores()
        self._max_batch = max_batch

    @property
    def provider(self) -> str:
        """Name of the provider: `tensorrt`, `cuda`, `openvino` or `cpu`."""
        return self._provider.name

    @property
    def precision(self) -> Precision:
        """Precision that was asked for; a session may compute in another."""
        return self._precision

    @property
    def why(self) -> str:
        """Reason why this provider was chosen."""
        return self._provider.why

    def load(self, read: Read) -> "BackboneSession":
        """Loads a backbone; blocks for its bytes to be read and its graph optimised."""
        try:
            session = self._measured(read, self._compile)
            if self._provider.name == "openvino" and 0 < session.lone_s < _SMALL_S:
                session = self._quicker(read, session)
        except (ProviderUnavailable, GraftError):
            raise
        except MemoryError as error:
            raise Exhausted(
                Reason.OUT_OF_MEMORY,
                "there is no memory to load the version's backbone: try again",
            ) from error
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise unloadable("backbone", "cannot be loaded") from error
        return session

    def _measured(self, read: Read, compile_graph: Compile) -> "BackboneSession":
        session = BackboneSession(
            read, compile_graph, self._cores, self._provider.is_gpu, self._is_narrow
        )
        session.measure(self._max_batch)
        return session

    def _quicker(self, read: Read, session: "BackboneSession") -> "BackboneSession":
        # After a run on several cores OpenVINO's threads spin for about a millisecond: more
        # than a small graph costs.
        plain = self._measured(read, _cpu_graph)
        if plain.lone_s >= session.lone_s:
            return session
        log.info(
            "a small backbone is quicker on the CPU provider and runs there",
            extra={
                "cpu_us": round(plain.lone_s * 1e6),
                "openvino_us": round(session.lone_s * 1e6),
            },
        )
        return plain

    def _compile(self, model: bytes, cores: int) -> Graph:
        if self._provider.name == "openvino":
            streams = max(1, self._cores // cores)
            return _openvino_graph(model, self._precision, self._cores, streams)
        if self._provider.is_gpu:
            if self._precision != "exact":
                model = _half(model)
            options = _options(1)
            wanted = providers.gpu_providers(self._provider.name)
            session = ort.InferenceSession(
                model, options, providers=[*wanted, "CPUExecutionProvider"]
            )
            return OnnxGraph(
                session, wanted[0][0], "fp32" if self._precision == "exact" else "fp16", True
            )
        return _cpu_graph(model, cores)


class BackboneSession:
    """Holds a backbone: a graph that uses all cores and, made when needed, narrower ones.

    Runs at the same time are faster each on its own core than each on all; a run
    that is alone is fastest on all. So a machine of n cores gets graphs for n, for
    about the square root of n, and for one; a GPU has one graph.
    """

    def __init__(
        self,
        read: Read,
        compile_graph: Compile,
        cores: int,
        is_gpu: bool,
        is_narrow: bool = False,
    ) -> None:
        model = read()
        if _BESIDE in model:
            raise unloadable("backbone", "names other files, which it may not")
        self._read = read
        self._compile = compile_graph
        self._widths = [cores] if is_gpu else sorted({cores, round(cores**0.5), 1}, reverse=True)
        if is_narrow:
            self._widths = self._widths[-1:]
        self._graphs = {self._widths[0]: compile_graph(model, self._widths[0])}
        self._compiling = threading.Lock()
        self._not_before: dict[int, float] = {}
        """Times from which a graph that could not be made is tried again, by width."""
        self._widest = self._graphs[self._widths[0]]
        self.size, self.feature_dim = self._widest.size, self._widest.feature_dim
        is_int8 = b"DequantizeLinear" in model or b"QLinearConv" in model
        self.precision = "int8" if is_int8 else self._widest.precision
        # For each graph the weights, once as read and packed for the kernels;
        # activations and the arena come on top. Measured on the backbones that we ship.
        self.nbytes = 2 * len(model) * len(self._widths) + 16 * 2**20
        self.max_batch = 1
        self.infer_s = 0.0
        self.lone_s = 0.0
        """Seconds of one image on all cores; 0 where it was not measured."""

    def run(self, images: Pixels, cores: int = 0) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]."""
        return self._graph(cores or self._widths[0]).run(images)

    def measure(self, most: int) -> None:
        """Finds the largest batch, up to `most`, that still pays, and warms the kernels."""
        if most <= 1:
            return
        begun = time.monotonic()
        best_s = float("inf")
        batch = 1
        while batch <= most and time.monotonic() - begun < _MEASURE_S:
            images = np.zeros((batch, self.size, self.size, 3), np.uint8)
            self._widest.run(images)
            each_s = self._quickest_s(images) / batch
            if each_s > best_s * _PAYS:
                break
            best_s, self.max_batch = each_s, batch
            self.lone_s = self.lone_s or each_s
            batch *= 2
        self.infer_s = best_s * self._widths[0]

    def _quickest_s(self, images: Pixels) -> float:
        # A short run is easily disturbed, and one that was would end the search too early.
        begun = ended = time.monotonic()
        quickest = float("inf")
        for _ in range(_TRIES):
            started = ended
            self._widest.run(images)
            ended = time.monotonic()
            quickest = min(quickest, ended - started)
            if ended - begun > _TRIED_S:
                break
        return quickest

    def _graph(self, cores: int) -> Graph:
        width = next((width for width in self._widths if width <= cores), self._widths[-1])
        graph = self._graphs.get(width)
        if graph is not None:
            return graph
        if not self._compiling.acquire(blocking=False):
            return self._widest  # another thread is at it
        try:
            if time.monotonic() < self._not_before.get(width, 0):
                return self._widest
            self._graphs[width] = self._compile(self._read(), width)
        except Exception:
            # The widest does as well, only slower; for a while, since the reason may pass.
            log.warning("a narrow graph of a backbone cannot be made", exc_info=True)
            self._not_before[width] = time.monotonic() + _AGAIN_S
            return self._widest
        finally:
            self._compiling.release()
        return self._graphs[width]


class OnnxGraph:
    """An ONNX Runtime session; on a GPU with batches of few sizes."""

    def __init__(
        self, session: ort.InferenceSession, provider: str, precision: str, is_gpu: bool
    ) -> None:
        if session.get_providers()[0] != provider:
            raise ProviderUnavailable(
                f"ONNX Runtime fell back to {session.get_providers()[0]} from {provider}"
            )
        (images,) = session.get_inputs()
        self._input = images.name
        self.size = int(images.shape[1])
        (output,) = session.get_outputs()
        self._output = output.name
        self._session = session
        self._is_gpu = is_gpu
        self.feature_dim = int(output.shape[1])
        self.precision = precision

    def run(self, images: Pixels) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]."""
        if self._is_gpu:
            return self._run_bound(images)
        (features,) = self._session.run([self._output], {self._input: images})
        result: npt.NDArray[np.float32] = features
        return result

    def _run_bound(self, images: Pixels) -> Floats:
        count = len(images)
        # Kernels are chosen for each new shape: few shapes, each met early.
        bucket = 1 << (count - 1).bit_length()
        if bucket > count:
            padding = np.zeros((bucket - count, *images.shape[1:]), np.uint8)
            images = np.concatenate([images, padding])
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._input, images)
        binding.bind_output(self._output)
        self._session.run_with_iobinding(binding)
        (features,) = binding.copy_outputs_to_cpu()
        result: npt.NDArray[np.float32] = features[:count]
        return result


def on_one_core(path: Path) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """Loads a file of one input and one output, whoever made it; returns what runs it.

    On the CPU provider in full precision. Raises ONNX Runtime's own errors.
    """
    session = ort.InferenceSession(str(path), _options(1), providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()

    def run(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = session.run([output.name], {given.name: images})[0]
        return found

    return run


def _cpu_graph(model: bytes, cores: int) -> OnnxGraph:
    options = _options(cores)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return OnnxGraph(session, "CPUExecutionProvider", "fp32", False)


def _openvino_graph(model: bytes, precision: Precision, cores: int, streams: int) -> Graph:
    device = providers.openvino_device()
    if device is None:
        from service.engine.openvino import OpenVinoGraph  # noqa: PLC0415 - an optional extra

        return OpenVinoGraph(model, precision, cores, streams)
    options = _options(1)
    config = {"CPU": providers.openvino_config(precision, cores, streams)}
    options.add_provider_for_devices([device], {"load_config": json.dumps(config)})
    session = ort.InferenceSession(model, options)
    computes = "bf16" if precision != "exact" and providers.has_bf16() else "fp32"
    return OnnxGraph(session, device.ep_name, computes, False)


def _options(cores: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores
    options.inter_op_num_threads = 1
    # Threads of one run spin for each other, and stop when it ends: one that spins while
    # idle would take a core from decoding and from everyone else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


def _half(model: bytes) -> bytes:
    """Makes the same file compute in fp16, with inputs and outputs as they were."""
    # Imported late: only a GPU needs them.
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    halved = convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True)
    serialized: bytes = halved.SerializeToString()
    return serialized
