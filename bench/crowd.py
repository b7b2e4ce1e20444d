"""What a crowd that does nothing costs: idle connections, and watchers of a job.

    python -m bench.crowd [FOLDER] [--connections 1000] [--watchers 200] [--rounds 3]

Predict calls arrive at half of what can be carried, without the crowd and beside it,
in turns; each round is a crowd of its own. The watched job has no trainer: it waits
at a point of its preparation for as long as the service lives.
"""

import argparse
import contextlib
import resource
import socket
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
from graftml import Client
from graftml_stubs.v1 import fine_tuning_pb2, fine_tuning_pb2_grpc

from bench.photographs import given_or_written
from bench.running import Running, anonymous_mib, fine_tune, measured, service, spread
from service.ops.cpus import describe

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How an HTTP/2 connection begins (RFC 9113, 3.4), with settings that say nothing."""


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--watchers", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--backbone", default="resnet18")
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with (
        given_or_written(arguments.folder) as folder,
        tempfile.TemporaryDirectory() as data,
    ):
        with service(Path(data), "--warm-trainers=0") as running:
            fine_tune(running, folder, arguments.backbone)
        flags = ("--warm-trainers=0", "--drain-s=1", "--failpoints=hang@job.preparing")
        with service(Path(data), *flags) as running, Client(running.address) as client:
            job = client.fine_tune(folder, name="watched").job_id
            to = (running.address, folder, "--pid", running.pid)
            capacity = measured("load", *to, "--callers", 32, "--seconds", 10)["per_second"]
            load = ("--rate", capacity / 2, "--seconds", arguments.seconds)
            alone, beside, grown = [], [], []
            for _ in range(arguments.rounds):
                alone.append(measured("load", *to, *load))
                before = anonymous_mib(running.pid)
                with crowd(running, job, arguments.connections, arguments.watchers):
                    grown.append(anonymous_mib(running.pid) - before)
                    beside.append(measured("load", *to, *load))
            left = anonymous_mib(running.pid)
    errors = sum(one["errors"] for one in (*alone, *beside))
    print(
        f"{describe()}, {arguments.backbone}, "
        f"{capacity / 2:.0f} calls/s, n = {arguments.rounds} of {arguments.seconds:g} s: "
        f"{arguments.connections} idle connections and {arguments.watchers} watchers took "
        f"{spread(grown)} MiB, {left:.0f} MiB in all at the end; errors {errors}"
    )
    for name in ("p50_ms", "p99_ms"):
        ratios = [b[name] / a[name] for a, b in zip(alone, beside, strict=True)]
        print(
            f"{name}: {statistics.median(a[name] for a in alone):.1f} alone, "
            f"{statistics.median(b[name] for b in beside):.1f} beside, "
            f"ratio {spread(ratios, '.2f')}"
        )


@contextlib.contextmanager
def crowd(running: Running, job_id: str, connections: int, watchers: int) -> Iterator[None]:
    """Is there while the block runs; every watcher has seen the job's first event."""
    host, _, port = running.address.partition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(connections):
            idle = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            idle.sendall(_HELLO)
            assert idle.recv(9), "the service hung up"
        channel = stack.enter_context(grpc.insecure_channel(running.address))
        stub = fine_tuning_pb2_grpc.FineTuningServiceStub(channel)
        watching = [
            stub.WatchJob(fine_tuning_pb2.WatchJobRequest(job_id=job_id)) for _ in range(watchers)
        ]
        for watcher in watching:
            next(watcher)
            stack.callback(watcher.cancel)
        yield


if __name__ == "__main__":
    main()
