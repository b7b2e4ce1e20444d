"""The ceiling: the same work in one process, with no server.

    python -m bench.serve.bare MODEL FOLDER LOOPS THREADS SECONDS DECODER

LOOPS threads each run a session of their own with THREADS threads. Prints one
JSON line: pictures a second, latencies (ms), CPU a picture (ms).
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path

from bench.serve.load import figures
from bench.serve.work import DECODERS, photos, session


def main() -> None:
    """Runs it."""
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loops, threads, seconds = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    decode = DECODERS[sys.argv[6]]
    pictures = photos(folder)
    sessions = [session(model, threads) for _ in range(loops)]
    latencies: list[list[float]] = [[] for _ in range(loops)]
    begin = threading.Barrier(loops + 1)
    stop = threading.Event()

    def loop(number: int) -> None:
        own, place = sessions[number], number
        name = own.get_inputs()[0].name
        for data in pictures[:3]:
            own.run(None, {name: decode(data)[None]})
        begin.wait()
        while not stop.is_set():
            started = time.perf_counter()
            (answer,) = own.run(None, {name: decode(pictures[place % len(pictures)])[None]})
            int(answer[0].argmax())
            latencies[number].append(time.perf_counter() - started)
            place += loops

    workers = [threading.Thread(target=loop, args=(n,)) for n in range(loops)]
    for worker in workers:
        worker.start()
    begin.wait()
    started, cpu = time.perf_counter(), _cpu_s()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - started
    every = [value for own in latencies for value in own]
    print(json.dumps(figures(every, elapsed, _cpu_s() - cpu, 0)))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
