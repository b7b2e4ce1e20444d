"""Runs a backbone on a GPU: runs that wait while another computes become the next one.

A GPU computes a large batch in hardly more time than a small one, and one run at a time. Workers
and trainers decode on many cores and run what each has decoded; here their runs are put together.
There is no waiting window: a run that finds the GPU idle begins at once.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.head import Floats
from service.engine.preprocess import Pixels

log = logging.getLogger(__name__)

LARGEST_RUN = 128
"""Images that fill a GPU, about; more only make callers wait for each other."""
_NO_MEMORY = ("Failed to allocate memory", "Available memory of", "out of memory")
"""What ONNX Runtime says of an arena at its limit, and of a GPU that is full."""


@dataclass(frozen=True)
class GpuLimits:
    """Bounds what one backbone takes of a GPU."""

    largest_run: int = LARGEST_RUN
    """Most images in one run."""
    arena_bytes: int = 0
    """Most memory for activations and weights; 0 means no limit."""


class GpuGraph:
    """An ONNX Runtime session on a GPU, with batches of few sizes."""

    def __init__(self, session: ort.InferenceSession, limits: GpuLimits) -> None:
        (images,) = session.get_inputs()
        (output,) = session.get_outputs()
        self._input, self._output = images.name, output.name
        self.size, self.feature_dim = int(images.shape[1]), int(output.shape[1])
        self._session = session
        self._runs = MergedRuns(self._run, limits.largest_run)

    def run(self, images: Pixels) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]."""
        return self._runs.run(images)

    def _run(self, parts: list[Pixels]) -> Floats:
        count = sum(map(len, parts))
        # Kernels are chosen for each new shape: few shapes, each met early.
        bucket = 1 << (count - 1).bit_length()
        images = parts[0]
        if len(parts) > 1 or bucket > count:
            images = np.zeros((bucket, *images.shape[1:]), np.uint8)
            np.concatenate(parts, out=images[:count])
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._input, np.ascontiguousarray(images))
        binding.bind_output(self._output)
        self._session.run_with_iobinding(binding)
        (features,) = binding.copy_outputs_to_cpu()
        result: npt.NDArray[np.float32] = features[:count]
        return result


class _Asked:
    """A run that a thread asks for."""

    def __init__(self, images: Pixels) -> None:
        self.images = images
        self.woken = threading.Event()
        """Set when its features are there, or when its thread is to compute the next batch."""
        self.features: Floats | None = None
        self.error: BaseException | None = None


class MergedRuns:
    """Puts runs of several threads together, each whole, up to `most` images.

    `run` computes features [n, d] of parts [n_i, ...] one after the other. Where there is no
    memory for so many images they are halved, for this run and all that follow.
    """

    def __init__(self, run: Callable[[list[Pixels]], Floats], most: int) -> None:
        self._run_parts = run
        self._most = most
        self._waiting: deque[_Asked] = deque()
        self._is_busy = False
        self._lock = threading.Lock()

    def run(self, images: Pixels) -> Floats:
        """Computes features [n, d] of [n, ...]; thread-safe. Raises what the run does."""
        asked = _Asked(images)
        with self._lock:
            self._waiting.append(asked)
            waits, self._is_busy = self._is_busy, True
        if waits:
            asked.woken.wait()
        if asked.features is None and asked.error is None:
            self._compute_next()
        if asked.error is not None:
            # One that this thread alone raises, lest the tracebacks of several grow together.
            raise RuntimeError(str(asked.error)) from asked.error
        assert asked.features is not None
        return asked.features

    def _compute_next(self) -> None:
        """Computes what waits, the caller's own first, and hands on to the next thread."""
        with self._lock:
            batch = [self._waiting.popleft()]
            count = len(batch[0].images)
            while self._waiting and count + len(self._waiting[0].images) <= self._most:
                batch.append(self._waiting.popleft())
                count += len(batch[-1].images)
        try:
            features = self._within_memory([asked.images for asked in batch], count)
            first = 0
            for asked in batch:
                asked.features = features[first : first + len(asked.images)]
                first += len(asked.images)
        except BaseException as error:
            for asked in batch:
                asked.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._is_busy = following is not None
            for asked in batch[1:]:
                asked.woken.set()
            if following is not None:
                following.woken.set()

    def _within_memory(self, parts: list[Pixels], count: int) -> Floats:
        while True:
            most = self._most
            try:
                if count <= most:
                    return self._run_parts(parts)
                images = np.concatenate(parts)
                pieces = [images[start : start + most] for start in range(0, count, most)]
                return np.concatenate([self._run_parts([piece]) for piece in pieces])
            except Exception as error:
                if min(most, count) == 1 or not is_out_of_memory(error):
                    raise
            self._most = min(most, count) // 2
            log.warning("the GPU has no memory for a run of %d images: %d at most from now on",
                        min(most, count), self._most)  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    """Tells by ONNX Runtime's words whether a GPU's memory is exhausted."""
    return any(words in str(error) for words in _NO_MEMORY)
