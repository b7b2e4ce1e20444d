"""A backbone's ONNX file as a source of features: loaded, and made, when one is asked for."""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path

from service.domain import BLOCKS
from service.engine import preprocess, providers
from service.engine.runtime import OnnxRuntime, Session
from trainer import crops, stored_file

OPSET = 17


class BackboneFile:
    """A backbone's ONNX file on a runtime; `make` writes it where it is not there yet.

    `digest` is the sha256 of what it holds, found out at the load when it is empty.
    """

    def __init__(
        self,
        path: Path,
        runtime: OnnxRuntime,
        digest: str = "",
        make: Callable[[Path], None] | None = None,
    ) -> None:
        self.path = path
        self.digest = digest
        self._runtime = runtime
        self._making = threading.Lock()
        self._make = make
        self._blocks: tuple[int, ...] = ()
        self._size = self._opset = 0

    @property
    def space(self) -> str:
        """Of the digest, the provider, the precision, the libraries that compute, the decoding."""
        return space_of(self.digest, self._runtime) if self.digest else ""

    @property
    def precision(self) -> str:
        """Known without a load where nothing but single precision was asked for."""
        return "fp32" if self._runtime.precision == "exact" else ""

    @property
    def size(self) -> int:
        """Side of the images that it takes, pixels; the file is made if need be."""
        self._look()
        return self._size

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many features each block has, the last layer's first; made if need be."""
        self._look()
        return self._blocks

    @property
    def opset(self) -> int:
        """The version of ONNX's operators that it is made of; the file is made if need be."""
        self._look()
        return self._opset

    def _look(self) -> None:
        if self._size:
            return
        import onnx  # a third of a second, and a job may need no look

        self.ensure()
        model = onnx.load_from_string(self.path.read_bytes())
        told = {entry.key: entry.value for entry in model.metadata_props}
        shape = model.graph.input[0].type.tensor_type.shape.dim
        width = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        self._blocks = tuple(json.loads(told[BLOCKS])) if BLOCKS in told else (width,)
        self._size = shape[1].dim_value
        self._opset = model.opset_import[0].version

    def ensure(self) -> None:
        """Makes it where it is not there yet."""
        with self._making:
            if self._make is not None and not self.path.exists():
                self._make(self.path)

    def load(self) -> Session:
        """Loads it, made if need be; errors as `Runtime.load` and those of making it."""
        self.ensure()
        if not self.digest:
            with self.path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self._runtime.load(partial(stored_file.read, self.path, self.digest, "backbone"))


def name_blocks(path: Path, blocks: Sequence[int]) -> None:
    """Writes into a backbone's file how many features each block has."""
    import onnx

    model = onnx.load_from_string(path.read_bytes())
    onnx.helper.set_model_props(model, {BLOCKS: json.dumps(list(blocks))})
    path.write_bytes(model.SerializeToString())


def space_of(digest: str, runtime: OnnxRuntime) -> str:
    """The name of what computes: the same backbone may differ in the last bits elsewhere."""
    computing = "fp32"
    if runtime.precision != "exact":
        computing = f"{runtime.precision}:{'bf16' if providers.has_bf16() else 'fp32'}"
    return " ".join((digest, runtime.provider, computing, *_versions(), decoding()))


def decoding() -> str:
    """The name of what makes pixels of an image file, and views of pixels."""
    described = json.dumps(
        [preprocess.describe(), preprocess.MARGIN, crops.describe()], sort_keys=True
    )
    fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]
    return f"pillow {metadata.version('pillow')} {fingerprint}"


@cache
def _versions() -> tuple[str, ...]:
    found = []
    for package in ("onnxruntime-gpu", "onnxruntime", "openvino"):
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{package} {metadata.version(package)}")
    return tuple(found)
