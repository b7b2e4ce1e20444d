"""Graft and a plain server, each in a control group of its own with less than the machine.

    python -m bench.quotas [FOLDER] [--cores 0.5 1 2] [--callers 8] [--seconds 4] [--rounds 5]

Needs a user who may make control groups. Both serve efficientnet_lite0 in int8, beside each other;
the load generator is in no such group. Prints images per second, p99 and processor time of an
image, each of the plain server's in the same round; medians over rounds, range in brackets.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from graftml import Client

from bench.photographs import given_or_written, photos
from bench.running import (
    Running,
    fine_tune,
    measured,
    plain_server,
    service,
    spread,
    wait_until_measured,
)
from service.ops.cpus import describe

GROUPS = Path("/sys/fs/cgroup")
MODEL = "bench"
_PERIOD_US = 100_000


@contextmanager
def group(name: str, cores: float) -> Iterator[Path]:
    """Makes a control group of version 1 or 2, and removes it once its processes have ended."""
    # Version 1 has a hierarchy for the processor.
    top = GROUPS / "cpu" if (GROUPS / "cpu/cgroup.procs").exists() else GROUPS
    own = top / f"graft-{os.getpid()}-{name}"
    try:
        own.mkdir()
        quota_us = round(cores * _PERIOD_US)
        if (own / "cpu.max").exists():
            (own / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        else:
            (own / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (own / "cpu.cfs_quota_us").write_text(str(quota_us))
    except OSError as error:
        sys.exit(f"no control group can be made ({error}): run this as root")
    try:
        yield own
    finally:
        own.rmdir()


@contextmanager
def within(own: Path) -> Iterator[None]:
    """Has this process in a group, and what it starts."""
    (own / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (own.parent / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    """Prints a table with a row for each quota."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--cores", type=float, nargs="+", default=[0.5, 1, 2])
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4, help="of a run")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(given_or_written(arguments.folder))
        made = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "made"
        with service(made, "--warm-trainers=0") as running, Client(running.address) as client:
            fine_tune(running, folder, "efficientnet_lite0", MODEL, "int8")
            exported = client.export_model(MODEL, made.parent / "exported.onnx")
        print(f"{describe()}; {arguments.callers} callers, n = {arguments.rounds}\n")
        print("| Cores | images/s | of the plain server's | its p99 | its processor time |")
        print("| --- | --- | --- | --- | --- |")
        for cores in arguments.cores:
            data = shutil.copytree(made, made.parent / str(cores))
            print(row(cores, data, exported, folder, arguments), flush=True)


def row(
    cores: float, data: Path, exported: Path, folder: Path, arguments: argparse.Namespace
) -> str:
    """Measures with one quota."""
    with ExitStack() as stack:
        groups = [stack.enter_context(group(name, cores)) for name in ("graft", "plain")]
        with within(groups[0]):
            ours = stack.enter_context(service(data, "--warm-trainers=0", keeps_features=True))
        with within(groups[1]):
            plain = plain_server(stack, exported)
        with Client(ours.address) as client:
            client.predict(photos(folder, 1), model=MODEL)
        wait_until_measured(ours.metrics_url)
        servers: dict[str, Running] = {"graft": ours, "plain": plain}
        rounds = []
        for number in range(arguments.rounds):
            found = {}
            for kind in list(servers)[:: -1 if number % 2 else 1]:
                running = servers[kind]
                found[kind] = measured(
                    "load", running.address, folder, "--pid", running.pid, "--kind", kind,
                    "--models", MODEL, "--warm-up", 1, "--callers", arguments.callers,
                    "--seconds", arguments.seconds,
                )  # fmt: skip
                if found[kind]["errors"]:
                    sys.exit(f"calls of {kind} failed: {found[kind]['codes']}")
            rounds.append(found)
    ratios = [
        spread([found["graft"][key] / found["plain"][key] for found in rounds], ".2f")
        for key in ("per_second", "p99_ms", "cpu_ms")
    ]
    per_second = spread([found["graft"]["per_second"] for found in rounds])
    return f"| {cores:g} | {per_second} | {' | '.join(ratios)} |"


if __name__ == "__main__":
    main()
