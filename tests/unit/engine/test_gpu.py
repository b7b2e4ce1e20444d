"""Runs on a GPU are put together. The real graph is tried on the CPU provider."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from service.engine import providers
from service.engine.gpu import GpuGraph, GpuLimits, MergedRuns
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from tests.unit.engine.conftest import GUARD_S


def numbered(*numbers: int) -> Pixels:
    return np.array(numbers, np.uint8).reshape(-1, 1, 1, 1)


class FakeGpu:
    """Gives back the numbers that images are; one run at a time, each when it is let go."""

    def __init__(self, memory: int = 1_000) -> None:
        self.memory = memory
        self.runs: list[int] = []
        self.began = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self._computing = threading.Lock()

    def free_running(self) -> "FakeGpu":
        self.go_on.release(10_000)
        return self

    def run(self, parts: list[Pixels]) -> Floats:
        assert self._computing.acquire(blocking=False), "two runs at once"
        try:
            self.began.release()
            assert self.go_on.acquire(timeout=GUARD_S)
            images = np.concatenate(parts)
            self.runs.append(len(images))
            if len(images) > self.memory:
                raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
            return images.reshape(-1, 1).astype(np.float32)
        finally:
            self._computing.release()


def waiting(merged: MergedRuns, count: int) -> None:
    """Waits until so many runs wait."""
    turn = threading.Event()
    for _ in range(int(GUARD_S / 0.001)):
        if len(merged._waiting) == count:
            return
        turn.wait(0.001)
    pytest.fail("they do not wait")


def test_runs_that_wait_for_another_become_one_and_each_gets_its_own_rows() -> None:
    gpu = FakeGpu()
    merged = MergedRuns(gpu.run, 4)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(merged.run, numbered(1))
        assert gpu.began.acquire(timeout=GUARD_S)
        others = []
        for place, run in enumerate([(2, 3), (4,), (5, 6), (7,)], 1):
            others.append(pool.submit(merged.run, numbered(*run)))
            waiting(merged, place)
        gpu.go_on.release(10)
        assert first.result(GUARD_S).tolist() == [[1]]
        assert [f.result(GUARD_S).ravel().tolist() for f in others] == [[2, 3], [4], [5, 6], [7]]
    # Whole, in their order, at most four images in a run.
    assert gpu.runs == [1, 3, 3]


def test_a_run_of_more_images_than_fit_goes_in_pieces() -> None:
    gpu = FakeGpu().free_running()
    assert MergedRuns(gpu.run, 2).run(numbered(1, 2, 3, 4, 5)).ravel().tolist() == [1, 2, 3, 4, 5]
    assert gpu.runs == [2, 2, 1]


def test_where_memory_is_exhausted_runs_are_halved_and_stay_so() -> None:
    gpu = FakeGpu(memory=3).free_running()
    merged = MergedRuns(gpu.run, 8)
    for _ in range(2):
        assert merged.run(numbered(*range(8))).ravel().tolist() == list(range(8))
    assert gpu.runs == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]


def test_an_error_reaches_every_run_that_it_hit_and_no_later_one() -> None:
    gpu = FakeGpu(memory=0)
    merged = MergedRuns(gpu.run, 8)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(merged.run, numbered(1))
        assert gpu.began.acquire(timeout=GUARD_S)
        others = [pool.submit(merged.run, numbered(n)) for n in (2, 3)]
        waiting(merged, 2)
        gpu.go_on.release(10)
        errors = [f.exception(GUARD_S) for f in (first, *others)]
    assert all(isinstance(e, RuntimeError) and "allocate" in str(e) for e in errors)
    assert len({id(e) for e in errors}) == 3
    gpu.memory = 10
    assert merged.run(numbered(4)).ravel().tolist() == [4]


def test_many_threads_at_once_get_what_is_theirs() -> None:
    gpu = FakeGpu().free_running()
    merged = MergedRuns(gpu.run, 16)

    def ask(n: int) -> bool:
        own = [(n * 7 + i) % 251 for i in range(1 + n % 5)]
        return merged.run(numbered(*own)).ravel().tolist() == own

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(500)))
    assert max(gpu.runs) <= 16


def test_batches_are_padded_to_few_sizes_and_cut_again(backbone: Path) -> None:
    session = ort.InferenceSession(str(backbone), providers=["CPUExecutionProvider"])
    graph = GpuGraph(session, GpuLimits(largest_run=4))
    pixels = np.random.default_rng(1).integers(0, 256, (5, 224, 224, 3), dtype=np.uint8)
    expected = OnnxRuntime(Provider("cpu", ""), 1).load(backbone.read_bytes).run(pixels)
    for count in (1, 3, 5):
        np.testing.assert_allclose(graph.run(pixels[:count]), expected[:count], rtol=1e-4)


@pytest.mark.parametrize(("limit", "expected"), [(0, None), (2**31, "2147483648")])
def test_a_session_computes_fp32_as_such_and_keeps_to_its_memory(
    limit: int, expected: str | None
) -> None:
    ((name, options),) = providers.gpu_providers("cuda", limit)
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == "0"
    assert options.get("gpu_mem_limit") == expected
    assert [p[0] for p in providers.gpu_providers("tensorrt")][1:] == ["CUDAExecutionProvider"]
