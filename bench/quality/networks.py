"""Networks that are trained: whether what they report is true, and what they are worth.

    python -m bench.quality.networks [FOLDER] [--sets NAME ...] [--per-class 30] [--draws 2]
                                     [--auto]

compares the frozen head with a tuned network, and with the average of both, on images that
neither learned from. Whole jobs, which take minutes each; FOLDER is as in `bench.quality`.
With --auto a job of the method `auto` with all the time it wants is beside them. Prints
Markdown. `ask` is for `make quality`.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from bench.quality import images as measured_on
from bench.quality import probabilities
from bench.quality.images import BACKBONE, ImageSet, LabelledFile
from bench.quality.probabilities import Asked
from service.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    Auto,
    FeatureBased,
    ImageSource,
    JobSpec,
    Manifest,
    Method,
    ModelBased,
)
from service.engine import head as heads
from service.engine import preprocess
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from trainer import train
from trainer.arrays import Doubles, Ints

_BATCH = 8
_MOST_ASKED = 300
_LEARNED_PART = 0.6
"""Of a class's images at most, so that some are left to ask for."""
_HOURS_S = 36_000.0


@dataclass(frozen=True)
class Served:
    """What a job made of images that it did not learn from."""

    logits: Doubles
    """Divided by the temperature, float64 [n, classes]."""
    classes: tuple[str, ...]
    manifest: Manifest
    seconds: float
    processor_s: float


def ask(
    images: ImageSet, files: Sequence[LabelledFile], keep: Path, epochs: int | None = None
) -> Asked:
    """Trains a network on a third of the set's images, and asks it for the others.

    `files` are the set's, in the same order. `epochs` None means as many as the recipe says.
    """
    order, block = probabilities.blocks(images, 0)
    learned, asked = order[block == 0], order[block != 0]
    served = run(files, learned, asked, keep, ModelBased(epochs=epochs))
    p = np.exp(log_softmax(served.logits, axis=1))
    answered = np.array([images.classes.index(served.classes[k]) for k in p.argmax(axis=1)])
    right = (answered == images.targets[asked]).astype(np.float64)
    return Asked(images.name, None, p.max(axis=1), right, served.manifest.calibrated)


def run(
    files: Sequence[LabelledFile],
    learned: Ints,
    asked: Ints,
    keep: Path,
    method: Method,
    threads: int = 0,
) -> Served:
    """Runs a job on the files at `learned`, and asks what it made for those at `asked`."""
    with tempfile.TemporaryDirectory(prefix="graft-quality-") as temporary:
        folder = Path(temporary).resolve()
        for place in learned:
            path = folder / "data" / files[place].label / f"{place:06}.{_suffix(files[place])}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[place].read())
        (folder / "out").mkdir()
        spec = JobSpec(
            job_id="quality",
            model="quality",
            data=ImageSource(folder=str(folder / "data")),
            out_dir=str(folder / "out"),
            method=method,
            backbone=BACKBONE,
            weights_dir=str(keep.resolve()),
            provider="cpu",
            threads=threads,
            asked_budget_s=_HOURS_S,
            # Nothing is held out: what is asked for tells.
            validation_fraction=0.0,
        )
        began, used = time.monotonic(), time.process_time()
        manifest = train.run(spec, lambda _: None)
        took, used = time.monotonic() - began, time.process_time() - used
        runtime = OnnxRuntime(Provider("cpu", "the same everywhere"), 1)
        session = runtime.load((folder / "out" / BACKBONE_FILE).read_bytes)
        head = heads.load((folder / "out" / HEAD_FILE).read_bytes())
        rows = []
        for start in range(0, len(asked), _BATCH):
            some = [files[place].read() for place in asked[start : start + _BATCH]]
            pixels = np.stack([preprocess.decode(data, manifest.decoding) for data in some])
            rows.append(head.logits(session.run(pixels)) / head.temperature)
        return Served(np.concatenate(rows).astype(float), head.classes, manifest, took, used)


def _suffix(file: LabelledFile) -> str:
    return "png" if file.read()[:4] == b"\x89PNG" else "jpg"


def draw(files: Sequence[LabelledFile], per_class: int, seed: int) -> tuple[Ints, Ints]:
    """Draws the places of images to learn from, and of at most 300 others to ask for."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(files))
    labels = np.array([files[place].label for place in order])
    learned: list[int] = []
    for label in np.unique(labels):
        own = order[labels == label]
        learned += own[: min(per_class, int(len(own) * _LEARNED_PART))].tolist()
    return np.sort(learned), order[~np.isin(order, learned)][:_MOST_ASKED]


def compare(
    name: str, files: Sequence[LabelledFile], per_class: int, seed: int, keep: Path, is_auto: bool
) -> str:
    """Compares the methods on one draw; returns a row of the table."""
    learned, asked = draw(files, per_class, seed)
    # On one core: those that wait for each other would be counted as working.
    frozen = run(files, learned, asked, keep, FeatureBased(), 1)
    tuned = run(files, learned, asked, keep, ModelBased(), 1)
    true = np.array([frozen.classes.index(files[place].label) for place in asked])
    logits = {
        "frozen": frozen.logits,
        "tuned": tuned.logits,
        "average": (log_softmax(frozen.logits, axis=1) + tuned.logits) / 2,
    }
    took = f"{tuned.processor_s / len(learned):.2f} s"
    decided = ""
    if is_auto:
        auto = run(files, learned, asked, keep, Auto(), 1)
        logits["auto"] = auto.logits
        decided = f" ({auto.manifest.method}, {auto.seconds:.0f} s)"
    cells = []
    for given in logits.values():
        loss = -log_softmax(given, axis=1)[np.arange(len(true)), true].mean()
        cells.append(f"{(given.argmax(axis=1) == true).mean():.3f} / {loss:.3f}")
    counts = f"{len(learned)}, {len(asked)}"
    return f"| {name}, {seed} | {counts} | {' | '.join(cells)}{decided} | {took} |"


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of data sets")
    parser.add_argument("--sets", nargs="+", help="some of them")
    parser.add_argument("--per-class", type=int, default=30)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--auto", action="store_true", help="a job of the method auto too")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    found = measured_on.find(arguments.folder or measured_on.data_root())
    columns = ["frozen", "tuned", "average", *(["auto"] if arguments.auto else [])]
    print("Accuracy / log loss on images that nothing was learned from, nats.\n")
    print(f"| set, draw | learned, asked | {' | '.join(columns)} | processor time an image |")
    print("|---" * (len(columns) + 3) + "|")
    for name in arguments.sets or found:
        for seed in range(arguments.draws):
            print(compare(name, found[name], arguments.per_class, seed, arguments.keep,
                          arguments.auto), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
