"""Graft beside its ceiling and a plain server: the same photos, the same network, one run.

    python -m bench.serve FOLDER [--backbone resnet18] [--seconds 10] [--rounds 2] [--flags ...]

FOLDER holds JPEG photos in a folder per class. Everything is interleaved round
by round, since machines drift; only ratios within one run count. Medians over
rounds, range in brackets.
"""

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from graft import Client

from bench.running import Running, service

CALLERS = (1, 8, 32)


def measured(module: str, *arguments: object) -> dict[str, Any]:
    """Runs one measuring process and reads its line."""
    command = [sys.executable, "-m", f"bench.serve.{module}", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def make_model(client: Client, folder: Path, backbone: str, out: Path) -> Path:
    """Fine-tunes on a few of the photos; returns the exported file."""
    pairs = []
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        pairs += [(label.name, photo) for photo in sorted(label.rglob("*.jpg"))[:6]]
    weights = "" if backbone == "efficientnet_lite0" else "random"
    job = client.fine_tune(pairs, name="bench", backbone=backbone, weights=weights)
    job.wait(timeout_s=300)
    file = out / "bench.onnx"
    client.export_model("bench", file)
    return file


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


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flags", nargs="*", default=[], help="of graft-server, without the --")
    arguments = parser.parse_args()
    folder, seconds = arguments.folder, arguments.seconds
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = [f"--{flag}" for flag in arguments.flags]
        graft = stack.enter_context(service(temporary / "data", *flags))
        client = stack.enter_context(Client(graft.address))
        client.wait_ready(30)
        model = make_model(client, folder, arguments.backbone, temporary)
        plain = plain_server(stack, model)
        for _ in range(arguments.rounds):
            for decoder in ("plain", "graft"):
                for loops, threads in ((1, 2), (2, 1)):
                    name = f"no server, {loops} loop(s) x {threads} thread(s), {decoder} decoding"
                    results[name].append(
                        measured("bare", model, folder, loops, threads, seconds, decoder)
                    )
                    time.sleep(1)
            for callers in CALLERS:
                for kind, server in (("plain", plain), ("graft", graft)):
                    load = (server.address, kind, folder, callers, seconds, server.pid)
                    results[f"{kind} server, {callers} callers"].append(measured("load", *load))
                    time.sleep(1)
        memory = psutil.Process(graft.pid).memory_full_info()
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, {arguments.backbone}, "
          f"{arguments.rounds} rounds of {seconds:g} s, flags {arguments.flags}\n")  # fmt: skip
    print("| What | pictures/s | p50 ms | p99 ms | server CPU ms a picture | errors |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        cells = [_cell(runs, key) for key in ("per_second", "p50_ms", "p99_ms", "cpu_ms")]
        print(f"| {name} | {' | '.join(cells)} | {sum(run['errors'] for run in runs)} |")
    print(f"\ngraft-server: RSS {memory.rss / 2**20:.0f} MiB, PSS {memory.pss / 2**20:.0f} MiB")


def _cell(runs: list[dict[str, Any]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
