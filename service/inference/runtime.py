"""The door to ONNX Runtime: the only importer of it.

Chooses the provider once, at start, and says why; a session that does not run
on the chosen provider is an error, never a silent step down. Tests put a fake
`Runtime` in its place.
"""

import ctypes
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.errors import Damaged, Reason
from service.inference.head import Floats
from service.inference.preprocess import SIZE, Pixels

ProviderSetting = Literal["auto", "cuda", "cpu"]

log = logging.getLogger(__name__)


class ProviderUnavailable(RuntimeError):  # noqa: N818
    """The provider that was asked for cannot compute here; the message says why."""


class Session(Protocol):
    """A backbone in memory."""

    @property
    def feature_dim(self) -> int:
        """How many features a picture gets."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""

    def run(self, pictures: Pixels) -> Floats:
        """From uint8 [n, 224, 224, 3] to features float32 [n, d]. Thread-safe; blocks."""


class Runtime(Protocol):
    """What loads backbones."""

    @property
    def provider(self) -> str:
        """What computes: `cuda` or `cpu`."""

    def load(self, path: Path) -> Session:
        """Loads a backbone; blocks. Raises Damaged (MODEL_UNLOADABLE)."""


@dataclass(frozen=True)
class Provider:
    """A chosen provider, and why it was chosen."""

    name: Literal["cuda", "cpu"]
    why: str


def choose_provider(setting: ProviderSetting) -> Provider:
    """Chooses the provider that the setting allows and the machine has.

    `auto` takes CUDA where an NVIDIA GPU is there and ONNX Runtime can use it,
    else the CPU, with a warning in the log when a GPU is there but unusable.
    Raises ProviderUnavailable when `cuda` is set and cannot be had.
    """
    if setting == "cpu":
        return Provider("cpu", "set by configuration")
    gpus = _cuda_device_count()
    problem = "no NVIDIA GPU was found" if gpus == 0 else _cuda_problem()
    if not problem:
        return Provider("cuda", f"found {gpus} NVIDIA GPU(s)")
    if setting == "cuda":
        raise ProviderUnavailable(
            f"the provider is set to cuda, but {problem}: set it to auto or cpu, or mend CUDA"
        )
    if gpus:
        log.warning("an NVIDIA GPU is there but unused, the CPU computes: %s", problem)
    return Provider("cpu", problem)


class OnnxRuntime:
    """Backbones on ONNX Runtime with one chosen provider."""

    def __init__(self, provider: Provider, threads: int = 0) -> None:
        self._provider = provider
        self._threads = threads or len(os.sched_getaffinity(0))

    @property
    def provider(self) -> str:
        """What computes: `cuda` or `cpu`."""
        return self._provider.name

    @property
    def why(self) -> str:
        """Why this provider was chosen."""
        return self._provider.why

    def load(self, path: Path) -> "OnnxSession":
        """Loads a backbone; blocks for its bytes to be read and its graph optimised."""
        try:
            model = path.read_bytes()
            session = _open_session(model, self._provider.name, self._threads)
            return OnnxSession(session, len(model))
        except ProviderUnavailable:
            raise
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise Damaged(
                Reason.MODEL_UNLOADABLE,
                "the version's backbone cannot be loaded: publish the version again",
            ) from error


class OnnxSession:
    """One backbone's ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession, file_bytes: int) -> None:
        (self._input,) = (value.name for value in session.get_inputs())
        (output,) = session.get_outputs()
        self._output = output.name
        self._session = session
        self._feature_dim = int(output.shape[1])
        # The weights, once as read and packed for the kernels; activations and
        # the arena come on top. Measured on the backbones that we ship.
        self._nbytes = 2 * file_bytes + 16 * 2**20

    @property
    def feature_dim(self) -> int:
        """How many features a picture gets."""
        return self._feature_dim

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""
        return self._nbytes

    def run(self, pictures: Pixels) -> Floats:
        """From uint8 [n, 224, 224, 3] to features float32 [n, d]."""
        (features,) = self._session.run([self._output], {self._input: pictures})
        result: npt.NDArray[np.float32] = features
        return result


def run_classifier(model: bytes, pictures: Pixels, threads: int = 0) -> Floats:
    """Runs a whole exported classifier (see `export.compose`) on the CPU.

    From uint8 [n, 224, 224, 3] to probabilities float32 [n, classes].
    """
    return OnnxSession(_open_session(model, "cpu", threads), len(model)).run(pictures)


def _open_session(model: bytes, provider: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A thread that spins while idle takes a core from decoding and from everyone else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    providers = {"cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}.get(
        provider, ["CPUExecutionProvider"]
    )
    session = ort.InferenceSession(model, options, providers=providers)
    if session.get_providers()[0] != providers[0]:
        raise ProviderUnavailable(
            f"ONNX Runtime fell back to {session.get_providers()[0]} from {providers[0]}"
        )
    return session


def _cuda_device_count() -> int:
    """Asks the NVIDIA driver itself, without loading CUDA."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _cuda_problem() -> str:
    """Runs a one-node model on CUDA; returns why that failed, or nothing."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this build of ONNX Runtime has no CUDA provider; install onnxruntime-gpu"
    try:
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
        _open_session(_identity_model(), "cuda", 1).run(
            None, {"x": np.zeros((1, SIZE), dtype=np.float32)}
        )
    except Exception as error:
        return f"ONNX Runtime cannot use CUDA: {str(error).splitlines()[0]}"
    return ""


def _identity_model() -> bytes:
    # Imported late: it costs a third of a second, and no CPU machine needs it to start.
    from onnx import TensorProto, helper  # noqa: PLC0415

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", SIZE])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized
