"""The work that everybody measured does: a JPEG in, the best class out.

Decode, scale, crop, one ONNX Runtime call, the best class. Written as a plain
user of Pillow and ONNX Runtime would, or with Graft's own preprocessing.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

from service.engine import preprocess
from service.engine.providers import choose_provider
from service.engine.runtime import OnnxRuntime

Pixels = npt.NDArray[np.uint8]
Run = Callable[[Pixels], npt.NDArray[np.float32]]
"""From uint8 [n, 224, 224, 3] to float32 [n, classes]."""


def plain_decode(data: bytes) -> Pixels:
    """Shorter side to 256, the middle 224 x 224, in two steps as everybody writes it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.uint8)


DECODERS: dict[str, Callable[[bytes], Pixels]] = {
    "plain": plain_decode,
    "graft": preprocess.decode,
}


def session(model: Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime's CPU provider as it comes, but for the threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def cpu_run(model: Path, threads: int) -> Run:
    """One whole exported classifier on ONNX Runtime's CPU provider, as it comes."""
    own = session(model, threads)
    name = own.get_inputs()[0].name

    def run(pixels: Pixels) -> npt.NDArray[np.float32]:
        (answer,) = own.run(None, {name: pixels})
        return np.asarray(answer)

    return run


def served_run(model: Path, provider: str, threads: int) -> Run:
    """The same file, opened as the service opens its backbones."""
    chosen = choose_provider(provider)  # type: ignore[arg-type]
    runtime = OnnxRuntime(chosen, threads)
    return runtime.load(model.read_bytes).run


def photos(folder: Path, most: int = 64) -> list[bytes]:
    """The bytes of the folder's JPEG files."""
    found = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:most]]
    if not found:
        raise SystemExit(f"{folder} holds no .jpg files")
    return found
