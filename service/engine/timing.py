"""Times the providers that compute a backbone's precision, in a process of their own.

Run as `python -m service.engine.timing`, by `service.ops.child`: at the lowest priority, one
backbone at a time, and with no memory kept; it ends when its server does.
"""

import logging
import os
import queue
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.provider_table import Measured, ProviderTable, Timing, choose, paired
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
from service.engine.workers import BATCH_S
from service.ops import child
from service.ops.metrics import Metrics

log = logging.getLogger(__name__)

ROUNDS = 31
"""Runs of each provider and batch, in turn with the others'."""
BUDGET_S = 20.0
"""Longest time for the rounds of one width; three rounds are always made."""
_LEAST_ROUNDS = 3
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
    for width in widths:
        graphs = _graphs(model, names, width, threads)
        if not differences:
            differences = _differences(graphs, names[0])
        # A run on several cores is a lone image's: several images go to a worker each.
        timings += _timed(graphs, width, threads // width, max_batch if width == 1 else 1)
    chosen = choose(timings, names[0], differences)
    largest, infer_s = largest_batch(timings, chosen[1])
    return Measured(precision, timings, differences, chosen, largest, infer_s)


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
    graphs: Mapping[ProviderName, Graph], width: int, side_by_side: int, max_batch: int
) -> list[Timing]:
    """Runs the providers and batches in turn, so that what disturbs one disturbs the others too.

    As many runs at once as serve at once: they share the memory's bandwidth and the caches,
    which one run alone has to itself. Of batches those that workers would make, and one more.
    A run on one core is one of many side by side, so what counts is its processor time, whoever
    else computes; a run on several is alone, and counts by the clock.
    """
    first, *_ = graphs
    given: dict[int, Pixels] = {}
    wall_s: dict[tuple[ProviderName, int], list[float]] = defaultdict(list)
    cpu_s: dict[tuple[ProviderName, int], list[float]] = defaultdict(list)
    with ThreadPoolExecutor(side_by_side) as pool:

        def run(name: ProviderName, batch: int) -> tuple[float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            list(pool.map(lambda _: graphs[name].run(given[batch]), range(side_by_side)))
            return time.perf_counter() - wall, (time.process_time() - cpu) / side_by_side

        batch = 1
        while batch <= max_batch:
            given[batch] = images(batch, graphs[first].size)
            for name in graphs:  # kernels are chosen and memory is taken at the first run
                run(name, batch)
            if min(run(name, batch)[1] for name in graphs) > BATCH_S:
                break
            batch *= 2
        begun = time.monotonic()
        for turn in range(ROUNDS):
            if turn >= _LEAST_ROUNDS and time.monotonic() - begun > BUDGET_S:
                break
            for batch in given:
                for name in graphs:
                    wall, cpu = run(name, batch)
                    wall_s[name, batch].append(wall)
                    cpu_s[name, batch].append(cpu)
    counts = cpu_s if width == 1 else wall_s
    return [
        Timing(
            name,
            width,
            batch,
            min(wall_s[name, batch]),
            min(cpu_s[name, batch]),
            paired(counts[first, batch], counts[name, batch]),
        )
        for name in graphs
        for batch in given
    ]


def largest_batch(timings: Sequence[Timing], provider: ProviderName) -> tuple[int, float]:
    """Finds the largest batch whose images take little more of a core than those of the best one.

    Returns it, and the seconds of an image in it. What a larger batch saves beside the network, the
    hand-over of each image, is worth that little.
    """
    each_s = {
        timing.batch: timing.cpu_s / timing.batch
        for timing in timings
        if timing.cores == 1 and timing.provider == provider
    }
    most_s = min(each_s.values()) / PAYS
    largest = max(batch for batch, seconds in each_s.items() if seconds <= most_s)
    return largest, each_s[largest]


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
