"""Chooses what training computes on, in which number format and batches, by measured steps.

The one place where PyTorch is told how to compute on a GPU.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from service.errors import InvalidInput, Reason, WrongState
from trainer.memory import is_out_of_memory

_WORTH_IT = 1.2
"""How much faster a shorter format must be to be taken for it."""
_PROBES = 2
_LARGER_PAYS = 0.9
"""Part of the time that an image may take in a batch of twice the size for that to be taken."""
PROBE_BATCH = 8


def choose_device(wanted: str) -> torch.device:
    """Returns CUDA where there is one and it is not ruled out; raises WrongState without one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WrongState(
            Reason.DEVICE_UNAVAILABLE,
            "the job asks for CUDA, and this machine has no usable NVIDIA GPU: ask for the device "
            "auto or cpu",
        )
    # PyTorch computes convolutions in TF32 unless told otherwise, and calls that fp32. Whoever
    # asks for fp32 asks for its digits; for speed there is bf16, which is faster still.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    # Batches have few shapes, each met often: to time cuDNN's kernels once pays.
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def describe(device: torch.device) -> dict[str, float | int | str | bool | None]:
    """Says how a GPU computes, for the log and the manifest; of a CPU nothing."""
    if device.type == "cpu":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def choose_precision(
    wanted: str, device: torch.device, network: nn.Module, batch: Tensor
) -> tuple[str, str]:
    """Returns the number format that is wanted, or the fastest for `auto`; and why it.

    A GPU computes bf16 (older ones fp16) fastest; a CPU with bf16 instructions is
    asked with a few steps, since depthwise convolutions can be slower in bf16 than
    in fp32. Raises InvalidInput for fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise InvalidInput(
            Reason.INVALID_FIELD,
            "precision fp16 needs a GPU: use bf16, fp32 or leave it unset",
            field="model_based.precision",
        )
    if wanted != "auto":
        return wanted, "the choice of the request or the recipe"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes it natively"
        return "fp16", "the GPU has no bf16"
    if not _cpu_has_bf16():
        return "fp32", "the CPU has no bf16 instructions"
    fp32_s, bf16_s = (step_s(p, device, network, batch) for p in ("fp32", "bf16"))
    ratio = fp32_s / bf16_s
    chosen = "bf16" if ratio >= _WORTH_IT else "fp32"
    return chosen, f"bf16 ran {ratio:.1f}x as fast as fp32 in a probe"


def autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    """Returns what makes the context that a forward pass runs in."""
    if precision == "fp32":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.type, dtype=dtype)


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def step_s(precision: str, device: torch.device, network: nn.Module, batch: Tensor) -> float:
    """Measures the seconds of a step on a batch: the fastest of a few, after a first one.

    Modules stay in the mode that they are in: a frozen BatchNorm costs less.
    """
    # A copy, so that neither BatchNorm's statistics nor gradients are touched.
    probe = copy.deepcopy(network)
    moving = [p for p in probe.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-9, fused=True)
    batch = as_input(batch.to(device))
    context = autocast(precision, device)
    times = []
    for _ in range(1 + _PROBES):
        started = time.monotonic()
        with context():
            loss = probe(batch).float().logsumexp(dim=1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            # Its kernels only began; the clock is to see them end.
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - started)
    return min(times[1:])


def largest_batch(sizes: Sequence[int], step_s: Callable[[int], float]) -> int:
    """Finds the largest batch of rising `sizes` for which an image takes less time than before.

    `step_s` measures the seconds of a step on so many images. The search ends at the first
    size that gains too little, or for which there is no memory; the first one is always taken.
    """
    chosen, best_s = sizes[0], math.inf
    for size in sizes:
        try:
            each_s = step_s(size) / size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        if each_s > _LARGER_PAYS * best_s:
            break
        chosen, best_s = size, each_s
    free_memory()
    return chosen


def free_memory() -> None:
    """Gives back what PyTorch keeps of a GPU's memory for the next tensors of the same sizes."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def as_input(batch: Tensor) -> Tensor:
    """Returns a batch as a network takes it: uint8 images as they are, float16 maps as float32."""
    if batch.dtype != torch.float16:
        return batch
    return batch.float().to(memory_format=torch.channels_last)
