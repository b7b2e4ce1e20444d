"""Files of heads: whole ones give probabilities, all others are told as damaged."""

import json
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from service.engine import head as heads
from service.engine.head import Head
from service.engine.outliers import Outliers
from tests.fuzz.promise import Target


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def run(data: bytes) -> None:
    """Loads it; what was loaded must compute."""
    path = _folder() / "head.safetensors"
    path.write_bytes(data)
    head = heads.load(path.read_bytes())
    with np.errstate(all="ignore"):
        features = np.ones((2, head.feature_dim), np.float32)
        said = head.log_probabilities(features)
        if head.outliers is not None:
            head.outliers.scores(features, said)


def seeds() -> list[bytes]:
    """Heads with and without what tells outliers, and with odd metadata."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    outliers = Outliers(weight, np.ones((3,), np.float32), np.array([0.5, 1.0], np.float32))
    made = [Head(weight, weight[:, 0], ("cat", "dog"), 1.5)]
    made.append(Head(weight, weight[:, 0], ("cat", "dog"), 1.5, outliers, is_calibrated=False))
    whole = [_saved(head) for head in made]
    odd = (
        '{"classes": ["cat", "dog"], "temperature": 1' + "0" * 400 + "}",
        '{"classes": ["cat", "dog"], "temperature": NaN}',
        '{"classes": {"cat": 1}, "temperature": 1}',
        '{"classes": ["cat", "dog"], "temperature": 1, "is_calibrated": "yes"}',
        "[" * 3000,
        "null",
    )
    return [*whole, *(_with_metadata(whole[0], text) for text in odd)]


def _saved(head: Head) -> bytes:
    path = _folder() / "seed.safetensors"
    heads.save(head, path)
    return path.read_bytes()


def _with_metadata(data: bytes, text: str) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header["__metadata__"]["head"] = text
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + data[8 + length :]


TARGET = Target("heads", run, seeds, modules=("service",))
