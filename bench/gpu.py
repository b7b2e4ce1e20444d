"""Whether a GPU computes what the CPU does, and how fast it serves and trains beside bare loops.

    python -m bench.gpu [FOLDER] [--device cuda|cpu] [--backbone efficientnet_lite0]
        [--weights W] [--batch 128] [--rounds 3] [--seconds 3] [--epochs 2] [--photos 1000]

FOLDER holds JPEG photos in a folder per class; without one they are written. `--device cpu` is
a dry run of all of it on the CPU, whose figures say nothing of a GPU.

Correctness first: features of the same pixels by ONNX Runtime and by PyTorch on the device, in
fp32 (without TF32), give the CPU's probabilities to 1e-3 under a head that is drawn at random; of
fp16 the part of the best classes that agree is reported. A process that is shown no GPU sees
none, and one that is shown it after its imports, as a warm trainer, sees it. Then, in each round:
the bare loop of ONNX Runtime on batches that lie on the device, our runs from one thread and from
many, features of photos with their decoding, our training through all layers, the bare loop of
PyTorch's training steps and, of a ResNet, torchvision's usual one (batch 4, a DataLoader with a
worker a core). At the end a server, with 64 callers. Ends with 1 if a check fails,
and with 2 where there is no GPU.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from bench import model_based
from bench.photographs import write
from bench.running import at_once, fine_tune, measured, service, spread
from service.backbones import DEFAULT_BACKBONE
from service.contract import ImageSource, JobSpec, ModelBased
from service.engine import providers, timing
from service.engine.gpu import LARGEST_RUN, GpuGraph, GpuLimits
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import Provider, ProviderUnavailable, choose_provider
from service.engine.runtime import Graph, OnnxRuntime, _half, compiled, marked
from service.jobs.launchers import VISIBLE
from service.ops.cpus import available_cores
from trainer import backbones, compute, data, export
from trainer.backbone_file import BackboneFile
from trainer.backbones import Backbone
from trainer.features import Features

BOUND = 1e-3
"""Largest difference of a probability in fp32, on which providers of one precision must agree."""
COMPARED = 256
CALLERS = 64
_CPU_BATCH = 32
_SMALL_RUN = 8
"""Images that each of many threads brings, as workers do."""
_SEES = """
import os, sys
import torch, onnxruntime
from service.engine import providers
if len(sys.argv) > 1:
    os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[1]
