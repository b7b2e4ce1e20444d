"""Training that is killed and goes on: does it end with the unbroken run's figures?

    python -m bench.resume FOLDER [--kills 3] [--epochs 6] [--backbone resnet18]
        [--weights random] [--seed 0] [--threads 0]

FOLDER holds images in a folder per class, or `train/` and `val/`. Runs one job
unbroken, then the same one again in attempts that are killed (SIGKILL) at random
moments of its training, drawn anew for each, until an attempt ends by itself.
Batch size and precision are given, since a probe may choose otherwise in another
run. Prints both runs' epochs and figures, what the kills cost, and whether the
models are the same bytes. Exits with 1 when a figure differs.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec

from service.contract import (
    BACKBONE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    EpochEnded,
    ImageSource,
    JobSpec,
    ModelBased,
    Note,
    Record,
    decode_record,
)
from service.domain import Manifest

BATCH_SIZE = 16


def attempt(spec: JobSpec, folder: Path, kill_after_s: float | None) -> list[tuple[float, Record]]:
    """What one trainer process told, each with its second; killed at a moment where that is given.

    The moment counts from its first word of training.
    """
    path = folder / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    told: list[tuple[float, Record]] = []
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "trainer", "run", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        killer: threading.Timer | None = None
        for line in child.stdout:
            record = decode_record(line)
            told.append((time.monotonic() - began, record))
            is_training = isinstance(record, Note) and record.text.startswith("training")
            if kill_after_s is not None and is_training and killer is None:
                killer = threading.Timer(kill_after_s, child.kill)
                killer.start()
        if killer is not None:
            killer.cancel()
    return told


def outcome(spec: JobSpec) -> tuple[Manifest, list[str]]:
    """The manifest and the sha256 of head and backbone."""
    out = Path(spec.out_dir)
    manifest = msgspec.json.decode((out / MANIFEST_FILE).read_bytes(), type=Manifest)
    files = (out / HEAD_FILE, out / BACKBONE_FILE)
    return manifest, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def figures(told: list[tuple[float, Record]]) -> list[tuple[float | None, ...]]:
    """Each epoch's, without times."""
    return [
        (e.epoch, e.train_loss, e.train_accuracy, e.validation_loss, e.validation_accuracy)
        for _, e in told
        if isinstance(e, EpochEnded)
    ]


def main() -> None:
    """Prints every attempt; exits with 1 when a figure differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        method = ModelBased(
            epochs=arguments.epochs,
            batch_size=BATCH_SIZE,
            precision="fp32",
        )
        spec = JobSpec(
            job_id="bench",
            model="bench",
            data=ImageSource(folder=str(arguments.folder.resolve())),
            out_dir=str(folder / "whole"),
            method=method,
            backbone=arguments.backbone,
            weights=arguments.weights,
            weights_dir=str(folder / "weights"),
            device="cpu",
            provider="cpu",
            threads=arguments.threads,
        )
        whole = attempt(spec, folder, None)
        epochs = [at for at, record in whole if isinstance(record, EpochEnded)]
        first = next(at for at, r in whole if isinstance(r, Note) and r.text.startswith("training"))
        training_s = epochs[-1] - first
        print(f"unbroken: {len(epochs)} epochs in {training_s:.1f} s of training", flush=True)
        expected, expected_files = outcome(spec)

        spent_s = 0.0
        for number in range(arguments.kills + 1):
            own = msgspec.structs.replace(
                spec, out_dir=str(folder / f"attempt-{number}"), checkpoint_dir=str(folder / "kept")
            )
            is_last = number == arguments.kills
            # A share of the whole, so that some work is left for those that follow.
            moment = moments.uniform(0.1, 1) * training_s / arguments.kills
            told = attempt(own, folder, None if is_last else moment)
            spent_s += told[-1][0]
            goes_on = [r.text for _, r in told if isinstance(r, Note) and "goes on" in r.text]
            done = figures(told)
            end = "ended" if is_last else f"killed {moment:.1f} s into training"
            print(
                f"attempt {number + 1}: {'; '.join(goes_on) or 'starts anew'}; {end}, "
                f"{len(done)} epochs known",
                flush=True,
            )
        found, found_files = outcome(own)
    print(f"unbroken {whole[-1][0]:.1f} s in all, the attempts {spent_s:.1f} s together")
    same = True
    for name, a, b in (
        ("epochs' losses and accuracies", figures(whole), done),
        ("figures", expected.figures, found.figures),
        ("hyperparameters", expected.hyperparameters, found.hyperparameters),
        ("bytes of head and backbone", expected_files, found_files),
    ):
        same &= a == b
        print(f"{name}: {'the same' if a == b else f'{a} unbroken, {b} resumed'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
