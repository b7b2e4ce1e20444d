"""What features of middle layers cost, beside a version of this work that has none.

    python -m bench.heads FOLDER [--beside CHECKOUT] [--only serve memory job]
        [--models 1000] [--rounds 5] [--seconds 8] [--callers 16] [--backbone NAME]

FOLDER holds photos in a folder per class. Three measurements, each round by round, since machines
drift; only ratios within a round count, and the order changes from round to round.

serve: images a second of a backbone's file with its taps, and a head on all its features, against
the same network's file without taps, in one service. memory: what `--models` copies of a head
take when all are loaded; of a head that chose fewer features than there are, with all of them.
job: seconds from a FineTune call to the first served answer, feature-based; the first job of an
empty service, and the same again. Of memory and jobs each version measures itself: this one, and
with --beside the other checkout's code, run by this Python with that folder's modules.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What is imported here is there in either version: this file runs in both.
import msgspec
import numpy as np
import onnx
from graft import Client

from bench.fine_tune import job, wait_until_warm
from bench.published import publish, read
from bench.running import measured, pss_mib, service
from service.domain import Manifest
from service.engine.head import Head
from service.ops.cpus import describe

ROOT = Path(__file__).parents[1]
STEP_TIMEOUT_S = 1800.0
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def _an_image(folder: Path) -> Path:
    return next(path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES)


def _fine_tuned(data_dir: Path, folder: Path, backbone: str) -> tuple[Head, Manifest]:
    """Fine-tunes `bench`; returns its head, widened to all features, and its manifest."""
    with service(data_dir) as running, Client(running.address) as client:
        client.wait_ready(30)
        client.fine_tune(folder, name="bench", backbone=backbone).wait(timeout_s=600)
    head, backbone, manifest = read(data_dir, "bench")
    graph = onnx.load_from_string(backbone).graph
    lacking = graph.output[0].type.tensor_type.shape.dim[1].dim_value - head.weight.shape[1]
    weight = np.pad(head.weight, ((0, 0), (0, lacking)))
    return dataclasses.replace(head, weight=weight), manifest


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures the memory of one model's service, and of many, MiB (PSS)."""
    names = [f"m{number}" for number in range(arguments.models)]
    with tempfile.TemporaryDirectory() as temporary:
        data_dir = Path(temporary)
        head, manifest = _fine_tuned(data_dir, arguments.folder, arguments.backbone)
        # Each with a bias of its own: no two are the same file.
        copies = (
            (name, dataclasses.replace(head, bias=head.bias + np.float32(number * 1e-6)))
            for number, name in enumerate(names)
        )
        publish(data_dir, copies, manifest)
        image = _an_image(arguments.folder)
        with service(data_dir) as running, Client(running.address) as client:
            client.wait_ready(30)
            for _ in range(100):
                client.predict(image, model="bench")
            one_mib = pss_mib(running.pid)
            for name in names:
                client.predict(image, model=name)
            all_mib = pss_mib(running.pid)
    return {
        "classes": len(head.classes),
        "features": head.weight.shape[1],
        "head_kib": head.nbytes / 1024,
        "one_mib": one_mib,
        "more_mib": all_mib - one_mib,
    }


def fine_tune(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures the first job of an empty service and the same again, seconds."""
    how = argparse.Namespace(
        method="feature_based", backbone=arguments.backbone, weights="", recipe="auto"
    )
    image, taken = _an_image(arguments.folder), {}
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder)) as running,
        Client(running.address) as client,
    ):
        client.wait_ready(30)
        dataset = client.upload_dataset(arguments.folder).dataset_id
        for kind in ("cold", "repeated"):
            wait_until_warm(running.pid)
            taken[kind], version = job(client, dataset, image, how)
    assert version.headline is not None
    return {**taken, "accuracy": version.headline.accuracy}


def serve(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Measures images a second with taps and without, by rounds."""
    from trainer import backbones, export  # noqa: PLC0415 - torch

    found: dict[str, list[float]] = {"taps": [], "none": []}
    with tempfile.TemporaryDirectory() as temporary:
        data_dir, file = Path(temporary) / "data", Path(temporary) / "none.onnx"
        head, manifest = _fine_tuned(data_dir, arguments.folder, arguments.backbone)
        network = backbones.load(arguments.backbone, manifest.weights, 0, data_dir / "weights")
        network.taps = ()
        export.to_onnx(network, file)
        publish(data_dir, [("taps", head)], manifest)
        publish(
            data_dir,
            [("none", dataclasses.replace(head, weight=head.weight[:, : network.feature_dim]))],
            msgspec.structs.replace(
                manifest, backbone_digest=hashlib.sha256(file.read_bytes()).hexdigest()
            ),
            file.read_bytes(),
        )
        with service(data_dir) as running, Client(running.address) as client:
            client.wait_ready(30)
            for number in range(arguments.rounds + 1):
                for name in sorted(found, reverse=number % 2 == 1):
                    figures = measured(
                        "load", running.address, arguments.folder, "--pid", running.pid,
                        "--callers", arguments.callers, "--seconds", arguments.seconds,
                        "--models", name,
                    )  # fmt: skip
                    assert figures["errors"] == 0
                    # The first round warms both.
                    if number:
                        found[name].append(figures["per_second"])
    return found


STEPS = {"memory": memory, "job": fine_tune}
"""Those that each version runs by itself."""


def _in_version(root: Path, step: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs a step with the modules of the checkout `root`."""
    command = [sys.executable, "-P", __file__, str(arguments.folder), "--step", step]
    command += ["--models", str(arguments.models), "--backbone", arguments.backbone]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'clients/python/src'}"}
    done = subprocess.run(
        command,
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=STEP_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{step} in {root} failed:\n{done.stderr}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}}, n = {len(values)})"


def _say(step: str, rows: dict[str, list[dict[str, float]]], key: str, unit: str) -> None:
    for version, each in rows.items():
        print(f"{step}, {version}: {key} {_spread([row[key] for row in each])} {unit}")
    if len(rows) > 1:
        own, other = rows.values()
        ratios = [a[key] / b[key] for a, b in zip(own, other, strict=True)]
        print(f"{step}: {key}, of the other's {_spread(ratios, '.3f')}", flush=True)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--only", nargs="+", choices=("serve", *STEPS), default=["serve", *STEPS])
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments)))
        return
    print(f"{describe()}, {arguments.backbone}", flush=True)
    if "serve" in arguments.only:
        rates = serve(arguments)
        for name, values in rates.items():
            print(f"serve, taps: {name}: {_spread(values, '.1f')} images/s")
        ratios = [a / b for a, b in zip(rates["taps"], rates["none"], strict=True)]
        print(f"serve: with taps, of without {_spread(ratios, '.3f')}", flush=True)
    roots = {"this": ROOT}
    if arguments.beside:
        roots["the other"] = arguments.beside.resolve()
    for step in STEPS:
        if step not in arguments.only:
            continue
        rows: dict[str, list[dict[str, Any]]] = {version: [] for version in roots}
        for number in range(arguments.rounds):
            for version in list(roots)[:: -1 if number % 2 else 1]:
                rows[version].append(_in_version(roots[version], step, arguments))
                print(f"{step} {number + 1}, {version}: {rows[version][-1]}", flush=True)
        if step == "memory":
            _say(step, rows, "more_mib", "MiB more than one model's service")
        else:
            _say(step, rows, "cold", "s")
            _say(step, rows, "repeated", "s")


if __name__ == "__main__":
    main()
