"""What training computes on, in which number format and how many images at a time."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from service.errors import InvalidInput, Reason, WrongState
from service.inference.preprocess import SIZE
from service.jobs.contract import ModelBased
from trainer.memory import is_out_of_memory

_WORTH_IT = 1.2
"""How much faster a shorter format must be to be taken for it."""
_PROBES = 2
BATCH_SIZES = (8, 16, 32, 64)
_LEAST_STEPS = 8
"""Of an epoch: fewer would learn too little from it."""
_LARGER_PAYS = 1.05
_PROBE_S = 1.5
_PRECISION_PROBE_BATCH = 8


def choose_device(wanted: str) -> torch.device:
    """CUDA where there is one and it is not ruled out; raises WrongState when it must be."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WrongState(
            Reason.DEVICE_UNAVAILABLE,
            "the job asks for CUDA, and this machine has no usable NVIDIA GPU: ask for the device "
            "auto or cpu",
        )
    return torch.device("cuda")


def choose_precision(
    method: ModelBased, device: torch.device, network: nn.Module, batch_size: int | None
) -> tuple[str, str]:
    """The number format that was asked for, or the fastest; and why it.

    The classic recipe is a yardstick and stays in 32 bits. A GPU computes bf16
    (older ones fp16) fastest; a CPU with bf16 instructions is asked with a few
    steps, since depthwise convolutions can be slower in bf16 than in fp32.
    """
    wanted = method.precision
    if wanted == "fp16" and device.type == "cpu":
        raise InvalidInput(
            Reason.INVALID_FIELD,
            "precision fp16 needs a GPU: use bf16, fp32 or leave it unset",
            field="model_based.precision",
        )
    if wanted != "auto":
        return wanted, "the request's choice"
    if method.recipe == "classic":
        return "fp32", "the classic recipe's"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes it natively"
        return "fp16", "the GPU has no bf16"
    if not _cpu_has_bf16():
        return "fp32", "the CPU has no bf16 instructions"
    size = batch_size or _PRECISION_PROBE_BATCH
    ratio = step_s("fp32", device, network, size) / step_s("bf16", device, network, size)
    chosen = "bf16" if ratio >= _WORTH_IT else "fp32"
    return chosen, f"bf16 ran {ratio:.1f}x as fast as fp32 in a probe"


def autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    """Makes the context that a forward pass runs in."""
    if precision == "fp32":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.type, dtype=dtype)


def choose_batch_size(
    precision: str, device: torch.device, network: nn.Module, images: int, domains: int = 1
) -> tuple[int, str]:
    """The batch size that learns the most images a second, and why it.

    Sizes double as long as that pays, an epoch keeps some steps and the probe's
    time lasts: of two about as fast the smaller one takes more steps. A step learns
    from a batch of each of the domains.
    """
    largest = max(BATCH_SIZES[0], images // _LEAST_STEPS)
    started = time.monotonic()
    best, best_rate, tried = BATCH_SIZES[0], 0.0, []
    for size in BATCH_SIZES:
        if size > largest:
            break
        try:
            rate = size / step_s(precision, device, network, domains * size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        tried.append(f"{size}: {rate:.1f}")
        if rate < best_rate * _LARGER_PAYS:
            break
        best, best_rate = size, rate
        if time.monotonic() - started > _PROBE_S:
            break
    return best, f"images a second by batch size in a probe: {', '.join(tried)}"


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def step_s(precision: str, device: torch.device, network: nn.Module, batch_size: int) -> float:
    """Seconds of a step with its update; the fastest of a few, after a first one.

    Modules stay in the mode that they are in: a frozen BatchNorm costs less.
    """
    # A copy, so that neither BatchNorm's statistics nor gradients are touched.
    probe = copy.deepcopy(network)
    moving = [p for p in probe.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=1e-9, momentum=0.9, fused=True)
    images = torch.zeros(batch_size, SIZE, SIZE, 3, dtype=torch.uint8, device=device)
    context = autocast(precision, device)
    times = []
    for _ in range(1 + _PROBES):
        started = time.monotonic()
        with context():
            loss = probe(images).float().logsumexp(dim=1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            # Its kernels only began; the clock is to see them end.
            torch.cuda.synchronize(device)
        times.append(time.monotonic() - started)
    return min(times[1:])
