"""Finds the providers that the setting allows and the machine has, and what each computes in.

Probes without side effects on a machine that has nothing special; the heavy
libraries are imported only where they are used. Which of several serves a backbone
best is measured (provider_table.py).
"""

import ctypes
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from service.domain import Precision, ProviderSetting
from service.ops import cpus

ProviderName = Literal["tensorrt", "cuda", "openvino", "cpu"]

log = logging.getLogger(__name__)

_PROBED = 224
"""Numbers that a probe of a GPU computes with."""


class ProviderUnavailable(RuntimeError):  # noqa: N818
    """Reports why the provider that was asked for cannot compute here."""


@dataclass(frozen=True)
class Provider:
    """A provider that serves at once, why, and those that may turn out to be quicker."""

    name: ProviderName
    why: str
    others: tuple[ProviderName, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """True if a GPU computes."""
        return self.name in ("tensorrt", "cuda")


def choose_provider(setting: ProviderSetting, *, on_cpu: bool = False) -> Provider:
    """Chooses the provider that the setting allows and the machine has.

    `auto` takes CUDA where an NVIDIA GPU is there and ONNX Runtime can use it, with a
    warning in the log when a GPU is there but unusable; else ONNX Runtime's CPU
    provider, with OpenVINO, where it is installed, to be measured beside it. TensorRT
    is taken only when it is set, since it builds its engines for minutes. With `on_cpu`
    no GPU is looked for, and what is set to one means `auto`. Raises ProviderUnavailable
    when what is set cannot be had.
    """
    if on_cpu and setting not in ("cpu", "openvino"):
        return _on_cpu("the job runs on the CPU")
    if setting == "cpu":
        return Provider("cpu", "set by configuration")
    if setting == "openvino":
        if problem := openvino_problem():
            raise ProviderUnavailable(_cannot_be_had(setting, problem))
        return Provider("openvino", "set by configuration")
    gpus = _cuda_device_count()
    probed: ProviderName = "tensorrt" if setting == "tensorrt" else "cuda"
    problem = "no NVIDIA GPU was found" if gpus == 0 else _gpu_problem(probed)
    if not problem:
        return Provider(probed, f"found {gpus} NVIDIA GPU(s)")
    if setting != "auto":
        raise ProviderUnavailable(_cannot_be_had(setting, problem))
    if gpus:
        log.warning("an NVIDIA GPU is there but unused, the CPU computes: %s", problem)
    return _on_cpu(problem)


def _on_cpu(why: str) -> Provider:
    if no_openvino := openvino_problem():
        return Provider("cpu", f"{why}; {no_openvino}")
    return Provider("cpu", f"{why}; OpenVINO is measured beside it", ("openvino",))


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names the GPUs that this process sees, as CUDA_VISIBLE_DEVICES would name each alone."""
    count = _cuda_device_count()
    if (shown := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        # CUDA itself ends the list at the first name that it does not know.
        return tuple(name.strip() for name in shown.split(","))[:count]
    return tuple(map(str, range(count)))


def computing(provider: ProviderName, precision: Precision) -> Precision:
    """Returns what a provider computes in where a file is of this precision: that, or fp32."""
    is_computed = {
        "int8": provider != "openvino" or has_vnni(),
        "fp16": provider in ("tensorrt", "cuda"),
        "bf16": provider == "openvino" and has_amx(),
    }
    return precision if is_computed.get(precision) else "fp32"


def gpu_providers(name: ProviderName, arena_bytes: int = 0) -> list[Any]:
    """ONNX Runtime's providers for a GPU, in order, with their options.

    `arena_bytes` bounds the memory of a session; 0 does not.
    """
    options = {
        # A search for the fastest kernels at each new shape would stall calls for seconds.
        "cudnn_conv_algo_search": "HEURISTIC",
        # Products in TF32 are no fp32: a version answers the same wherever it serves.
        "use_tf32": "0",
        # Else the arena doubles, and takes memory from trainers that nothing needs.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if arena_bytes:
        options["gpu_mem_limit"] = str(arena_bytes)
    cuda = ("CUDAExecutionProvider", options)
    tensorrt = ("TensorrtExecutionProvider", {"trt_fp16_enable": "0"})
    return [tensorrt, cuda] if name == "tensorrt" else [cuda]


def openvino_problem() -> str:
    """Explains why OpenVINO cannot compute here; "" where it can."""
    if importlib.util.find_spec("openvino") is not None:
        return ""
    return "OpenVINO is not installed (pip install 'graftml-server[openvino]')"


def openvino_config(precision: Precision, cores: int, streams: int) -> dict[str, str]:
    """OpenVINO's settings for `streams` runs at once that share `cores` threads."""
    # Else sums of int8 overflow; so they are computed in floats.
    exact = {} if has_vnni() else {"LP_TRANSFORMS_MODE": "NO"}
    return {
        **exact,
        "INFERENCE_NUM_THREADS": str(cores),
        "NUM_STREAMS": str(streams),
        # Left alone it takes bf16 with avx512_bf16 too, and changes what a version answers.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        # Else two models are pinned to the same core, and each runs at half its speed.
        "ENABLE_CPU_PINNING": "NO",
    }


def has_amx() -> bool:
    """Tells whether the CPU has matrix units for bfloat16 (AMX).

    Vectors of it alone (avx512_bf16) make some CPUs faster and others slower.
    """
    return "amx_bf16" in cpus.describe().flags


def has_vnni() -> bool:
    """Tells whether the CPU adds up products of 8-bit integers in 32 bits (VNNI).

    Others add pairs of them in 16 bits first, which overflow, unless they are told to be exact:
    then a version in int8 sums as elsewhere, but is no quicker than one in fp32.
    """
    return not {"avx512_vnni", "avx_vnni"}.isdisjoint(cpus.describe().flags)


def _cannot_be_had(setting: str, problem: str) -> str:
    return f"the provider is set to {setting}, but {problem}: mend that, or set it to auto or cpu"


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


def _gpu_problem(name: ProviderName) -> str:
    """Runs a one-node model on the provider; returns why that failed, or nothing."""
    wanted = gpu_providers(name)
    first = str(wanted[0][0])
    if first not in ort.get_available_providers():
        return f"this build of ONNX Runtime has no {first}; install onnxruntime-gpu"
    try:
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
        session = ort.InferenceSession(_identity_model(), providers=wanted)
        if session.get_providers()[0] != first:
            return f"ONNX Runtime fell back from {first}; its log says why"
        session.run(None, {"x": np.zeros((1, _PROBED), dtype=np.float32)})
    except Exception as error:
        return f"ONNX Runtime cannot use {first}: {str(error).splitlines()[0]}"
    return ""


def _identity_model() -> bytes:
    # Imported late: it costs a third of a second, and no CPU machine needs it to start.
    from onnx import TensorProto, helper  # noqa: PLC0415

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", _PROBED])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", _PROBED])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized
