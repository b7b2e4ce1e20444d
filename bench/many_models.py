"""What a thousand models on one backbone cost, beside one.

    python -m bench.many_models FOLDER [--models 1000] [--seconds 8] [--callers 16]

Fine-tunes one model on FOLDER (photos in a folder per class), publishes copies
of its head under other names straight into the data folder while the service is
down, then serves: memory, throughput with calls spread over all models against
throughput on one (interleaved), and the first answer of cold heads against warm
ones.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil
from graft import Client

from bench.running import service
from service.domain import Manifest
from service.inference import head as heads
from service.storage.artifacts import Artifacts
from service.storage.database import Database
from service.storage.models import ModelStore

ROUNDS = 3


def publish_copies(data_dir: Path, count: int) -> None:
    """Gives each copy a bias of its own, so that no two heads are the same file."""
    database = Database(data_dir)
    try:
        artifacts = Artifacts(data_dir / "artifacts")
        models = ModelStore(database, artifacts)
        record = models.get_version("bench", None, None)
        head = heads.load(record.head_path)
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary)
            for report in record.head_path.parent.glob("report.*"):
                shutil.copy(report, out)
            for number in range(count):
                own = heads.Head(head.weight, head.bias + number * 1e-6, head.classes)
                heads.save(own, out / "head.safetensors")
                manifest: Manifest = msgspec.structs.replace(
                    record.manifest, model=f"m{number}", job_id=f"copy-{number}"
                )
                (out / "manifest.json").write_bytes(msgspec.json.encode(manifest))
                stored = artifacts.put(out)
                with database.transaction() as connection:
                    models.publish(connection, f"m{number}", f"copy-{number}", stored)
    finally:
        database.close()


def load(address: str, folder: Path, arguments: argparse.Namespace, pid: int, models: str) -> float:
    """Pictures a second with calls spread over the models."""
    command = [sys.executable, "-m", "bench.serve.load", address, "graft", str(folder)]
    flags = [str(arguments.callers), str(arguments.seconds), str(pid), models]
    done = subprocess.run(command + flags, check=True, capture_output=True, text=True, timeout=300)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["errors"] == 0
    return float(figures["per_second"])


def first_answers_ms(client: Client, picture: Path, names: list[str]) -> list[float]:
    """Milliseconds of one call to each model."""
    times = []
    for name in names:
        started = time.perf_counter()
        client.predict(picture, model=name)
        times.append((time.perf_counter() - started) * 1000)
    return times


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    arguments = parser.parse_args()
    picture = next(arguments.folder.rglob("*.jpg"))
    names = [f"m{number}" for number in range(arguments.models)]
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = Path(temporary)
        with service(data_dir) as running, Client(running.address) as client:
            client.wait_ready(30)
            job = client.fine_tune(arguments.folder, name="bench", backbone=arguments.backbone)
            job.wait(timeout_s=600)
        publish_copies(data_dir, arguments.models)
        with service(data_dir) as running, Client(running.address) as client:
            client.wait_ready(30)
            process = psutil.Process(running.pid)
            first_answers_ms(client, picture, ["bench"] * 20)
            one_mib = process.memory_full_info().pss / 2**20
            cold = first_answers_ms(client, picture, names)
            all_mib = process.memory_full_info().pss / 2**20
            warm = first_answers_ms(client, picture, names[:100])
            alone, spread = [], []
            for _ in range(ROUNDS):
                alone.append(load(running.address, arguments.folder, arguments, running.pid, "m0"))
                spread.append(
                    load(running.address, arguments.folder, arguments, running.pid, ",".join(names))
                )
    ratios = [many / single for many, single in zip(spread, alone, strict=True)]
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, {arguments.backbone}, "
          f"{arguments.models} models, {arguments.callers} callers")  # fmt: skip
    print(f"memory (PSS): {one_mib:.0f} MiB with one model loaded, {all_mib:.0f} MiB with all")
    print(f"first answer: cold head {statistics.median(cold):.1f} ms "
          f"(p99 {statistics.quantiles(cold, n=100)[98]:.1f}), warm {statistics.median(warm):.1f} ms")  # fmt: skip
    print(f"throughput spread over all, of one model's: {statistics.median(ratios):.3f} "
          f"({min(ratios):.3f} to {max(ratios):.3f}, n = {ROUNDS} rounds of {arguments.seconds:g} s; "
          f"{statistics.median(spread):.1f} against {statistics.median(alone):.1f} pictures/s)")  # fmt: skip


if __name__ == "__main__":
    main()
