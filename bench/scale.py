"""Feature-based jobs from few images to many: seconds of each stage, and memory.

    python -m bench.scale [FOLDER] [--images 500 5000] [--classes 50] [--runs 3]

FOLDER holds photos in a folder per class, and is measured as it is first; without
one the photographs of scikit-learn stand in. The larger datasets are made of it:
each class is a place and a size in one photo, in colours of its own, each image a
seeded cut near that. Every job runs in a process of its own that has imported all it
needs, as the service's do: with an empty cache of features, then with a full one.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from bench.photographs import given_or_written
from service.contract import (
    BACKBONE_FILE,
    REFERENCE_FILE,
    ExportedBackbone,
    FeatureBased,
    ImageSource,
    JobSpec,
    Manifest,
)
from trainer import train, warm

_SIDE = (400, 300)


@dataclass(frozen=True)
class Outcome:
    """Of one job: seconds, and MB before it and at most."""

    manifest: Manifest
    seconds: float
    before_mb: float
    peak_mb: float


def write(photos: Sequence[Path], folder: Path, images: int, classes: int) -> Path:
    """Writes `images` JPEG files in a folder per class, the same ones every time."""
    for label in range(classes):
        rng = np.random.default_rng([label, classes])
        photo = Image.open(photos[label % len(photos)]).convert("RGB")
        zoom, x, y = rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8)
        channels = rng.permutation(3)
        (folder / f"class{label:03}").mkdir(parents=True)
        for number in range(images // classes):
            scale = zoom * rng.uniform(0.8, 1.2)
            width, height = photo.width * scale, photo.height * scale
            left = np.clip((x + rng.normal(0, 0.2)) * photo.width - width / 2, 0, 0.7 * photo.width)
            top = np.clip(
                (y + rng.normal(0, 0.2)) * photo.height - height / 2, 0, 0.7 * photo.height
            )
            box = (left, top, min(left + width, photo.width), min(top + height, photo.height))
            piece = photo.resize(_SIDE, Image.Resampling.BILINEAR, box=box)
            pixels = np.asarray(piece)[..., channels]
            noisy = pixels + rng.normal(0, 8, pixels.shape)
            shown = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            shown = ImageEnhance.Brightness(shown).enhance(rng.uniform(0.7, 1.3))
            shown.save(folder / f"class{label:03}" / f"{number:04}.jpg", quality=90)
    return folder


def job(spec: JobSpec) -> Outcome:
    """Runs one job in this process, which is to run no other."""
    warm.prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    manifest = train.run(spec, lambda _: None)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Outcome(manifest, seconds, before / 1024, peak / 1024)


def alone(spec: JobSpec) -> Outcome:
    """Runs one job in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(job, spec).result()


Known = dict[str, Any]
"""A backbone that was exported before, and its files, as a spec names them."""


def measure(title: str, folder: Path, work: Path, known: Known, runs: int) -> None:
    """Prints what jobs on the folder took, with an empty cache and with a full one."""
    outcomes: dict[str, list[Outcome]] = {"empty cache": [], "full cache": []}
    for run in range(runs):
        for number, name in enumerate(outcomes):
            out = work / f"{title} {run} {number}"
            cache = work / f"{title} {run}.sqlite"
            outcomes[name].append(alone(_spec(folder, out, str(cache), known)))
    for name, found in outcomes.items():
        seconds = [outcome.seconds for outcome in found]
        stages = {
            stage: statistics.median(o.manifest.stages_s.get(stage, 0.0) for o in found)
            for stage in found[0].manifest.stages_s
        }
        last = found[-1]
        print(
            f"{title}, {name}: median {statistics.median(seconds):.2f} s, range "
            f"{min(seconds):.2f} to {max(seconds):.2f} s, n = {len(seconds)}; "
            + ", ".join(f"{stage} {value:.2f}" for stage, value in stages.items())
            + f"; {last.peak_mb:.0f} MB at most ({last.before_mb:.0f} MB before), "
            f"{last.manifest.train_count} images, accuracy {_accuracy(last.manifest)}",
            flush=True,
        )


def _accuracy(manifest: Manifest) -> str:
    figure = manifest.headline
    return "not measured" if figure is None else f"{figure.accuracy:.4f} of {figure.count}"


def _spec(folder: Path, out: Path, cache: str, known: Known | None = None) -> JobSpec:
    return JobSpec(
        job_id="bench",
        model="bench",
        data=ImageSource(folder=str(folder.resolve())),
        out_dir=str(out),
        method=FeatureBased(),
        weights_dir=str(out / "weights"),
        feature_cache=cache,
        **(known or {}),
    )


def main() -> None:
    """Measures the folder, then each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=int, nargs="*", default=[500, 5000])
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with (
        given_or_written(arguments.folder) as folder,
        tempfile.TemporaryDirectory(prefix="graft-bench-") as temporary,
    ):
        work = Path(temporary)
        first = alone(_spec(folder, work / "first", ""))
        manifest = first.manifest
        reference = manifest.reference_digest
        print(f"first job of the backbone, with its export: {first.seconds:.2f} s", flush=True)
        exported = ExportedBackbone(manifest.weights, manifest.backbone_digest, reference=reference)
        known = {
            "exported": [exported],
            "files": {
                exported.digest: str(work / "first" / BACKBONE_FILE),
                reference: str(work / "first" / REFERENCE_FILE),
            },
        }
        measure(folder.name, folder, work, known, arguments.runs)
        photos = sorted(folder.rglob("*.jpg"))
        for images in arguments.images:
            made = write(photos, work / f"{images}", images, arguments.classes)
            title = f"{images} images in {arguments.classes} classes"
            measure(title, made, work, known, arguments.runs)


if __name__ == "__main__":
    main()
