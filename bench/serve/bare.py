"""The ceiling: the same work in one process, with no server.

    python -m bench.serve.bare MODEL FOLDER [--loops N] [--threads N] [--seconds S]
        [--provider NAME]

Each loop is a thread. They decode as everybody does and have a session each, on ONNX
Runtime's CPU provider as it comes; with --provider they decode as the service does and
share a graph that is made as the service makes its own. Prints one JSON line: images a
second, latencies (ms), CPU an image (ms).
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.photographs import photos
from bench.running import at_once
from bench.serve.load import cpu_times, figures
from bench.serve.plain_server import plain_decode, session
from service.engine import preprocess
from service.engine.runtime import compiled

WARM_UP = 5

Work = Callable[[bytes], Any]
"""From a JPEG file to the probabilities float32 [1, classes]."""


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--provider", choices=("cpu", "openvino", "cuda", "tensorrt"))
    arguments = parser.parse_args()
    images = photos(arguments.folder)
    loops = arguments.loops
    works = plain_works(arguments) if not arguments.provider else served_works(arguments)
    for work in works:
        for data in images[:WARM_UP]:
            work(data)
    before, until = cpu_times(), time.perf_counter() + arguments.seconds

    def loop(number: int) -> list[float]:
        taken = []
        for place in itertools.count(number, loops):
            if (started := time.perf_counter()) >= until:
                break
            int(works[number](images[place % len(images)])[0].argmax())
            taken.append(time.perf_counter() - started)
        return taken

    latencies, elapsed, _ = at_once([partial(loop, number) for number in range(loops)])
    used = cpu_times().since(before)
    every = [value for each in latencies for value in each]
    others = {"others_cpu_percent": 100 * used.others_s / elapsed, "generator_cpu_percent": 0.0}
    print(json.dumps({**figures(every, elapsed, used.own_s), **others}))


def plain_works(arguments: argparse.Namespace) -> list[Work]:
    """A session for each loop."""

    def work(run: Any, name: str) -> Work:
        return lambda data: run(None, {name: plain_decode(data)[None]})[0]

    own = [session(arguments.model, arguments.threads) for _ in range(arguments.loops)]
    return [work(each.run, each.get_inputs()[0].name) for each in own]


def served_works(arguments: argparse.Namespace) -> list[Work]:
    """One graph for all loops, of a whole exported classifier."""
    model, cores = arguments.model.read_bytes(), arguments.loops * arguments.threads
    graph = compiled(model, arguments.threads, arguments.provider, cores)
    return [lambda data: graph.run(preprocess.decode(data)[None])] * arguments.loops


if __name__ == "__main__":
    main()
