"""From a FineTune call to the first served answer, over gRPC, on a folder of images.

    python -m bench.fine_tune FOLDER [--runs 5] [--backbone NAME] [--weights NAME]
        [--method feature_based|model_based] [--recipe classic] [--beside-classic]

The folder is uploaded before; its time is told apart. Every run has a service of its
own with an empty data folder, whose waiting trainer is warm. The first job of a run
is cold: the backbone is exported for it, no feature is known. The second one is the
same again, with what the first one left. With --beside-classic the classic recipe
(every layer, 25 epochs, 32 bits) runs once afterwards on the same images, and the
ratio of the times is told. Prints every epoch of jobs that train.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil
from graft import Client, EpochMetrics, FeatureBased, ModelBased, Note, Version

from bench.running import service
from service.ops.cpus import describe

CALM_S = 1.0
WARM_TIMEOUT_S = 60.0


def job(
    client: Client, dataset: str, image: Path, arguments: argparse.Namespace, recipe: str = ""
) -> tuple[float, Version]:
    """One job; seconds from the call to the answer, and the version."""
    is_trained = recipe or arguments.method == "model_based"
    method = ModelBased(recipe=recipe or arguments.recipe) if is_trained else FeatureBased()
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
    return (
        f"{kind:8} median {statistics.median(seconds):6.2f} s, range {min(seconds):.2f} to "
        f"{max(seconds):.2f}, n = {len(seconds)}; {version.measured}"
    )


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
    arguments = parser.parse_args()
    image = next(
        p for p in sorted(arguments.folder.rglob("*")) if p.suffix in (".jpg", ".png", ".jpeg")
    )
    taken: dict[str, list[float]] = defaultdict(list)
    versions: dict[str, Version] = {}
    print(f"{describe()}")
    for number in range(arguments.runs):
        with (
            tempfile.TemporaryDirectory() as folder,
            service(Path(folder)) as running,
            Client(running.address) as client,
        ):
            client.wait_ready(30)
            started = time.monotonic()
            dataset = client.upload_dataset(arguments.folder).dataset_id
            upload_s = time.monotonic() - started
            for kind in ("cold", "warm"):
                wait_until_warm(running.pid)
                seconds, versions[kind] = job(client, dataset, image, arguments)
                taken[kind].append(seconds)
                stages = versions[kind].manifest.get("stages_s", {})
                where = ", ".join(f"{name} {s:.2f}" for name, s in stages.items())
                print(f"run {number + 1} {kind}: {seconds:.2f} s ({where})", flush=True)
            print(f"run {number + 1} upload: {upload_s:.2f} s", flush=True)
            if arguments.beside_classic and number == arguments.runs - 1:
                wait_until_warm(running.pid)
                seconds, versions["classic"] = job(client, dataset, image, arguments, "classic")
                taken["classic"].append(seconds)
    for kind, seconds in taken.items():
        print(told(kind, seconds, versions[kind]))
    if "classic" in taken:
        for kind in ("cold", "warm"):
            ratio = taken["classic"][0] / statistics.median(taken[kind])
            print(f"the classic recipe takes {ratio:.0f} times as long as {kind}")


if __name__ == "__main__":
    main()
