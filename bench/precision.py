"""What a backbone costs in fp32 and in int8 on each provider, and whether int8 answers agree.

    python -m bench.precision FOLDER [--rounds N] [--images N]

FOLDER holds a folder of images for each class; heads are fitted to some of them. Times are of one
core, decoding left out: the processor time of an image, of all forms and providers in turn, round
by round. ResNet-18 has random weights here: its int8 is shown for its speed alone.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.quality.images import find
from bench.running import spread
from service.domain import ImageDecoding
from service.engine import preprocess, providers
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, Session
from service.ops import cpus
from trainer import backbones, export, folds, quantise
from trainer.arrays import Ints
from trainer.methods import feature_based

BACKBONES = {"efficientnet_lite0": "", "resnet18": "random"}
BATCHES = (8, 1)
_TIMED = 24
"""Images of a form and provider in a round, about."""
Row = tuple[str, str, str]
"""Backbone, precision, provider."""


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160, help="that heads are fitted to, half")
    arguments = parser.parse_args()
    names = ["cpu", *(["openvino"] if providers.has_openvino() else [])]
    info = cpus.describe()
    print(f"{info.model} ({' '.join(info.flags)}), one core; n = {arguments.rounds} rounds\n")
    sessions: dict[Row, Session] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backbone, weights in BACKBONES.items():
            network = backbones.load(backbone, weights, 0, Path(folder))
            files = {p: Path(folder) / f"{backbone}.{p}.onnx" for p in ("fp32", "int8")}
            export.to_onnx(network, files["fp32"])
            began = time.process_time()
            quantise.to_int8(files["fp32"], files["int8"])
            print(f"{backbone} is quantised in {time.process_time() - began:.1f} s of a core")
            for precision, file in files.items():
                for name in names:
                    runtime = OnnxRuntime(Provider(name, ""), 1, is_narrow=True)  # type: ignore[arg-type]
                    sessions[backbone, precision, name] = runtime.load(file.read_bytes)
    pixels, targets = read(arguments.folder, arguments.images)
    print()
    report(timed(sessions, pixels, arguments.rounds))
    agreement(sessions, pixels, targets)


def read(folder: Path, count: int) -> tuple[Pixels, Ints]:
    """Reads some images of the first set below a folder, in turn from its classes."""
    files = next(iter(find(folder).values()))
    rng = np.random.default_rng(0)
    chosen = [files[place] for place in rng.permutation(len(files))[:count]]
    labels = sorted({file.label for file in chosen})
    pixels = np.stack([preprocess.decode(file.read(), ImageDecoding()) for file in chosen])
    return pixels, np.array([labels.index(file.label) for file in chosen], np.int64)


def timed(
    sessions: dict[Row, Session], pixels: Pixels, rounds: int
) -> dict[tuple[Row, int], list[float]]:
    """Measures milliseconds of processor time of an image, by row and batch, once a round."""
    found: dict[tuple[Row, int], list[float]] = {}
    for turn in range(rounds + 1):
        for row, session in sessions.items():
            for batch in BATCHES:
                began = time.process_time()
                for start in range(0, _TIMED, batch):
                    session.run(pixels[start : start + batch], cores=1)
                spent_ms = 1000 * (time.process_time() - began) / _TIMED
                if turn:  # the first warms up
                    found.setdefault((row, batch), []).append(spent_ms)
    return found


def report(times: dict[tuple[Row, int], list[float]]) -> None:
    """Prints medians, least and largest, and the ratio to fp32 on the CPU provider, by round."""
    print("| backbone | precision | provider | " + " | ".join(
        f"batch {batch}: ms an image | of fp32 on cpu" for batch in BATCHES
    ) + " |")  # fmt: skip
    print("| --- " * (3 + 2 * len(BATCHES)) + "|")
    for row in dict.fromkeys(row for row, _ in times):
        cells = [*row]
        for batch in BATCHES:
            own, base = times[row, batch], times[(row[0], "fp32", "cpu"), batch]
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            cells += [spread(own), spread(ratios, ".2f")]
        print("| " + " | ".join(cells) + " |")
    print()


def agreement(sessions: dict[Row, Session], pixels: Pixels, targets: Ints) -> None:
    """Prints by how much probabilities differ between providers, of a head on one's features."""
    if not any(provider == "openvino" for _, _, provider in sessions):
        print("OpenVINO is not installed here: there is nothing to compare with")
        return
    learned = np.arange(len(targets)) % 2 == 0
    for backbone in BACKBONES:
        for precision in ("fp32", "int8"):
            cpu, openvino = (
                _features(sessions[backbone, precision, name], pixels)
                for name in ("cpu", "openvino")
            )
            own = targets[learned]
            dealt = folds.deal(own, np.arange(len(own)), np.random.default_rng(0).random(len(own)))
            classes = tuple(f"class {k}" for k in range(int(targets.max()) + 1))
            width = _WIDTHS[backbone]
            head = feature_based.linear_probe(cpu[learned, :width], own, dealt, classes, 0, 1)
            a, b = (head.probabilities(rows[~learned, :width]) for rows in (cpu, openvino))
            same = (a.argmax(axis=1) == b.argmax(axis=1)).mean()
            print(
                f"{backbone} in {precision}, OpenVINO against the CPU provider: features differ "
                f"by up to {np.abs(cpu - openvino).max():.2g} (largest {np.abs(cpu).max():.2g}), "
                f"probabilities by up to {np.abs(a - b).max():.2g}, {same:.1%} of the answers are "
                f"the same, n = {len(a)} images"
            )


_WIDTHS = {"efficientnet_lite0": 1280, "resnet18": 512}
"""Features of the last layer."""


def _features(session: Session, pixels: Pixels) -> Floats:
    return np.concatenate(
        [session.run(pixels[start : start + 8], cores=1) for start in range(0, len(pixels), 8)]
    )


if __name__ == "__main__":
    main()
