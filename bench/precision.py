"""What a backbone costs in fp32 and in int8 on each provider.

    python -m bench.precision [FOLDER] [--rounds N]

FOLDER holds JPEG photos in a folder per class; without one they are written. Times are of one core,
decoding left out: the processor time of an image, of all forms and providers in turn, round by
round. ResNet-18 has random weights here: its int8 is shown for its speed alone. Whether answers
agree `bench.serve` tells.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.photographs import given_or_written, photos
from bench.running import spread
from service.engine import preprocess, providers
from service.engine.preprocess import Pixels
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, Session
from service.ops import cpus
from trainer import backbones, export, quantise

BACKBONES = {"efficientnet_lite0": "", "resnet18": "random"}
BATCHES = (8, 1)
_TIMED = 24
"""Images of a form and provider in a round, about."""
Row = tuple[str, str, str]
"""Backbone, precision, provider."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    names = ["cpu", *([] if providers.openvino_problem() else ["openvino"])]
    info = cpus.describe()
    print(f"{info.model} ({' '.join(info.flags)}), one core; n = {arguments.rounds} rounds\n")
    sessions: dict[Row, Session] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for backbone, weights in BACKBONES.items():
            network = backbones.load(backbone, weights, 0, Path(temporary))
            files = {p: Path(temporary) / f"{backbone}.{p}.onnx" for p in ("fp32", "int8")}
            export.to_onnx(network, files["fp32"])
            began = time.process_time()
            quantise.to_int8(files["fp32"], files["int8"])
            print(f"{backbone} is quantised in {time.process_time() - began:.1f} s of a core")
            for precision, file in files.items():
                for name in names:
                    runtime = OnnxRuntime(Provider(name, ""), 1, is_narrow=True)  # type: ignore[arg-type]
                    sessions[backbone, precision, name] = runtime.load(file.read_bytes)
    with given_or_written(arguments.folder) as folder:
        pixels = np.stack([preprocess.decode(data) for data in photos(folder, _TIMED)])
    print()
    report(timed(sessions, pixels, arguments.rounds))


def timed(
    sessions: dict[Row, Session], pixels: Pixels, rounds: int
) -> dict[tuple[Row, int], list[float]]:
    """Measures milliseconds of processor time of an image, by row and batch, once a round."""
    found: dict[tuple[Row, int], list[float]] = {}
    for turn in range(rounds + 1):
        for row, session in sessions.items():
            for batch in BATCHES:
                began = time.process_time()
                for start in range(0, len(pixels), batch):
                    session.run(pixels[start : start + batch], cores=1)
                spent_ms = 1000 * (time.process_time() - began) / len(pixels)
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


if __name__ == "__main__":
    main()
