"""Graft beside its ceiling and a plain server: the same photos, the same network, one run.

    python -m bench.serve [FOLDER] [--backbone resnet18] [--seconds 8] [--rounds 3]
        [--settings "provider=cpu precision=fp32" ""]

FOLDER holds JPEG photos in a folder per class. Each of the settings is a service
of its own (the flags of graft-server, without the --; none for the defaults).
Everything is interleaved round by round, since machines drift; only ratios
within a round count. Medians over rounds, range in brackets. The backbone
near_empty costs next to nothing: what is left is the server.
"""

import argparse
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from graft import Client

from bench.photographs import given_or_written
from bench.published import NEAR_EMPTY, publish_near_empty
from bench.running import Running, measured, pss_mib, service
from bench.serve.models import NAME, fine_tune

CALLERS = (1, 8, 32)
OPEN_PART = 0.7
"""Of the capacity just measured: the rate of the open loop."""
PAUSE_S = 1.0


@dataclass(frozen=True)
class Graft:
    """One service, and what its sessions are opened with."""

    name: str
    running: Running
    exported: Path
    provider: str


Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Prints a Markdown table, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", default=["provider=cpu precision=fp32", ""])
    arguments = parser.parse_args()
    results: Runs = defaultdict(list)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = stack.enter_context(given_or_written(arguments.folder))
        grafts: list[Graft] = []
        for number, setting in enumerate(arguments.settings):
            data_dir = temporary / f"data{number}"
            flags = [f"--{flag}" for flag in setting.split()]
            if arguments.backbone == NEAR_EMPTY:
                data_dir.mkdir()
                publish_near_empty(data_dir, NAME)
            graft = stack.enter_context(service(data_dir, *flags))
            with Client(graft.address) as client:
                client.wait_ready(30)
                if arguments.backbone != NEAR_EMPTY:
                    fine_tune(client, folder, arguments.backbone)
                client.export_model(NAME, temporary / f"{number}.onnx")
            given = dict(flag.split("=") for flag in setting.split())
            own = Graft(
                f"graft, {setting or 'defaults'}",
                graft,
                temporary / f"{number}.onnx",
                given.get("provider", "auto"),
            )
            grafts.append(own)
        # The plain server serves the file of the first settings.
        plain = plain_server(stack, grafts[0].exported)
        for _ in range(arguments.rounds):
            one_round(results, folder, plain, grafts, arguments.seconds)
        memory = {graft.name: pss_mib(graft.running.pid) for graft in grafts}
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, {arguments.backbone}, "
          f"{arguments.rounds} rounds of {arguments.seconds:g} s\n")  # fmt: skip
    print_table(results)
    for name, mib in memory.items():
        print(f"\n{name}: {mib:.0f} MiB (PSS)")
        print_ratios(results, name)


def one_round(
    results: Runs,
    folder: Path,
    plain: Running,
    grafts: "list[Graft]",
    seconds: float,
) -> None:
    """Everything once."""
    for loops, threads in ((1, 2), (2, 1)):
        flags = ("--loops", loops, "--threads", threads, "--seconds", seconds)
        for decoder in ("plain", "graft"):
            row = results[bare(loops, threads, decoder)]
            own_flags = (*flags, "--decoder", decoder)
            row.append(measured("bare", grafts[0].exported, folder, *own_flags))
            time.sleep(PAUSE_S)
        for graft in grafts:
            row = results[bare(loops, threads, graft.name)]
            own_flags = (*flags, "--provider", graft.provider)
            row.append(measured("bare", graft.exported, folder, *own_flags))
            time.sleep(PAUSE_S)
    servers = {"plain": plain, **{graft.name: graft.running for graft in grafts}}
    for callers in CALLERS:
        for name, server in servers.items():
            flags = ("--kind", "plain" if name == "plain" else "graft", "--seconds", seconds)
            row = results[f"{name}, {callers} callers"]
            row.append(
                measured(
                    "load", server.address, folder, "--pid", server.pid, "--callers", callers,
                    *flags,
                )
            )  # fmt: skip
            time.sleep(PAUSE_S)
    for name, server in servers.items():
        rate = OPEN_PART * results[f"{name}, {CALLERS[-1]} callers"][-1]["per_second"]
        flags = ("--kind", "plain" if name == "plain" else "graft", "--seconds", seconds)
        row = results[f"{name}, open loop at {OPEN_PART} of its capacity"]
        row.append(
            measured("load", server.address, folder, "--pid", server.pid, "--rate", rate, *flags)
        )
        time.sleep(PAUSE_S)


def bare(loops: int, threads: int, kind: str) -> str:
    """What a ceiling is called: ONNX Runtime's CPU provider with a decoder, or as one serves."""
    what = f"as {kind}" if kind.startswith("graft, ") else f"CPU provider, {kind} decoding"
    return f"no server, {loops} loop(s) x {threads} thread(s), {what}"


def plain_server(stack: ExitStack, model: Path) -> Running:
    """Starts the yardstick."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench.serve.plain_server", str(model), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    return Running(f"127.0.0.1:{port}", "", process.pid)


def print_table(results: Runs) -> None:
    """Medians and ranges."""
    print("| What | images/s | p50 ms | p99 ms | server CPU ms an image | errors |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        keys = ("per_second", "p50_ms", "p99_ms", "cpu_ms")
        cells = [spread([run[key] for run in runs]) for key in keys]
        print(f"| {name} | {' | '.join(cells)} | {sum(run['errors'] for run in runs)} |")


def print_ratios(results: Runs, name: str) -> None:
    """Each taken within a round."""
    most = CALLERS[-1]
    one, many = f"{name}, {CALLERS[0]} callers", f"{name}, {most} callers"
    for text, above, below, key in (
        ("p50 of 1 caller, of the bare 2-thread loop's (CPU provider, plain decoding)",
         one, bare(1, 2, "plain"), "p50_ms"),
        ("p50 of 1 caller, of the bare 2-thread loop's (CPU provider, our decoding)",
         one, bare(1, 2, "graft"), "p50_ms"),
        ("p50 of 1 caller, of the bare 2-thread loop's (same provider)",
         one, bare(1, 2, name), "p50_ms"),
        (f"throughput of {most} callers, of the bare ceiling's (CPU provider, plain decoding)",
         many, bare(2, 1, "plain"), "per_second"),
        (f"throughput of {most} callers, of the bare ceiling's (CPU provider, our decoding)",
         many, bare(2, 1, "graft"), "per_second"),
        (f"throughput of {most} callers, of the bare ceiling's (same provider)",
         many, bare(2, 1, name), "per_second"),
        (f"throughput of {most} callers, of the plain server's",
         many, f"plain, {most} callers", "per_second"),
        (f"server CPU an image, {most} callers, of the bare ceiling's (same provider)",
         many, bare(2, 1, name), "cpu_ms"),
    ):  # fmt: skip
        pairs = zip(results[above], results[below], strict=True)
        print(f"- {text}: {spread([a[key] / b[key] for a, b in pairs], '.3f')}")


def spread(values: list[float], form: str = ".1f") -> str:
    """Median, and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
