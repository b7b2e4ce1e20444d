"""From a FineTune call to the first served answer, over gRPC, on a folder of images.

    python -m bench.fine_tune FOLDER [--runs 5] [--backbone NAME] [--weights NAME]
        [--method feature_based|model_based] [--recipe classic] [--beside-classic]

The folder is uploaded before; its time is told apart. Every run has a service of its own with an
empty data folder, which has done what it does after its start: a trainer waits, the default
backbone is exported. The first job of a run is cold: no feature is known. The second one is the
same again, with what the first one left. Of feature-based jobs two ratios are told, each within a
run: cold over the bare loop (`bench.one_pass`, right after the service has ended, as nice as its
trainers are), and the second job over the first. A job that compares framings passes some of its
training images through the backbone twice; the bare loop passes each image once.

With --beside-classic the classic recipe (every layer, 25 epochs, 32 bits) runs once afterwards on
the same images, and the ratio of the times is told. --flags go to the service, with "--" before
each (`--flags provider=cpu`). Prints every epoch of jobs that train.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil
from graftml import Client, EpochMetrics, FeatureBased, ModelBased, Note, Version

from bench.published import read
from bench.running import MEASURE_TIMEOUT_S, pss_mib, service, spread
from service.ops.cpus import describe

CALM_S = 1.0
WARM_TIMEOUT_S = 60.0


def job(
    client: Client, dataset: str, image: Path, arguments: argparse.Namespace, *, is_classic: bool
) -> tuple[float, Version]:
    """One job; seconds from the call to the answer, and the version."""
    is_trained = is_classic or arguments.method == "model_based"
    method: FeatureBased | ModelBased = FeatureBased()
    if is_trained:
        method = ModelBased(recipe="classic" if is_classic else arguments.recipe)
    started = time.monotonic()
    handle = client.fine_tune(
        dataset,
        name="bench",
        backbone=arguments.backbone,
        weights=arguments.weights,
        method=method,
    )
    for event in handle.events(timeout_s=7200):
        what, at = event.payload, time.monotonic() - started
        if isinstance(what, EpochMetrics) and is_trained:
            print(
                f"{at:7.1f} s  epoch {what.epoch}/{what.epochs}  train loss {what.train_loss:.4f} "
                f"acc {what.train_accuracy:.4f}  {what.images_per_second:.1f} images/s",
                flush=True,
            )
        elif isinstance(what, Note) and what.level == "warning":
            print(f"{at:7.1f} s  {what.text}", flush=True)
    version = handle.wait(timeout_s=60)
    client.predict(image, model="bench")
    return time.monotonic() - started, version


def wait_until_warm(pid: int) -> None:
    """Returns when the service's waiting trainer has used no processor for a second."""
    deadline = time.monotonic() + WARM_TIMEOUT_S
    before = -1.0
    while time.monotonic() < deadline:
        children = psutil.Process(pid).children(recursive=True)
        used = sum(c.cpu_times().user + c.cpu_times().system for c in children)
        if used == before and children:
            return
        before = used
        time.sleep(CALM_S)


def told(kind: str, seconds: Sequence[float], version: Version) -> str:
    """A line of figures."""
    return f"{kind:8} {spread(seconds, '.2f')} s, n = {len(seconds)}; {version.measured}"


def _run(
    arguments: argparse.Namespace,
    number: int,
    folder: Path,
    image: Path,
    taken: dict[str, list[float]],
    versions: dict[str, Version],
) -> None:
    """Measures the jobs of one service, which has ended afterwards."""
    flags = [f"--{flag}" for flag in arguments.flags]
    with service(folder, *flags) as running, Client(running.address) as client:
        started = time.monotonic()
        dataset = client.upload_dataset(arguments.folder).dataset_id
        upload_s = time.monotonic() - started
        kinds = ["cold", "warm"]
        if arguments.beside_classic and number == arguments.runs - 1:
            kinds.append("classic")
        for kind in kinds:
            wait_until_warm(running.pid)
            waiting, before_s = psutil.Process(running.pid).children(), _cpu_s(running.pid)
            waiting_mib = sum(pss_mib(child.pid) for child in waiting)
            seconds, versions[kind] = job(
                client, dataset, image, arguments, is_classic=kind == "classic"
            )
            cpu_s = _cpu_s(running.pid) - before_s
            taken[kind].append(seconds)
            taken[f"{kind}, processor"].append(cpu_s)
            stages = versions[kind].manifest.get("stages_s", {})
            where = ", ".join(f"{name} {s:.2f}" for name, s in stages.items())
            print(
                f"run {number + 1} {kind}: {seconds:.2f} s, {cpu_s:.2f} s of the processor "
                f"({where}); before it waited {len(waiting)} trainers, {waiting_mib:.0f} MiB",
                flush=True,
            )
        print(f"run {number + 1} upload: {upload_s:.2f} s", flush=True)


def _cpu_s(pid: int) -> float:
    """Returns processor seconds of a process and its children, ended ones too."""
    process = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:4]) for each in (process, *process.children(recursive=True)))


def _bare_s(data_dir: Path, photos: Path) -> tuple[float, float]:
    """Measures the bare loop on the backbone that the jobs had: seconds, and of the processor."""
    file = data_dir / "bare.onnx"
    file.write_bytes(read(data_dir, "bench")[1])
    done = subprocess.run(
        ["nice", "-n", "10", sys.executable, "-m", "bench.one_pass", str(file), str(photos)],
        capture_output=True,
        text=True,
        check=True,
        timeout=MEASURE_TIMEOUT_S,
    )
    seconds, cpu_s = map(float, done.stdout.split())
    return seconds, cpu_s


def main() -> None:
    """Prints each run, then median and range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backbone", default="")
    parser.add_argument("--weights", default="")
    parser.add_argument(
        "--method", choices=("feature_based", "model_based"), default="feature_based"
    )
    parser.add_argument("--recipe", choices=("auto", "classic"), default="auto")
    parser.add_argument("--beside-classic", action="store_true")
    parser.add_argument("--flags", nargs="*", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    image = next(
        p for p in sorted(arguments.folder.rglob("*")) if p.suffix in (".jpg", ".png", ".jpeg")
    )
    taken: dict[str, list[float]] = defaultdict(list)
    versions: dict[str, Version] = {}
    print(f"{describe()}")
    for number in range(arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            _run(arguments, number, Path(folder), image, taken, versions)
            if arguments.method == "feature_based":
                seconds, cpu_s = _bare_s(Path(folder), arguments.folder)
                taken["bare loop"].append(seconds)
                taken["bare loop, processor"].append(cpu_s)
                print(
                    f"run {number + 1} bare loop: {seconds:.2f} s, {cpu_s:.2f} s of the processor",
                    flush=True,
                )
    for kind, version in versions.items():
        print(told(kind, taken[kind], version))
    if "bare loop" in taken:
        pairs = [("cold", "bare loop"), ("warm", "cold")]
        for above, below in [*pairs, *((f"{a}, processor", f"{b}, processor") for a, b in pairs)]:
            ratios = [a / b for a, b in zip(taken[above], taken[below], strict=True)]
            print(f"{above} over {below}: {spread(ratios, '.2f')}, n = {len(ratios)}")
    if "classic" in taken:
        for kind in ("cold", "warm"):
            ratio = taken["classic"][0] / statistics.median(taken[kind])
            print(f"the classic recipe takes {ratio:.0f} times as long as {kind}")


if __name__ == "__main__":
    main()
