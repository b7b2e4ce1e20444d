"""What happens at several times the load that can be carried, and afterwards.

    python -m bench.overload [FOLDER] [--seconds 60] [--factor 3] [--timeout 2]

Capacity is what 32 callers of the closed loop get; then calls arrive at a
multiple of it, whatever the service does, each with a deadline; then the closed
loop again.
"""

import argparse
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.photographs import given_or_written
from bench.running import Running, fine_tune, measured, pss_mib, service
from service.ops.cpus import describe

CALLERS = 32


class Watched:
    """What a look at the service finds, four times a second: memory, health, metrics."""

    def __init__(self, running: Running) -> None:
        self.most_mib = 0.0
        self.health_ms: list[float] = []
        self.metrics_ms: list[float] = []
        self._running = running
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        check = health_pb2.HealthCheckRequest()
        with grpc.insecure_channel(self._running.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not self._stop.wait(0.25):
                self.most_mib = max(self.most_mib, pss_mib(self._running.pid))
                begun = time.perf_counter()
                answer = health.Check(check, timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                asked = time.perf_counter()
                with urllib.request.urlopen(self._running.metrics_url, timeout=5) as metrics:  # nosec B310 # our own server
                    assert metrics.read()
                self.health_ms.append((asked - begun) * 1000)
                self.metrics_ms.append((time.perf_counter() - asked) * 1000)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--factor", type=float, default=3)
    parser.add_argument("--timeout", type=float, default=2, help="of each call, seconds")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument(
        "--flags", nargs="*", default=[], help="of graft-server run, without the --"
    )
    arguments = parser.parse_args()
    flags = [f"--{flag}" for flag in arguments.flags]
    with (
        given_or_written(arguments.folder) as folder,
        tempfile.TemporaryDirectory() as data,
        service(Path(data), *flags) as running,
    ):
        fine_tune(running, folder, arguments.backbone)
        to = (running.address, folder, "--pid", running.pid)

        def closed(seconds: float) -> dict[str, float]:
            return measured("load", *to, "--callers", CALLERS, "--seconds", seconds)

        before = closed(10)
        calm_mib = pss_mib(running.pid)
        rate = arguments.factor * before["per_second"]
        with Watched(running) as seen:
            during = measured(
                "load", *to, "--rate", rate, "--seconds", arguments.seconds,
                "--timeout", arguments.timeout,
            )  # fmt: skip
        after_mib = pss_mib(running.pid)
        after = closed(10)
    print(
        f"{describe()}, {arguments.backbone}, "
        f"{arguments.seconds:g} s at {arguments.factor:g} x capacity, deadlines of "
        f"{arguments.timeout:g} s, flags {arguments.flags}"
    )
    assert not before["errors"], "the service does not answer well before the overload"
    goodput, capacity = during["per_second"], before["per_second"]
    print(
        f"capacity {capacity:.1f} images/s; offered {during['offered_per_second']:.1f}; goodput "
        f"{goodput:.1f} = {goodput / capacity:.3f} of capacity; the generator took "
        f"{during['generator_cpu_percent']:.0f} % of a core"
    )
    print(f"errors before and after {before['errors']}, {after['errors']}")
    print(f"outcomes {during['outcomes']}; codes {during['codes']}")
    print(
        f"accepted: p50 {during['p50_ms']:.0f}, p99 {during['p99_ms']:.0f}, max "
        f"{during['max_ms']:.0f} ms; refused: p50 {during['refused_p50_ms']:.1f}, p99 "
        f"{during['refused_p99_ms']:.1f}, max {during['refused_max_ms']:.1f} ms"
    )
    print(
        f"memory (PSS): {calm_mib:.0f} MiB before, at most {seen.most_mib:.0f} during, "
        f"{after_mib:.0f} after"
    )
    for name, found in (("health", seen.health_ms), ("metrics", seen.metrics_ms)):
        print(
            f"{name} meanwhile: p50 {statistics.median(found):.1f}, max {max(found):.1f} ms, "
            f"n = {len(found)}"
        )
    print(
        f"afterwards {after['per_second']:.1f} images/s = "
        f"{after['per_second'] / before['per_second']:.3f} of before, p50 {after['p50_ms']:.0f} "
        f"against {before['p50_ms']:.0f} ms"
    )


if __name__ == "__main__":
    main()
