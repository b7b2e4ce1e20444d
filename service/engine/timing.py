"""Times the providers that compute a backbone's precision, in a process of their own.

Run as `python -m service.engine.timing`, by `service.ops.child`: at the lowest priority, one
backbone at a time, and with no memory kept; it ends when its server does.
"""

import logging
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.provider_table import Measured, ProviderTable, Timing, choose
from service.engine.providers import Provider, ProviderName
from service.engine.runtime import (
    PAYS,
    Graph,
    Read,
    able,
    compiled,
    marked,
    precision_of,
    widths_of,
)
from service.ops import child
from service.ops.metrics import Metrics

log = logging.getLogger(__name__)

ROUNDS = 11
"""Runs of each provider, in turn with the others', of which the quickest counts."""
BUDGET_S = 20.0
"""Longest time for the rounds of one width and batch; three rounds are always made."""
_LEAST_ROUNDS = 3
_BATCHES = (1, 4)
"""A call of one image, and what a worker takes at once under load, about."""
_COMPARED = 8
"""Images on which providers must agree."""
_CHILD_S = 900.0
"""Longest time for one backbone: on a busy machine the lowest priority waits long."""
_MODULE = "service.engine.timing"
_FILE_BYTES = 2**20
"""It writes none but what it prints when it fails."""
_LOWEST = 19
"""Niceness."""
_WAITING = 1000
"""Backbones that wait to be measured; more are measured when they are loaded again."""
_BF16_PAYS = 0.75
"""Part of fp32's time at which bf16 is worth the digits that it drops."""


class Asked(msgspec.Struct):
    """What a measuring process is to do."""

    provider: ProviderName
    others: tuple[ProviderName, ...]
    threads: int
    max_batch: int
    file: str = ""
    """The path of the backbone's file."""


