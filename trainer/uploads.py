"""Brings batches to a GPU while it learns from the one before.

A thread copies each batch into pinned memory, from which the GPU's copy engine takes it while
kernels run. That memory is kept: to pin a tensor at every step costs more than the copy (the
PyTorch tutorial on pin_memory and non_blocking). On a CPU batches stay where they are.
"""

import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

_SLOTS = 2
"""Batches in pinned memory: one is copied by the GPU, the next one into it."""

Batch = tuple[Tensor, ...]


class Link(Protocol):
    """The way to a device."""

    def pinned(self, nbytes: int) -> Tensor:
        """Allocates memory, uint8 [nbytes], that the device reads by itself."""

    def send(self, staged: Batch) -> tuple[Batch, Any]:
        """Begins to copy tensors in such memory; returns the copies, and what tells their end."""

    def wait_sent(self, sent: Any) -> None:
        """Waits for the end of a copy; the memory may be written again then."""

    def receive(self, batch: Batch, sent: Any) -> None:
        """Lets what is computed from now on wait for the copies."""


class CudaLink:
    """Copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> Tensor:
        """See `Link`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def send(self, staged: Batch) -> tuple[Batch, Any]:
        """See `Link`."""
        with torch.cuda.stream(self._stream):
            moved = tuple(tensor.to(self._device, non_blocking=True) for tensor in staged)
        return moved, self._stream.record_event()

    def wait_sent(self, sent: Any) -> None:
        """See `Link`."""
        sent.synchronize()

    def receive(self, batch: Batch, sent: Any) -> None:
        """See `Link`."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(sent)
        for tensor in batch:
            # Else its memory may be given to the next copy while kernels still read it.
            tensor.record_stream(computing)


class Uploads:
    """Moves batches, one ahead of whoever takes them; `link` None leaves them on the CPU.

    For one iteration at a time; the pinned memory is kept between them.
    """

    def __init__(self, link: Link | None) -> None:
        self._link = link
        self._slots = [_Slot() for _ in range(_SLOTS)]

    def moved(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Yields the batches on the device; ends with what `batches` raises."""
        link = self._link
        if link is None:
            yield from batches
            return
        with ThreadPoolExecutor(1, thread_name_prefix="upload") as pool:
            slots = itertools.cycle(self._slots)
            upcoming = pool.submit(_send_next, batches, link, slots)
            try:
                while (found := upcoming.result()) is not None:
                    upcoming = pool.submit(_send_next, batches, link, slots)
                    link.receive(*found)
                    yield found[0]
            finally:
                _ended(upcoming)


class _Slot:
    """Pinned memory for one batch."""

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}
        """By a tensor's number in the batch."""
        self._sent: Any = None

    def send(self, batch: Batch, link: Link) -> tuple[Batch, Any]:
        if self._sent is not None:
            link.wait_sent(self._sent)
        staged = []
        for number, tensor in enumerate(batch):
            if tensor.device.type != "cpu":
                staged.append(tensor)  # made there
                continue
            memory = self._held(number, tensor.nbytes, link)
            view = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            staged.append(view.copy_(tensor))
        moved, self._sent = link.send(tuple(staged))
        return moved, self._sent

    def _held(self, number: int, nbytes: int, link: Link) -> Tensor:
        if number not in self._memory or len(self._memory[number]) < nbytes:
            self._memory[number] = link.pinned(nbytes)
        return self._memory[number]


def _send_next(
    batches: Iterator[Batch], link: Link, slots: Iterator[_Slot]
) -> tuple[Batch, Any] | None:
    batch = next(batches, None)
    return None if batch is None else next(slots).send(batch, link)


def _ended(upcoming: "Future[Any]") -> None:
    # The thread may be at the next batch, of which nobody will hear.
    if not upcoming.cancel():
        upcoming.exception()


def link_to(device: torch.device) -> Link | None:
    """Returns the way to a GPU; None for the CPU, to which there is none to go."""
    return CudaLink(device) if device.type == "cuda" else None
