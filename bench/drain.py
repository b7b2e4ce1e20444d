"""How long a service takes to end under load, and what becomes of the calls under way.

    python -m bench.drain [FOLDER] [--times 5] [--callers 32]

Callers classify one image after another; then comes SIGTERM. Each caller ends at
the first refusal. A call was accepted if it was sent before the signal or was
answered after it. Prints the time from the signal to the exit, and how many calls
that were under way were answered, refused with SHUTTING_DOWN, or cut off without
a reason.
"""

import argparse
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import psutil
from graftml_stubs.v1 import prediction_pb2, prediction_pb2_grpc

from bench.photographs import given_or_written
from bench.running import Running, fine_tune, service, spread
from service.ops.cpus import describe

LOAD_S = 2.0


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    arguments = parser.parse_args()
    took_s: list[float] = []
    total: Counter[str] = Counter()
    with (
        given_or_written(arguments.folder) as folder,
        tempfile.TemporaryDirectory() as data,
    ):
        flags = ("--warm-trainers=0",)
        with service(Path(data), *flags) as running:
            fine_tune(running, folder, arguments.backbone)
        image = next(folder.rglob("*.jpg")).read_bytes()
        for _ in range(arguments.times):
            with service(Path(data), *flags) as running:
                seconds, outcomes = drained(running, image, arguments.callers)
            took_s.append(seconds)
            total += outcomes
            print(f"{seconds:.2f} s, {dict(outcomes)}")
    print(
        f"{describe()}, {arguments.callers} callers, n = {arguments.times}: from "
        f"SIGTERM to exit {spread(took_s, '.2f')} s; calls under way and refused: {dict(total)}"
    )


def drained(running: Running, image: bytes, callers: int) -> tuple[float, Counter[str]]:
    """Ends one service under load; seconds to its exit, and what became of the calls."""
    process = psutil.Process(running.pid)
    signalled = threading.Event()
    outcomes: Counter[str] = Counter()
    guard = threading.Lock()
    request = prediction_pb2.PredictRequest(
        models=[prediction_pb2.ModelSpec(model="bench")],
        images=[prediction_pb2.Image(encoded=image)],
    )

    def call() -> None:
        with grpc.insecure_channel(running.address) as channel:
            stub = prediction_pb2_grpc.PredictionServiceStub(channel)
            while True:
                try:
                    stub.Predict(request, timeout=30)
                except grpc.RpcError as error:
                    with guard:
                        outcomes[told(error)] += 1
                    return
                if signalled.is_set():
                    with guard:
                        outcomes["answered after SIGTERM"] += 1

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    time.sleep(LOAD_S)
    signalled.set()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join()
    return seconds, outcomes


def told(error: grpc.RpcError) -> str:
    """Whether an error says what it is."""
    if "the service is stopping" in str(error.details()):
        return "refused with SHUTTING_DOWN"
    return f"cut off: {error.code().name}"


if __name__ == "__main__":
    main()