def images(count: int, size: int) -> Pixels:
    """Makes the same varied images every time, uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    made = np.empty((count, size, size, 3), np.uint8)
    for image in made:
        coarse = rng.uniform(0, 255, (8, 8, 3)).repeat(-(-size // 8), 0).repeat(-(-size // 8), 1)
        noise = rng.normal(0, rng.uniform(2, 40), (size, size, 3))
        image[:] = (coarse[:size, :size] + noise).clip(0, 255)
    return made


def measure(model: bytes, provider: Provider, threads: int, max_batch: int) -> Measured:
    """Times a backbone's file on each provider at every width that serves.

    Raises what compiling or running it on `provider` itself does; one of the others that
    fails is left out.
    """
    precision = precision_of(model)
    names = able(provider, precision) or [provider.name]
    widths = widths_of(threads)
    timings: list[Timing] = []
    differences: dict[ProviderName, float] = {}
    largest, infer_s = 1, 0.0
    for width in widths:
        graphs = _graphs(model, names, width, threads)
        first = graphs[names[0]]
        if not differences:
            differences = _differences(graphs, names[0])
        for batch in (each for each in _BATCHES if each <= max_batch):
            timings += _timed(graphs, width, threads // width, images(batch, first.size))
        if width == widths[-1]:
            best = graphs[choose(timings, names[0], differences)[width]]
            largest, infer_s = largest_batch(best, max_batch)
    return Measured(
        precision, timings, differences, choose(timings, names[0], differences), largest, infer_s
    )


def _graphs(
    model: bytes, names: Sequence[ProviderName], width: int, threads: int
) -> dict[ProviderName, Graph]:
    graphs = {names[0]: compiled(model, width, names[0], threads)}
    for name in names[1:]:
        try:
            graphs[name] = compiled(model, width, name, threads)
            graphs[name].run(images(1, graphs[name].size))
        except Exception:  # the libraries' own exceptions share no base class
            log.warning("%s does not run a backbone", name, exc_info=True)
            graphs.pop(name, None)
    return graphs


def _differences(
    graphs: Mapping[ProviderName, Graph], first: ProviderName
) -> dict[ProviderName, float]:
    given = images(_COMPARED, graphs[first].size)
    expected = probabilities(graphs[first].run(given))
    return {
        name: float(np.abs(probabilities(graph.run(given)) - expected).max())
        for name, graph in graphs.items()
        if name != first
    }


def probabilities(features: Floats) -> Floats:
    """Gives what heads may make of features [n, d]: [n, 10], some sure and some not.

    The head is drawn at random, the same every time, and its logits spread as those of
    fitted ones do.
    """
    head = np.random.default_rng(0).standard_normal((features.shape[1], 10), np.float32)
    spread = np.sqrt((features**2).sum(axis=1).mean()) or np.float32(1)
    logits = features @ head * (3 / spread)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    answers: Floats = raised / raised.sum(axis=1, keepdims=True)
    return answers


def _timed(
    graphs: Mapping[ProviderName, Graph], width: int, side_by_side: int, given: Pixels
) -> list[Timing]:
    """Runs the providers in turn, so that what disturbs one disturbs the others too.

    As many runs at once as serve at once: they share the memory's bandwidth and the caches,
    which one run alone has to itself.
    """
    best: dict[ProviderName, Timing] = {}
    with ThreadPoolExecutor(side_by_side) as pool:

        def run(graph: Graph) -> None:
            list(pool.map(lambda _: graph.run(given), range(side_by_side)))

        for graph in graphs.values():
            run(graph)  # kernels are chosen and memory is taken at the first run
        begun = time.monotonic()
        for turn in range(ROUNDS):
            if turn >= _LEAST_ROUNDS and time.monotonic() - begun > BUDGET_S:
                break
            for name, graph in graphs.items():
                switched = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
                wall_s, cpu_s = time.perf_counter(), time.process_time()
                run(graph)
                wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
                is_disturbed = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > switched
                found = Timing(name, width, len(given), wall_s, cpu_s / side_by_side, is_disturbed)
                best[name] = min(best.get(name, found), found, key=lambda t: _counts(t, width))
    return list(best.values())


def _counts(timing: Timing, width: int) -> tuple[bool, float]:
    if width == 1:
        return False, timing.cpu_s
    return timing.is_disturbed, timing.wall_s


def largest_batch(graph: Graph, most: int) -> tuple[int, float]:
    """Finds the largest batch, up to `most`, that pays on one core, and seconds an image then.

    One size that does not pay may be followed by one that does.
    """
    best_s, largest, batch = float("inf"), 1, 1
    while batch <= min(most, 4 * largest):
        given = images(batch, graph.size)
        graph.run(given)
        each_s = float("inf")
        for _ in range(_LEAST_ROUNDS):
            cpu_s = time.process_time()
            graph.run(given)
            each_s = min(each_s, (time.process_time() - cpu_s) / batch)
        if each_s <= best_s * PAYS:
            best_s, largest = each_s, batch
        batch *= 2
    return largest, best_s


def bf16_pays(model: bytes) -> bool:
    """Measures whether OpenVINO computes a backbone's file much quicker in bf16 than in fp32.

    Blocks for some seconds; call it where the CPU has the units for it at all.
    """
    graphs = {
        precision: compiled(of, 1, "openvino", 1)
        for precision, of in (("fp32", model), ("bf16", marked(model, "bf16")))
    }
    given = images(4, graphs["fp32"].size)
    quickest: dict[str, float] = {}
    for turn in range(_LEAST_ROUNDS + 1):
        for precision, graph in graphs.items():
            begun = time.process_time()
            graph.run(given)
            took = time.process_time() - begun
            if turn:  # the first run warms
                quickest[precision] = min(took, quickest.get(precision, took))
    return quickest["bf16"] <= _BF16_PAYS * quickest["fp32"]


class Measurer:
    """Measures backbones one after the other, in the background.

    `on_measured` is called, from a thread of its own, with what was found; the table
    has it then.
    """

    def __init__(
        self,
        provider: Provider,
        threads: int,
        max_batch: int,
        table: ProviderTable,
        metrics: Metrics,
        environment: Mapping[str, str],
        on_measured: Callable[[str, Measured], None],
    ) -> None:
        self._asked = Asked(provider.name, provider.others, threads, max_batch)
        self._table = table
        self._metrics = metrics
        self._environment = environment
        self._on_measured = on_measured
        self._waiting: queue.Queue[tuple[str, Read] | None] = queue.Queue(_WAITING)
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="measurer", daemon=True)
        self._thread.start()
        for measured in table.backbones().values():
            self._count(measured)

    def measure(self, digest: str, read: Read) -> None:
        """Has a file measured soon; once, and not where too many wait."""
        with self._lock:
            if self._is_closed or digest in self._known:
                return
            try:
                self._waiting.put_nowait((digest, read))
            except queue.Full:
                log.warning("too many backbones wait to be measured: this one does not")
                return
            self._known.add(digest)
        self._metrics.measurements_pending.inc()

    def close(self) -> None:
        """Ends the measuring; what was not measured is measured after the next start."""
        with self._lock:
            self._is_closed = True
            with suppress(queue.Empty):
                while True:
                    self._waiting.get_nowait()
                    self._metrics.measurements_pending.dec()
            self._waiting.put_nowait(None)
        self._thread.join()

    def _run(self) -> None:
        while (found := self._waiting.get()) is not None:
            digest, read = found
            try:
                self._measure(digest, read)
            except Exception as error:
                if not self._is_closed:
                    log.warning(
                        "a backbone could not be measured, and serves on %s: %s",
                        self._asked.provider, error, extra={"backbone": digest},
                    )  # fmt: skip
                    with self._lock:
                        self._known.discard(digest)
            finally:
                self._metrics.measurements_pending.dec()

    def _measure(self, digest: str, read: Read) -> None:
        begun = time.monotonic()

        def go_on() -> None:
            if self._is_closed:
                raise RuntimeError("the server stops")
            if time.monotonic() - begun > _CHILD_S:
                raise TimeoutError(f"it took more than {_CHILD_S:.0f} s")

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "backbone.onnx"
            file.write_bytes(read())
            go_on()
            asked = msgspec.structs.replace(self._asked, file=str(file))
            with child.started(_MODULE, asked, self._environment, folder) as (process, printed):
                found = list(child.lines(process, go_on))
                if process.wait() or not found:
                    words = child.last_words(printed).strip().splitlines()[-1:]
                    raise RuntimeError(f"ended with {process.returncode}: {' '.join(words)}")
        measured = msgspec.json.decode(found[0], type=Measured)
        self._table.put(digest, measured)
        self._count(measured)
        log.info(
            "backbone measured",
            extra={
                "backbone": digest,
                "precision": measured.precision,
                "providers": {str(k): v for k, v in measured.providers.items()},
                "differences": measured.differences,
                "image_ms": image_ms(measured),
                "largest_batch": measured.max_batch,
                "seconds": round(time.monotonic() - begun, 1),
            },
        )
        self._on_measured(digest, measured)

    def _count(self, measured: Measured) -> None:
        for cores, name in measured.providers.items():
            self._metrics.providers_chosen.labels(name, measured.precision, str(cores)).inc()


def image_ms(measured: Measured) -> dict[str, float]:
    """Lists milliseconds of processor time an image on one core, by provider, at best."""
    found: dict[str, float] = {}
    for timing in measured.timings:
        if timing.cores == 1:
            each = round(timing.cpu_s / timing.batch * 1000, 2)
            found[timing.provider] = min(each, found.get(timing.provider, each))
    return found


def main() -> int:
    """Measures what standard input asks for, and sends what was found."""
    asked = child.take_task(Asked)
    child.confine()
    child.limit_files(_FILE_BYTES)
    os.setpriority(os.PRIO_PROCESS, 0, _LOWEST)
    provider = Provider(asked.provider, "", asked.others)
    model = Path(asked.file).read_bytes()
    child.send(measure(model, provider, asked.threads, asked.max_batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
