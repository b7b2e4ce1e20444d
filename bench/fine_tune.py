"""From a FineTune call to the first served answer, over gRPC, on a folder of pictures.

    python -m bench.fine_tune FOLDER [--runs 3] [--backbone NAME] [--weights NAME]
        [--method feature_based|model_based] [--recipe classic] [--cold]

The service runs on this machine with an empty data folder; the client uploads
the folder. The first run is cold (the backbone is exported); with --cold every
run gets a data folder of its own. Prints every epoch of model-based runs.
"""

import argparse
import contextlib
import platform
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from graft import Client, EpochMetrics, FeatureBased, ModelBased, Note, Version

from bench.running import service


def run(client: Client, arguments: argparse.Namespace) -> tuple[float, Version]:
    """One job; seconds from the call to the answer, and the version."""
    method = (
        ModelBased(recipe=arguments.recipe) if arguments.method == "model_based" else FeatureBased()
    )
    picture = next(p for p in sorted(arguments.folder.rglob("*")) if p.suffix in (".jpg", ".png"))
    started = time.monotonic()
    job = client.fine_tune(
        arguments.folder,
        name="bench",
        backbone=arguments.backbone,
        weights=arguments.weights,
        method=method,
    )
    for event in job.events():
        what, at = event.payload, time.monotonic() - started
        if isinstance(what, EpochMetrics):
            print(
                f"{at:7.1f} s  epoch {what.epoch}/{what.epochs}  train loss {what.train_loss:.4f} "
                f"acc {what.train_accuracy:.4f}  val loss {what.validation_loss:.4f} "
                f"acc {what.validation_accuracy:.4f}  {what.images_per_second:.1f} pictures/s",
                flush=True,
            )
        elif isinstance(what, Note):
            print(f"{at:7.1f} s  {what.text}", flush=True)
    version = job.wait(timeout_s=60)
    client.predict(picture, model="bench")
    return time.monotonic() - started, version


def main() -> None:
    """Prints each run, then median and range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--backbone", default="auto")
    parser.add_argument("--weights", default="")
    parser.add_argument(
        "--method", choices=("feature_based", "model_based"), default="feature_based"
    )
    parser.add_argument("--recipe", choices=("auto", "classic"), default="auto")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    times = []
    print(f"{platform.machine()}, {psutil.cpu_count()} cores")
    with contextlib.ExitStack() as stack:
        client = None
        for number in range(arguments.runs):
            if client is None or arguments.cold:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                address = stack.enter_context(service(folder)).address
                client = stack.enter_context(Client(address))
                client.wait_ready(30)
            seconds, version = run(client, arguments)
            times.append(seconds)
            parity = version.parity
            print(
                f"run {number + 1}: {seconds:.1f} s to the first answer, accuracy "
                f"{version.validation_accuracy:.4f} on {version.validation_count} pictures, parity "
                f"{parity.max_difference:.1e}, top-1 agreement {parity.top1_agreement:.3f}",
                flush=True,
            )
    print(
        f"median {statistics.median(times):.1f} s, range {min(times):.1f} to {max(times):.1f} s, "
        f"n = {len(times)}"
    )


if __name__ == "__main__":
    main()
