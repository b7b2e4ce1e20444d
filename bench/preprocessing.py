"""What decoding at a reduced scale and one-step resizing cost in accuracy, and save in time.

    python -m bench.preprocessing FOLDER

FOLDER holds `train/` and `val/`, each with JPEG photos in a folder per class.
Three ways to the 224 x 224 pixels: whole decoding and two steps, as everybody
writes it; whole decoding and one step; and what serves. For each a head is
fitted to the frozen efficientnet_lite0's features of the training photos as that
way sees them, and measured on the validation photos likewise; and last the
served way's head on photos that came the other ways, as a client might send
them. Times are of one thread.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bench.serve.plain_server import Pixels, plain_decode
from service.engine import preprocess
from service.engine.head import Floats, Head
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime, Session
from trainer import backbones, export, linear

BATCH = 16


def whole_then_one_step(data: bytes) -> Pixels:
    """Decoded at full scale, resized from the crop's box."""
    return preprocess.fit(Image.open(io.BytesIO(data)).convert("RGB"))


WAYS: dict[str, Callable[[bytes], Pixels]] = {
    "whole, two steps": plain_decode,
    "whole, one step": whole_then_one_step,
    "as served": preprocess.decode,
}


def read(folder: Path) -> tuple[list[bytes], "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    """The photos' bytes and their classes."""
    photos, targets = [], []
    for target, label in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for photo in sorted(label.glob("*.jpg")):
            photos.append(photo.read_bytes())
            targets.append(target)
    return photos, np.array(targets, dtype=np.int64)


def features_of(session: Session, pixels: list[Pixels]) -> Floats:
    """Features float32 [n, d]."""
    return np.concatenate(
        [
            session.run(np.stack(pixels[start : start + BATCH]))
            for start in range(0, len(pixels), BATCH)
        ]
    )


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    train, train_targets = read(folder / "train")
    validation, targets = read(folder / "val")
    count = int(targets.max()) + 1
    names = tuple(str(n) for n in range(count))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "backbone.onnx"
        export.to_onnx(backbones.load("efficientnet_lite0", "", 0, Path(temporary)), file)
        session = OnnxRuntime(Provider("cpu", "")).load(file.read_bytes)
    seen: dict[str, Floats] = {}
    served_head: Head | None = None
    for name, way in WAYS.items():
        for data in validation[:20]:
            way(data)
        started = time.perf_counter()
        pixels = [way(data) for data in validation]
        each_ms = (time.perf_counter() - started) * 1000 / len(validation)
        seen[name] = features_of(session, pixels)
        learned = features_of(session, [way(data) for data in train])
        fitted = linear.fit(learned, train_targets, count, None, 0)
        head = Head(fitted.weight.astype(np.float32), fitted.bias.astype(np.float32), names)
        right = int((head.logits(seen[name]).argmax(axis=1) == targets).sum())
        print(f"{name}: {right} of {len(targets)} right, {each_ms:.2f} ms a photo")
        served_head = head
    assert served_head is not None
    for name, features in seen.items():
        right = int((served_head.logits(features).argmax(axis=1) == targets).sum())
        print(f"the served way's head on photos {name}: {right} right")


if __name__ == "__main__":
    main()
