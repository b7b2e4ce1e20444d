"""What a thousand models on one backbone cost, beside one.

    python -m bench.many_models [FOLDER] [--models 1000] [--seconds 8] [--callers 16]

Fine-tunes one model on FOLDER (photos in a folder per class), publishes copies
of its head under other names straight into the data folder while the service is
down, then serves: memory, throughput with calls spread over all models against
throughput on one (interleaved), and the first answer of cold heads against warm
ones.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from graftml import Client

from bench.photographs import given_or_written
from bench.published import publish_copies
from bench.running import Running, measured, pss_mib, service, spread
from service.ops.cpus import describe

ROUNDS = 3


def load(running: Running, folder: Path, arguments: argparse.Namespace, models: str) -> float:
    """Images a second with calls spread over the models."""
    figures = measured(
        "load", running.address, folder, "--pid", running.pid, "--callers", arguments.callers,
        "--seconds", arguments.seconds, "--models", models,
    )  # fmt: skip
    assert figures["errors"] == 0
    return float(figures["per_second"])


def first_answers_ms(client: Client, image: Path, names: list[str]) -> list[float]:
    """Milliseconds of one call to each model."""
    times = []
    for name in names:
        started = time.perf_counter()
        client.predict(image, model=name)
        times.append((time.perf_counter() - started) * 1000)
    return times


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    arguments = parser.parse_args()
    names = [f"m{number}" for number in range(arguments.models)]
    with given_or_written(arguments.folder) as folder, tempfile.TemporaryDirectory() as temporary:
        image = next(folder.rglob("*.jpg"))
        data_dir = Path(temporary)
        with service(data_dir) as running, Client(running.address) as client:
            job = client.fine_tune(folder, name="bench", backbone=arguments.backbone)
            job.wait(timeout_s=600)
        publish_copies(data_dir, "bench", names)
        with service(data_dir) as running, Client(running.address) as client:
            # Warm on one model as on many: arenas grow with the load, not with the models.
            load(running, folder, arguments, "bench")
            first_answers_ms(client, image, ["bench"] * 100)
            one_mib = pss_mib(running.pid)
            cold = first_answers_ms(client, image, names)
            all_mib = pss_mib(running.pid)
            warm = first_answers_ms(client, image, names[:100])
            alone, over_all = [], []
            for _ in range(ROUNDS):
                alone.append(load(running, folder, arguments, "m0"))
                over_all.append(load(running, folder, arguments, ",".join(names)))
            end_mib = pss_mib(running.pid)
    ratios = [many / single for many, single in zip(over_all, alone, strict=True)]
    p99 = statistics.quantiles(cold, n=100)[98]
    print(
        f"{describe()}, {arguments.backbone}, "
        f"{arguments.models} models, {arguments.callers} callers"
    )
    print(
        f"memory (PSS): {one_mib:.0f} MiB with one model loaded, {all_mib:.0f} MiB with all, "
        f"{end_mib:.0f} MiB after the load"
    )
    print(
        f"first answer: cold head {statistics.median(cold):.1f} ms (p99 {p99:.1f}), warm "
        f"{statistics.median(warm):.1f} ms"
    )
    print(
        f"throughput spread over all, of one model's: {spread(ratios, '.3f')}, n = {ROUNDS} rounds "
        f"of {arguments.seconds:g} s: {spread(over_all)} against {spread(alone)} images/s"
    )


if __name__ == "__main__":
    main()
