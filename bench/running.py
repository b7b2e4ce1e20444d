"""Processes for a measurement: a service of its own, and programs that print figures."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from graftml import Client
from graftml.types import ServingPrecision

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
MEASURE_TIMEOUT_S = 900.0
MEASURED_TIMEOUT_S = 600.0
"""Time for all backbones of a service to have their providers measured."""

T = TypeVar("T")


@dataclass(frozen=True)
class Running:
    """Where it listens, and what it is."""

    address: str
    metrics_url: str
    process: "subprocess.Popen[Any]"

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid


@contextlib.contextmanager
def service(
    data_dir: Path, *flags: str, module: str = "service", keeps_features: bool = False
) -> Iterator[Running]:
    """Runs `python -m service run` on free ports; its log goes to `data_dir`/service.log.

    It serves when this is entered. Settings in this process's environment do not reach it: what
    is measured is what the flags say, else the defaults; but without `keeps_features` none of
    recent images are kept, since benches send the same images again and again.
    """
    command = [sys.executable, "-m", module, "run", "--port=0", "--metrics-port=0"]
    command += ["--recent-features-mb=0"] * (not keeps_features)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
    data_dir.mkdir(parents=True, exist_ok=True)
    log_file = data_dir / "service.log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [*command, f"--data-dir={data_dir}", *flags], stderr=log, env=environment,
            # Ctrl-C ends the bench, which ends it.
            start_new_session=True,
        )  # fmt: skip
        try:
            entry = serving(log_file, process)
            yield Running(
                f"127.0.0.1:{entry['port']}",
                f"http://127.0.0.1:{entry['metrics_port']}/metrics",
                process,
            )
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serving(log_file: Path, process: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """What a service that was started says of itself in its log when it serves."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log_file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry: dict[str, Any] = json.loads(line)
                if entry.get("message") == "serving":
                    return entry
        time.sleep(0.02)
    sys.exit("the service did not start:\n" + log_file.read_text())


def fine_tune(
    running: Running,
    folder: Path,
    backbone: str,
    name: str = "bench",
    precision: ServingPrecision = "auto",
) -> None:
    """Makes a model of a few photos; ResNets start from random weights, which cost the same."""
    pairs = []
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        pairs += [(label.name, photo) for photo in sorted(label.rglob("*.jpg"))[:6]]
    weights = "" if backbone == "efficientnet_lite0" else "random"
    with Client(running.address) as client:
        job = client.fine_tune(
            pairs, name=name, backbone=backbone, weights=weights, method="feature_based",
            serving_precision=precision,
        )  # fmt: skip
        job.wait(timeout_s=300)


def plain_server(stack: contextlib.ExitStack, model: Path) -> Running:
    """Starts the yardstick."""
    command = [sys.executable, "-m", "bench.serve.plain_server", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    assert process.stdout is not None
    return Running(f"127.0.0.1:{int(process.stdout.readline())}", "", process)


def wait_until_measured(metrics_url: str) -> None:
    """Waits until no backbone waits to be measured."""
    deadline = time.monotonic() + MEASURED_TIMEOUT_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(metrics_url, timeout=10) as answer:  # nosec B310 # our own server
            lines = answer.read().decode().splitlines()
        (pending,) = (x for x in lines if x.startswith("graft_measurements_pending"))
        if float(pending.split()[-1]) == 0:
            return
        time.sleep(0.5)
    sys.exit(f"backbones were not measured within {MEASURED_TIMEOUT_S:g} s")


def measured(module: str, *arguments: object) -> dict[str, Any]:
    """Runs a measuring program, `bench.serve.load` or `bench.serve.bare`; reads its line."""
    command = [sys.executable, "-m", f"bench.serve.{module}", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_S, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def at_once(works: Sequence[Callable[[], T]]) -> tuple[list[T], float, float]:
    """Runs each in a thread; returns what they return, seconds, and those of the processor."""
    begin = threading.Barrier(len(works) + 1)

    def run(work: Callable[[], T]) -> T:
        begin.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(run, work) for work in works]
        begin.wait()
        began, used_s = time.perf_counter(), time.process_time()
        found = [future.result() for future in futures]
        return found, time.perf_counter() - began, time.process_time() - used_s


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Formats the median, and the range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def pss_mib(pid: int) -> float:
    """Memory of a process alone: its own pages and its share of those that it shares."""
    return float(psutil.Process(pid).memory_full_info().pss) / 2**20


def anonymous_mib(pid: int) -> float:
    """Memory that a process alone has filled, without pages of files.

    Those of libraries count for less while a trainer has them mapped, too: the PSS
    of a service goes up and down by some 50 MiB with the trainers beside it.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Anonymous":
            return float(rest.split()[0]) / 1024
    raise ValueError(f"the kernel does not tell the anonymous memory of process {pid}")
