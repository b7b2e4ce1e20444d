"""A backbone's ONNX file as a source of features: loaded, and made, when one is asked for.

Also what computes in a trainer, and for which precision a new version's file is made.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path

from service import backbones as registry
from service.contract import Auto, FeatureBased, JobSpec, RankSpec
from service.domain import BLOCKS, Precision, PrecisionSetting
from service.engine import preprocess, providers, timing
from service.engine.provider_table import ProviderTable, machine_key
from service.engine.providers import ProviderUnavailable, choose_provider
from service.engine.runtime import OnnxRuntime, Session, marked, precision_of
from service.errors import Reason, WrongState
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
        self._precision: Precision | None = None

    @property
    def space(self) -> str:
        """Of the digest, what computes and in what, the libraries, the decoding."""
        return space_of(self.digest, self.precision, self._runtime) if self.digest else ""

    @property
    def precision(self) -> Precision:
        """What it is computed in here; the file is made if need be."""
        if self._precision is None:
            self.ensure()
            made_for = precision_of(self.path.read_bytes())
            self._precision = made_for if self._runtime.computes(made_for) else "fp32"
        return self._precision

    @property
    def is_gpu(self) -> bool:
        """True if a GPU computes."""
        return self._runtime.is_gpu

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
        """Makes the file where it is not there yet."""
        with self._making:
            if self._make is not None and not self.path.exists():
                self._make(self.path)

    def load(self) -> Session:
        """Loads it, made if need be; errors as `Runtime.load` and those of making it."""
        self.ensure()
        if not self.digest:
            with self.path.open("rb") as file:
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        _ = self.precision  # while the file has this name
        read = partial(stored_file.read, self.path, self.digest, "backbone")
        return self._runtime.load(read, self.digest)


def name_blocks(path: Path, blocks: Sequence[int]) -> None:
    """Writes into a backbone's file how many features each block has."""
    import onnx

    model = onnx.load_from_string(path.read_bytes())
    onnx.helper.set_model_props(model, {BLOCKS: json.dumps(list(blocks))})
    path.write_bytes(model.SerializeToString())


def space_of(digest: str, precision: Precision, runtime: OnnxRuntime) -> str:
    """The name of what computes: the same backbone may differ in the last bits elsewhere.

    Providers that agree within a precision stand for each other, as they do where it serves.
    """
    where = "gpu" if runtime.is_gpu else "cpu"
    return " ".join((digest, where, precision, *_versions(), decoding()))


def runtime_of(spec: JobSpec | RankSpec, *, is_narrow: bool = True) -> OnnxRuntime:
    """Returns what computes as the serving process does; for a job on the CPU, there.

    Raises WrongState (DEVICE_UNAVAILABLE) for a provider or a precision that this machine
    does not have.
    """
    try:
        on_cpu = isinstance(spec, JobSpec) and spec.device == "cpu"
        provider = choose_provider(spec.provider, on_cpu=on_cpu)
    except ProviderUnavailable as error:
        raise WrongState(Reason.DEVICE_UNAVAILABLE, str(error)) from error
    path = Path(spec.provider_table) if spec.provider_table else None
    table = ProviderTable(path, machine_key())
    runtime = OnnxRuntime(provider, spec.threads, is_narrow=is_narrow, measured=table.get)
    wanted = spec.precision
    if wanted != "auto" and not runtime.computes(wanted):
        needed = "an NVIDIA GPU" if wanted == "fp16" else "a CPU with AMX and OpenVINO"
        raise WrongState(
            Reason.DEVICE_UNAVAILABLE,
            f"the precision is set to {wanted}, which needs {needed}: set it to auto or fp32",
        )
    return runtime


def narrowest(asked: PrecisionSetting, runtime: OnnxRuntime) -> Precision:
    """Returns for what precision a float file is made, should that turn out to pay."""
    if asked in ("fp32", "int8"):
        return "fp32"  # quantised later, of the file in fp32
    if asked != "auto":
        return asked
    if runtime.is_gpu:
        return "fp16"
    return "bf16" if runtime.computes("bf16") else "fp32"


def takes_int8(spec: JobSpec, weights: str, runtime: OnnxRuntime) -> bool:
    """Tells whether a job on weights of that name takes int8 though nobody chose it.

    Where that was shown to hold: frozen features of a backbone that says so, on a CPU with units
    for it. A network that is trained is served in what it was trained in.
    """
    row = registry.find(spec.backbone)
    return (
        spec.precision == "auto"
        and isinstance(spec.method, Auto | FeatureBased)
        and row is not None
        and row.holds_in_int8
        and weights == row.weights_name("")
        and not runtime.is_gpu
        and providers.has_vnni()
    )


def settle(path: Path, asked: PrecisionSetting, runtime: OnnxRuntime) -> Precision:
    """Makes a file in fp32 one for the precision that is asked for; returns which that is.

    bf16 is measured first, unless it was asked for by name.
    """
    precision = narrowest(asked, runtime)
    if precision == "fp32":
        return precision
    model = path.read_bytes()
    if precision == "bf16" and asked == "auto" and not timing.bf16_pays(model):
        return "fp32"
    path.write_bytes(marked(model, precision))
    return precision


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