print(providers._cuda_device_count(), torch.cuda.device_count())
"""

Rates = defaultdict[str, list[float]]
"""Images a second in each round, by what was measured."""


@dataclass(frozen=True)
class Check:
    """One thing that must be so; `is_right` is None of what is reported alone."""

    what: str
    found: str
    is_right: bool | None


def differences(what: str, found: Floats, expected: Floats, bound: float | None) -> Check:
    """Compares features [n, d] by what a head makes of them; within `bound`, or reported alone."""
    own, wanted = timing.probabilities(found), timing.probabilities(expected)
    largest = float(np.abs(own - wanted).max())
    agree = float((own.argmax(axis=1) == wanted.argmax(axis=1)).mean())
    # No number is within no bound.
    is_right = None if bound is None else bool(largest <= bound)
    text = f"probabilities differ by {largest:.2g} at most, {agree:.2%} of {len(own)} answers agree"
    return Check(what, text, is_right)


def sees(what: str, initial: str, later: Sequence[str], expected: int) -> Check:
    """Counts the GPUs that a process sees that starts with `initial` and is told `later`."""
    done = subprocess.run(
        [sys.executable, "-c", _SEES, *later],
        env={**os.environ, VISIBLE: initial},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    counts = done.stdout.split()
    found = f"ONNX Runtime's driver and PyTorch see {' and '.join(counts)} GPUs"
    if done.returncode:
        found = f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}"
    return Check(what, found, counts == [str(expected)] * 2)


def graph(model: bytes, device: str) -> Graph:
    """Makes the graph that a GPU would serve a file by; on the CPU provider in a dry run."""
    if device == "cuda":
        return compiled(model, 1, "cuda", available_cores())
    if model.endswith(marked(b"", "fp16")):
        model = _half(model)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return GpuGraph(session, GpuLimits())


def in_batches(run: Callable[[Pixels], Floats], pixels: Pixels, size: int) -> Floats:
    """Runs images [n, ...] some at a time; features float32 [n, d]."""
    return np.concatenate([run(pixels[n : n + size]) for n in range(0, len(pixels), size)])


def correctness(model: bytes, network: Backbone, pixels: Pixels, device: str) -> list[Check]:
    """Compares a backbone's file, in fp32 and fp16, and its network with the CPU's fp32."""
    cpu = OnnxRuntime(Provider("cpu", "")).load(lambda: model)
    expected = in_batches(cpu.run, pixels, _CPU_BATCH)
    last = expected[:, : network.feature_dim]  # a file gives those of middle layers, too
    with_torch = compute.choose_device(device)
    moved = copy.deepcopy(network).to(with_torch).eval()

    def by_torch(images: Pixels) -> Floats:
        with torch.inference_mode():
            features: Floats = moved(torch.from_numpy(images).to(with_torch)).cpu().numpy()
        return features

    def by_graph(of: bytes) -> Floats:
        return in_batches(graph(of, device).run, pixels, _CPU_BATCH)

    return [
        differences("ONNX Runtime, fp32", by_graph(model), expected, BOUND),
        differences("PyTorch, fp32", in_batches(by_torch, pixels, _CPU_BATCH), last, BOUND),
        differences("ONNX Runtime, fp16", by_graph(marked(model, "fp16")), expected, None),
    ]


def rate(run: Callable[[], int], seconds: float, threads: int = 1) -> float:
    """Measures images a second of runs that return their count, from some threads at once."""
    run()
    until = time.perf_counter() + seconds

    def work() -> int:
        count = run()
        while time.perf_counter() < until:
            count += run()
        return count

    # Runs that were under way are counted, and so is their time.
    counts, elapsed, _ = at_once([work] * threads)
    return sum(counts) / elapsed


def bare_runs(model: bytes, device: str, batch: int, size: int) -> Callable[[], int]:
    """Makes the ceiling: runs on images that lie on the device, whose features stay there."""
    name = "cuda" if device == "cuda" else "cpu"
    wanted = providers.gpu_providers("cuda") if device == "cuda" else ["CPUExecutionProvider"]
    if model.endswith(marked(b"", "fp16")):
        model = _half(model)
    session = ort.InferenceSession(model, providers=wanted)
    binding = session.io_binding()
    images = ort.OrtValue.ortvalue_from_numpy(timing.images(batch, size), name, 0)
    binding.bind_ortvalue_input(session.get_inputs()[0].name, images)
    binding.bind_output(session.get_outputs()[0].name, name)

    def run() -> int:
        session.run_with_iobinding(binding)
        return batch

    return run


def our_runs(made: Graph, batch: int, size: int) -> Callable[[], int]:
    """Makes runs as the service and its trainers do them."""
    images = timing.images(batch, size)
    return lambda: len(made.run(images))


def feature_rate(file: Path, provider: Provider, found: data.Data) -> float:
    """Measures photos a second of a job: read, decoded and run."""
    features = Features(BackboneFile(file, OnnxRuntime(provider, is_narrow=True)))
    _ = features.session
    began = time.perf_counter()
    features.of(found.train)
    return len(found.train) / (time.perf_counter() - began)


def one_round(
    rates: Rates,
    model: bytes,
    file: Path,
    network: Backbone,
    found: data.Data,
    folder: Path,
    arguments: argparse.Namespace,
) -> None:
    """Measures everything but the server once."""
    device, seconds, size = arguments.device, arguments.seconds, network.size
    large = arguments.batch
    for precision, of in (("fp32", model), ("fp16", marked(model, "fp16"))):
        made = graph(of, device)
        for batch in (1, large):
            bare = bare_runs(of, device, batch, size)
            name = "1" if batch == 1 else "many"
            rates[f"bare runs of {name}, {precision}"].append(rate(bare, seconds))
        alone = our_runs(made, large, size)
        rates[f"one thread, runs of many, {precision}"].append(rate(alone, seconds))
        small = our_runs(made, _SMALL_RUN, size)
        many = f"{available_cores()} threads, runs of {_SMALL_RUN}, {precision}"
        rates[many].append(rate(small, seconds, available_cores()))
    provider = Provider("cuda" if device == "cuda" else "cpu", "")
    rates["features of photos"].append(feature_rate(file, provider, found))
    with tempfile.TemporaryDirectory() as out:
        recipe = ModelBased(epochs=arguments.epochs, train_from_stage=network.stage_names[0])
        spec = JobSpec(
            job_id="bench", model="bench", data=ImageSource(folder=str(folder)), out_dir=out,
            method=recipe, weights_dir=out, device=device,
        )  # fmt: skip
        trained, used, precision = model_based.trained(spec, recipe, found, copy.deepcopy(network))
    batch = int(used["batch_size"] or 0)
    rates["training"].append(trained)
    bare_steps = model_based.bare(
        copy.deepcopy(network), len(found.classes), precision, batch,
        max(1, len(found.train) // batch), device,
    )  # fmt: skip
    rates["bare training steps"].append(bare_steps)
    if arguments.backbone.startswith("resnet"):
        usual = model_based.plain(
            folder, len(found.classes), arguments.backbone, arguments.epochs, device
        )
        rates["torchvision's usual training"].append(usual)
    print(f"trained in {precision}, batches of {batch}", flush=True)


def served(folder: Path, arguments: argparse.Namespace) -> float:
    """Measures images a second of a server with many callers, none of whose images is kept."""
    with tempfile.TemporaryDirectory() as temporary:
        flags = (f"--provider={arguments.device}",)
        with service(Path(temporary), *flags) as running:
            fine_tune(running, folder, arguments.backbone)
            line = measured(
                "load", running.address, folder, "--pid", running.pid, "--callers", CALLERS,
                "--seconds", arguments.seconds,
            )  # fmt: skip
    return float(line["per_second"])


BESIDE = (
    ("one thread, runs of many, fp32", "bare runs of many, fp32"),
    ("one thread, runs of many, fp16", "bare runs of many, fp16"),
    ("training", "bare training steps"),
    ("torchvision's usual training", "training"),
)
"""What is measured, and the loop that it is held against: mostly a bare one."""


def table(rates: Rates) -> list[str]:
    """Lists rates, and their ratios within each round to the loop beside them."""
    lines = ["| What | images/s | of the loop beside it |", "| --- | --- | --- |"]
    beside = dict(BESIDE)
    for what, values in rates.items():
        ratio = ""
        if what in beside:
            pairs = zip(values, rates[beside[what]], strict=True)
            ratio = spread([own / bare for own, bare in pairs], ".2f")
        lines.append(f"| {what} | {spread(values)} | {ratio} |")
    return lines


def unavailable(device: str) -> str:
    """Explains why nothing can be measured on a device; "" where it can."""
    if device == "cpu":
        return ""
    if not providers.visible_gpus(os.environ):
        return "this machine shows no NVIDIA GPU to this process, or has no driver for one"
    try:
        choose_provider("cuda")
    except ProviderUnavailable as error:
        return str(error)
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU that it can use"
    return ""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--weights", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=LARGEST_RUN, help="images of a large run")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of training; the fastest counts")
    parser.add_argument("--photos", type=int, default=1000, help="of those that are written")
    return parser.parse_args(arguments)


def main(given: Sequence[str] | None = None) -> int:
    """Checks, measures and prints a table; returns the exit code."""
    arguments = parsed(given)
    device = arguments.device
    if problem := unavailable(device):
        print(f"nothing was measured: {problem} (--device cpu is a dry run)", file=sys.stderr)
        return 2
    named = torch.cuda.get_device_name() if device == "cuda" else "a dry run on the CPU"
    print(f"{named}; {available_cores()} cores, PyTorch {torch.__version__}, "
          f"ONNX Runtime {ort.__version__}, {arguments.backbone}", flush=True)  # fmt: skip
    rates: Rates = defaultdict(list)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or write(Path(temporary) / "photos", arguments.photos // 2)
        folder = folder.resolve()
        network = backbones.load(
            arguments.backbone, arguments.weights, 0, Path(temporary) / "weights"
        )
        file = Path(temporary) / "backbone.onnx"
        export.to_onnx(network, file)
        model = file.read_bytes()
        found = data.load(folder)
        pixels = found.train.at(range(min(COMPARED, len(found.train)))).decode()
        is_gpu = device == "cuda"
        first = providers.visible_gpus(os.environ)[0] if is_gpu else "0"
        checks = [
            *correctness(model, network, pixels, device),
            sees("a job on the CPU", "", [], 0),
            sees("a trainer that waited", "", [first], int(is_gpu)),
        ]
        for check in checks:
            sign = {True: "right", False: "WRONG", None: "reported"}[check.is_right]
            print(f"{sign}: {check.what}: {check.found}", flush=True)
        for _ in range(arguments.rounds):
            one_round(rates, model, file, network, found, folder, arguments)
        rates[f"served, {CALLERS} callers"].append(served(folder, arguments))
    print(f"\n{named}, {arguments.rounds} rounds, runs of {arguments.batch} images\n")
    print("\n".join(table(rates)))
    return int(any(check.is_right is False for check in checks))


if __name__ == "__main__":
    sys.exit(main())
