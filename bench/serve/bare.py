"""The ceiling: the same work in one process, with no server.

    python -m bench.serve.bare MODEL FOLDER [--loops N] [--threads N] [--seconds S]
        [--decoder plain|graft] [--provider NAME]

Each loop is a thread with a session of its own, on ONNX Runtime's CPU provider
as it comes or, with --provider, opened as the service opens its sessions. Prints
one JSON line: images a second, latencies (ms), CPU an image (ms).
"""

import argparse
import json
import threading
import time
from pathlib import Path

import psutil

from bench.serve.load import cpu_s, figures
from bench.serve.work import DECODERS, cpu_run, photos, served_run

WARM_UP = 5


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--decoder", choices=DECODERS, default="graft")
    parser.add_argument("--provider", help="as graft-server's flag")
    arguments = parser.parse_args()
    decode = DECODERS[arguments.decoder]
    images = photos(arguments.folder)
    loops = arguments.loops
    if arguments.provider:
        runs = [
            served_run(arguments.model, arguments.provider, arguments.threads) for _ in range(loops)
        ]
    else:
        runs = [cpu_run(arguments.model, arguments.threads) for _ in range(loops)]
    latencies: list[list[float]] = [[] for _ in range(loops)]
    begin = threading.Barrier(loops + 1)
    stop = threading.Event()

    def loop(number: int) -> None:
        run, place = runs[number], number
        for data in images[:WARM_UP]:
            run(decode(data)[None])
        begin.wait()
        while not stop.is_set():
            started = time.perf_counter()
            int(run(decode(images[place % len(images)])[None])[0].argmax())
            latencies[number].append(time.perf_counter() - started)
            place += loops

    workers = [threading.Thread(target=loop, args=(n,), daemon=True) for n in range(loops)]
    for worker in workers:
        worker.start()
    begin.wait()
    own = psutil.Process()
    started, before_s = time.perf_counter(), cpu_s(own)
    time.sleep(arguments.seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    every = [value for each in latencies for value in each]
    print(json.dumps(figures(every, elapsed, cpu_s(own) - before_s)))


if __name__ == "__main__":
    main()
