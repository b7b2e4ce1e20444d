"""The bare loop of a feature-based job: every photo of a folder decoded and run once, no more.

    python -m bench.one_pass BACKBONE.onnx FOLDER [--threads 2]

Each thread has a session of one core on ONNX Runtime's CPU provider and takes photos eight at a
time. Prints the seconds of one pass, of time and of the processor, without the loads, which a
warm-up is part of.
"""

import argparse
import threading
import time
from pathlib import Path

import numpy as np

from bench.photographs import photos
from bench.serve.plain_server import session
from service.engine.preprocess import decode

_BATCH = 8


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    images = photos(arguments.folder, most=100_000)
    sessions = [session(arguments.model, 1) for _ in range(arguments.threads)]
    name = sessions[0].get_inputs()[0].name
    batches = iter([images[at : at + _BATCH] for at in range(0, len(images), _BATCH)])
    lock, begin = threading.Lock(), threading.Barrier(arguments.threads + 1)

    def work(number: int) -> None:
        run = sessions[number].run
        run(None, {name: np.stack([decode(data) for data in images[:_BATCH]])})
        begin.wait()
        while True:
            with lock:
                batch = next(batches, None)
            if batch is None:
                return
            run(None, {name: np.stack([decode(data) for data in batch])})

    workers = [threading.Thread(target=work, args=(n,)) for n in range(arguments.threads)]
    for worker in workers:
        worker.start()
    begin.wait()
    started, before_s = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.join()
    print(time.perf_counter() - started, time.process_time() - before_s)


if __name__ == "__main__":
    main()
