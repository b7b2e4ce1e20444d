"""Runs the demo: starts the service, fine-tunes over gRPC, predicts, shows metrics.

Without --data it takes scikit-learn's scanned handwritten digits and writes them as PNG
files: `digits/CLASS/` to learn from, `new/CLASS/` to predict. With --data it takes any
folder with a folder per class, or with train/ and val/. Ends the service when done; the
images and the service's data stay in --folder, and the last lines say how to go on.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graftml import Client, EpochMetrics, GraftError, Note, Progress
from graftml.cli._image_files import SUFFIXES
from PIL import Image

MODEL = "demo"
START_TIMEOUT_S = 30.0
JOB_TIMEOUT_S = 1800.0
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class Data:
    """What to learn from, and images that training does not see."""

    folder: Path
    held_out: list[tuple[Path, str]]


def write_digits(folder: Path, per_class: int = 30, held_out_per_class: int = 20) -> Data:
    """Writes 8 x 8 scans as 96 x 96 PNG files, in the place of those of an earlier demo."""
    from sklearn.datasets import load_digits

    for part in ("digits", "new"):
        shutil.rmtree(folder / part, ignore_errors=True)
    digits = load_digits()
    held_out: list[tuple[Path, str]] = []
    seen = dict.fromkeys(CLASSES, 0)
    scans = list(zip(digits.images, digits.target, strict=True))
    random.Random(0).shuffle(scans)  # nosec B311 # they come writer by writer
    for scan, digit in scans:
        label = CLASSES[digit]
        number = seen[label]
        seen[label] += 1
        if number >= per_class + held_out_per_class:
            continue
        part = "digits" if number < per_class else "new"
        path = folder / part / label / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ink = Image.fromarray((255 - scan * (255 / 16)).astype("uint8"))
        ink.resize((96, 96), Image.Resampling.BICUBIC).save(path)
        if part == "new":
            held_out.append((path, label))
    return Data(folder / "digits", held_out)


def own_data(root: Path) -> Data:
    """Takes a user's folder as it is; what is asked afterwards comes from its held-out part."""
    split = next((root / name for name in SPLITS if (root / name).is_dir()), None)
    held_out = [
        (path, path.relative_to(split or root).parts[0])
        for path in sorted((split or root).glob("*/**/*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if split is None:
        print("(no val/ folder: the service holds out a part; images asked below may be known)")
    random.Random(0).shuffle(held_out)  # nosec B311 # no secret
    return Data(root, held_out[:200])


@contextlib.contextmanager
def service(folder: Path) -> Iterator[tuple[str, str]]:
    """Runs `graft-server run` on free ports; gives the gRPC address and the metrics URL."""
    flags = ["--port=0", "--metrics-port=0", f"--data-dir={folder}", "--log-format=json"]
    flags += ["--trainer-niceness=0"]  # there is nothing else to serve meanwhile
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "run", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield _addresses(process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _addresses(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Reads the service's log until it says where it serves; keeps draining it after that."""
    assert process.stderr is not None
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    seen: list[str] = []
    try:
        for line in process.stderr:
            seen.append(line)
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("message") == "serving":
                    rest = process.stderr
                    threading.Thread(target=_drain, args=(rest,), daemon=True).start()
                    return (
                        f"localhost:{entry['port']}",
                        f"http://localhost:{entry['metrics_port']}/metrics",
                    )
    finally:
        timer.cancel()
    sys.exit("the service did not start:\n" + "".join(seen))


def _drain(lines: Iterator[str]) -> None:
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("level") in ("WARNING", "ERROR"):
                print(f"  [service] {entry['message']}")


def fine_tune(client: Client, data: Data) -> tuple[float, str]:
    """Fine-tunes and asks until served; gives seconds to the answer, and how well it does."""
    started = time.monotonic()
    job = client.fine_tune(data.folder, name=MODEL)
    print(f"FineTune accepted as {job.job_id}")
    shown = ""
    for event in job.events(timeout_s=JOB_TIMEOUT_S):
        what = event.payload
        at = f"  {time.monotonic() - started:5.1f} s "
        if isinstance(what, EpochMetrics):
            print(
                f"{at} epoch {what.epoch}/{what.epochs}: loss {what.train_loss:.3f}, accuracy "
                f"{what.train_accuracy:.3f}, as trained"
            )
        elif isinstance(what, Progress) and what.stage != shown:
            shown = what.stage
            print(f"{at} {what.stage}")
        elif isinstance(what, Note):
            print(f"{at} {what.text}")
    version = job.wait(timeout_s=60)
    path, _ = data.held_out[0]
    client.predict(path, model=MODEL)
    return time.monotonic() - started, version.measured


def show(client: Client, data: Data, metrics_url: str) -> None:
    """Fine-tunes, predicts what was held out, and prints what came of it."""
    to_answer_s, measured = fine_tune(client, data)
    answers = client.predict([path for path, _ in data.held_out], model=MODEL, top_k=2)
    rows = list(zip(data.held_out, answers, strict=True))
    right = sum(answer.label == truth for (_, truth), answer in rows)
    print(f"\nmeasured accuracy    {measured}")
    print(f"held-out accuracy    {right / len(rows):.3f} ({len(rows)} images)")
    print(f"FineTune to answer   {to_answer_s:.1f} s")
    print("predictions")
    for (path, truth), answer in rows[:: max(1, len(rows) // 6)][:6]:
        best = ", ".join(f"{s.label} {s.probability:.3f}" for s in answer.scores)
        print(f"  {truth + '/' + path.name:24} answered {best}")
    print("metrics")
    with urllib.request.urlopen(metrics_url, timeout=10) as answer:  # nosec B310 # our own server
        text = answer.read().decode()
    wanted = ("graft_images_total", "graft_jobs{", "graft_loaded_bytes{", "graft_provider_info",
              "graft_batch_size_count")  # fmt: skip
    for line in text.splitlines():
        if line.startswith(wanted):
            print(f"  {line}")


def main() -> None:
    """Runs the demo; exits with 1 and a reason when something fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with a folder of images per class")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="what it leaves behind")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    data = own_data(arguments.data) if arguments.data else write_digits(folder)
    if not data.held_out:
        sys.exit(f"no images were found in {arguments.data}")
    began = time.monotonic()
    with service(folder / "data") as (address, metrics_url), Client(address) as client:
        client.wait_ready(timeout_s=START_TIMEOUT_S)
        print(f"graft-server is SERVING at {address} after {time.monotonic() - began:.1f} s")
        show(client, data, metrics_url)
    left = sorted(f"{path}/" for path in folder.iterdir() if path.is_dir())
    print(f"\nleft behind: {', '.join(left)}. Go on with")
    print("  . .venv/bin/activate")
    print(f"  graft-server run --data-dir {folder / 'data'}")


if __name__ == "__main__":
    try:
        main()
    except GraftError as error:
        sys.exit(f"the demo failed: {error}")
