"""The bare loop of a feature-based job: every photo of a folder decoded and run once, no more.

    python -m bench.one_pass BACKBONE.onnx FOLDER [--threads 2]

Each thread takes photos eight at a time, and runs them on one core by ONNX Runtime's CPU provider.
Prints the seconds of one pass, of time and of the processor, without the load.
"""

import argparse
from pathlib import Path

import numpy as np

from bench.photographs import photos
from bench.running import at_once
from bench.serve.plain_server import session
from service.engine.preprocess import decode

_BATCH = 8


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    images = photos(arguments.folder, most=100_000)
    own = session(arguments.model, 1)
    name = own.get_inputs()[0].name

    def run(start: int) -> None:
        batch = images[start : start + _BATCH]
        own.run(None, {name: np.stack([decode(data) for data in batch])})

    run(0)  # which warms up
    starts = iter(range(0, len(images), _BATCH))

    def work() -> None:
        for start in starts:
            run(start)

    _, seconds, cpu_s = at_once([work] * arguments.threads)
    print(seconds, cpu_s)


if __name__ == "__main__":
    main()
