"""How long the service takes to be SERVING, and what it holds and burns while idle.

    python -m bench.start [--runs 5] [--data-dir FOLDER]

Time runs from the start of the process to the first SERVING answer of
grpc.health.v1, asked every 10 ms. Memory (RSS and PSS, MiB) and CPU are those of
the service alone, after 5 s of idleness.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.running import spread
from service.ops.cpus import describe

IDLE_S = 5.0
TIMEOUT_S = 60.0


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_serving(port: int) -> bool:
    """Asks once, on a connection of its own: a kept one would back off."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def measure(data_dir: Path, *flags: str) -> dict[str, float]:
    """Starts the service once and ends it."""
    port = free_port()
    command = [sys.executable, "-m", "service", "run", f"--port={port}", "--metrics-port=0"]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, f"--data-dir={data_dir}", *flags], stderr=subprocess.DEVNULL
    )
    try:
        while not is_serving(port):
            if time.monotonic() - started > TIMEOUT_S or process.poll() is not None:
                sys.exit("the service did not start")
            time.sleep(0.01)
        serving_s = time.monotonic() - started
        watched = psutil.Process(process.pid)
        before = watched.cpu_times()
        time.sleep(IDLE_S)
        after = watched.cpu_times()
        memory = watched.memory_full_info()
        busy_s = (after.user + after.system) - (before.user + before.system)
        return {
            "serving_s": serving_s,
            "rss_mib": memory.rss / 2**20,
            "pss_mib": memory.pss / 2**20,
            "idle_cpu_percent": 100 * busy_s / IDLE_S,
        }
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def main() -> None:
    """Prints median and range of every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data-dir", type=Path, help="an existing data folder; else a fresh one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.data_dir or Path(temporary)
        runs = [measure(folder) for _ in range(arguments.runs)]
    print(f"{describe()}, n = {len(runs)}")
    for key in runs[0]:
        print(f"{key:18} {spread([run[key] for run in runs], '.2f')}")


if __name__ == "__main__":
    main()
