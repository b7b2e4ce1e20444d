"""Loads backbones into memory, and runs them in their files' precision.

A session that does not run on the provider that is meant is an error, never a silent
step down. Where several providers compute a file's precision the first one serves at
once, and what was measured to be quicker takes over when that is known
(provider_table.py). Tests put a fake `Runtime` in its place.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.domain import PRECISION, Precision
from service.engine import providers
from service.engine.gpu import GpuGraph, GpuLimits
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.provider_table import Measured
from service.engine.providers import Provider, ProviderName, ProviderUnavailable
from service.errors import Exhausted, GraftError, Reason, unloadable
from service.ops import cpus

log = logging.getLogger(__name__)

PAYS = 0.97
"""A batch twice as large pays when an image then takes at most this part of the time."""
_MEASURE_S = 0.5
"""Longest search for the largest batch that pays."""
_TRIES, _TRIED_S = 30, 0.01
"""Most runs that time a batch, and the time after which there are no more."""
_BESIDE = b"location"
"""Occurs in a graph whose weights lie in files beside it, and in none of ours."""
_AGAIN_S = 60.0
"""Time after which a narrow graph that could not be made is tried again."""


Read = Callable[[], bytes]
"""Reads a backbone's whole file, and checks that it is what was stored."""


class Session(Protocol):
    """A backbone in memory."""

    size: int
    """Side of the images that it takes, pixels."""
    feature_dim: int
    nbytes: int
    """Bytes that it takes, about."""
    precision: Precision
    """What it computes in."""
    made_for: Precision
    """Precision of its file, in which this machine may be unable to compute."""
    max_batch: int
    """Largest batch that still pays."""
    infer_s: float
    """Seconds that one core computes for an image, about."""

    def run(self, images: Pixels, cores: int = 0) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]. Thread-safe; blocks.

        May use `cores` of the machine's cores (0: all that it was made for).
        """


class Runtime(Protocol):
    """Loads backbones."""

    @property
    def is_gpu(self) -> bool:
        """True if a GPU computes."""

    def load(self, read: Read, digest: str = "") -> Session:
        """Loads a backbone, whose file has this sha256; blocks.

        `read` may be called again later. Raises Damaged (MODEL_UNLOADABLE) for a file that
        cannot be loaded, Exhausted (OUT_OF_MEMORY), and what `read` raises.
        """


class Graph(Protocol):
    """A file that was made ready to run on a number of cores."""

    size: int
    feature_dim: int

    def run(self, images: Pixels) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]; thread-safe."""


Compile = Callable[[bytes, int, ProviderName], Graph]
"""Makes a graph of a file's bytes, for as many cores as a run may use, on a provider."""


class OnnxRuntime:
    """Backbones on a provider, or on the one of several that was measured to be quickest.

    `max_batch` above 1 lets every load of a backbone that was not measured, and is not to be,
    search for the largest batch that pays, up to that; it takes up to half a second, and the
    kernels are warm after. `is_narrow` makes the graph for one core at load, for those
    who have many images at once and run them side by side; the wide one is then never
    made. `measured` finds what is known of a file by its digest, and `on_unmeasured` is
    told of files that have a choice of providers and were not measured. `gpu` bounds what
    each backbone takes of one.
    """

    def __init__(
        self,
        provider: Provider,
        threads: int = 0,
        *,
        max_batch: int = 1,
        is_narrow: bool = False,
        measured: Callable[[str], Measured | None] = lambda _digest: None,
        on_unmeasured: Callable[[str, Read], None] | None = None,
        gpu: GpuLimits = GpuLimits(),  # noqa: B008 - frozen
    ) -> None:
        self._gpu = gpu
        self._is_narrow = is_narrow
        self._provider = provider
        self._cores = threads or cpus.available_cores()
        self._max_batch = max_batch
        self._measured = measured
        self._on_unmeasured = on_unmeasured
        self._sessions: weakref.WeakValueDictionary[str, BackboneSession] = (
            weakref.WeakValueDictionary()
        )
        """With a choice of providers, by the digests of their files."""

    @property
    def provider(self) -> ProviderName:
        """Name of the provider that serves what was not measured."""
        return self._provider.name

    @property
    def is_gpu(self) -> bool:
        """True if a GPU computes."""
        return self._provider.is_gpu

    @property
    def why(self) -> str:
        """Reason why this provider was chosen."""
        return self._provider.why

    def computes(self, precision: Precision) -> bool:
        """Tells whether files of this precision are computed in it, by one provider at least."""
        return bool(able(self._provider, precision))

    def load(self, read: Read, digest: str = "") -> "BackboneSession":
        """Loads a backbone; blocks for its bytes to be read and its graph optimised."""
        try:
            return self._load(read, digest)
        except (ProviderUnavailable, GraftError):
            raise
        except MemoryError as error:
            raise Exhausted(
                Reason.OUT_OF_MEMORY,
                "there is no memory to load the version's backbone: try again",
            ) from error
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise unloadable("backbone", "cannot be loaded") from error

    def _load(self, read: Read, digest: str) -> "BackboneSession":
        widths = [self._cores] if self.is_gpu else widths_of(self._cores)
        if self._is_narrow:
            widths = widths[-1:]
        known = self._measured(digest) if digest else None
        if known is not None and not known.providers.keys() >= set(widths):
            known = None  # measured for another number of threads
        session = BackboneSession(
            read,
            lambda model, cores, name: compiled(model, cores, name, self._cores, self._gpu),
            self._provider,
            widths,
            known.providers if known else {},
        )
        on_unmeasured = self._on_unmeasured if digest and session.has_choice else None
        if known:
            session.adopt(known)
        elif self._max_batch > 1:
            # What is measured right after is not searched for now, while a first call waits.
            session.measure(self._max_batch if on_unmeasured is None else 1)
        if on_unmeasured is not None:
            self._sessions[digest] = session
            if known is None:
                on_unmeasured(digest, read)
        return session

    def adopt(self, digest: str, measured: Measured) -> None:
        """Lets the session of a file, if there is one, run from now on as was measured."""
        if (session := self._sessions.get(digest)) is not None:
            session.adopt(measured)


def able(provider: Provider, precision: Precision) -> list[ProviderName]:
    """Lists those that compute a precision, of a provider and those beside it."""
    names = (provider.name, *provider.others)
    return [name for name in names if providers.computing(name, precision) == precision]


def widths_of(cores: int) -> list[int]:
    """Lists how many cores the graphs of a backbone use, the widest first.

    Runs at the same time are faster each on its own core than each on all; a run that
    is alone is fastest on all. So there are graphs for all, for about the square root
    of that, and for one.
    """
    return sorted({cores, round(cores**0.5), 1}, reverse=True)


def compiled(
    model: bytes,
    cores: int,
    name: ProviderName,
    all_cores: int,
    gpu: GpuLimits = GpuLimits(),  # noqa: B008 - frozen
) -> Graph:
    """Makes a graph for runs on `cores` of `all_cores` cores, in the file's precision.

    In fp32 where the provider does not compute in that.
    """
    precision = providers.computing(name, precision_of(model))
    if name == "openvino":
        from service.engine.openvino import OpenVinoGraph  # noqa: PLC0415 - an optional extra

        return OpenVinoGraph(model, precision, all_cores, max(1, all_cores // cores))
    if name == "cpu":
        session = ort.InferenceSession(model, _options(cores), providers=["CPUExecutionProvider"])
        return OnnxGraph(session, "CPUExecutionProvider")
    wanted = providers.gpu_providers(name, gpu.arena_bytes)
    session = ort.InferenceSession(
        _half(model) if precision == "fp16" else model,
        _options(1),
        providers=[*wanted, "CPUExecutionProvider"],
    )
    _check_provider(session, wanted[0][0])
    return GpuGraph(session, gpu)


def precision_of(model: bytes) -> Precision:
    """Reads from a backbone's file what it is computed in."""
    if b"DequantizeLinear" in model or b"QLinearConv" in model:
        return "int8"
    for precision in ("bf16", "fp16"):
        if model.endswith(_mark(precision)):
            return precision
    return "fp32"


def marked(model: bytes, precision: Precision) -> bytes:
    """Returns the same file as one that is computed in bf16 or fp16."""
    return model + _mark(precision)


def _mark(precision: str) -> bytes:
    # An entry of ModelProto.metadata_props (field 14) in protobuf's wire format, where a message
    # may go on with more of a repeated field: it needs no package for ONNX, which takes a third
    # of a second to import, and no second copy of the weights.
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    return field(14, field(1, PRECISION.encode()) + field(2, precision.encode()))


class BackboneSession:
    """Holds a backbone: a graph for the most cores and, made when needed, narrower ones.

    `chosen` are the providers by the width of their graphs; where it names none the
    first that computes the file's precision does, or `provider` itself in fp32.
    """

    def __init__(
        self,
        read: Read,
        compile_graph: Compile,
        provider: Provider,
        widths: list[int],
        chosen: Mapping[int, ProviderName],
    ) -> None:
        model = read()
        if _BESIDE in model:
            raise unloadable("backbone", "names other files, which it may not")
        self.made_for = precision_of(model)
        names = able(provider, self.made_for)
        self.precision: Precision = self.made_for if names else "fp32"
        self.has_choice = len(names) > 1
        self._names = names or [provider.name]
        self._chosen = chosen
        self._read = read
        self._compile = compile_graph
        self._widths = widths
        name = self._provider_of(widths[0])
        self._widest = compile_graph(model, widths[0], name)
        self._graphs = {widths[0]: (name, self._widest)}
        self._compiling = threading.Lock()
        self._not_before: dict[int, float] = {}
        """Times from which a graph that could not be made is tried again, by width."""
        self.size, self.feature_dim = self._widest.size, self._widest.feature_dim
        # For each graph the weights, once as read and packed for the kernels;
        # activations and the arena come on top. Measured on the backbones that we ship.
        self.nbytes = 2 * len(model) * len(self._widths) + 16 * 2**20
        self.max_batch = 1
        self.infer_s = 0.0

    def adopt(self, measured: Measured) -> None:
        """Changes to what was measured: a width's graph is made again at its next run."""
        self._chosen = measured.providers
        self.max_batch, self.infer_s = measured.max_batch, measured.infer_s

    def _provider_of(self, width: int) -> ProviderName:
        name = self._chosen.get(width)
        return name if name in self._names else self._names[0]

    def run(self, images: Pixels, cores: int = 0) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]."""
        return self._graph(cores or self._widths[0]).run(images)

    def measure(self, most: int) -> None:
        """Finds the largest batch, up to `most`, that still pays, and warms the kernels."""
        begun = time.monotonic()
        best_s = float("inf")
        batch = 1
        while batch <= most and time.monotonic() - begun < _MEASURE_S:
            images = np.zeros((batch, self.size, self.size, 3), np.uint8)
            self._widest.run(images)
            each_s = self._quickest_s(images) / batch
            if each_s > best_s * PAYS:
                break
            best_s, self.max_batch = each_s, batch
            batch *= 2
        self.infer_s = best_s * self._widths[0]

    def _quickest_s(self, images: Pixels) -> float:
        # A short run is easily disturbed, and one that was would end the search too early.
        begun = ended = time.monotonic()
        quickest = float("inf")
        for _ in range(_TRIES):
            started = ended
            self._widest.run(images)
            ended = time.monotonic()
            quickest = min(quickest, ended - started)
            if ended - begun > _TRIED_S:
                break
        return quickest

    def _graph(self, cores: int) -> Graph:
        width = next((width for width in self._widths if width <= cores), self._widths[-1])
        made = self._graphs.get(width)
        wanted = self._provider_of(width)
        if made is not None and made[0] == wanted:
            return made[1]
        meanwhile = self._widest if made is None else made[1]
        if not self._compiling.acquire(blocking=False):
            return meanwhile  # another thread is at it
        try:
            if time.monotonic() < self._not_before.get(width, 0):
                return meanwhile
            graph = self._compile(self._read(), width, wanted)
        except Exception:
            # What is there does as well, only slower; for a while, since the reason may pass.
            log.warning("a graph of a backbone cannot be made", exc_info=True)
            self._not_before[width] = time.monotonic() + _AGAIN_S
            return meanwhile
        finally:
            self._compiling.release()
        self._graphs[width] = wanted, graph
        if width == self._widths[0]:
            self._widest = graph
        return graph


class OnnxGraph:
    """An ONNX Runtime session on a CPU."""

    def __init__(self, session: ort.InferenceSession, provider: str) -> None:
        _check_provider(session, provider)
        (images,) = session.get_inputs()
        self._input = images.name
        self.size = int(images.shape[1])
        (output,) = session.get_outputs()
        self._output = output.name
        self._session = session
        self.feature_dim = int(output.shape[1])

    def run(self, images: Pixels) -> Floats:
        """Computes features float32 [n, d] of uint8 [n, size, size, 3]."""
        (features,) = self._session.run([self._output], {self._input: images})
        result: npt.NDArray[np.float32] = features
        return result


def _check_provider(session: ort.InferenceSession, provider: str) -> None:
    if (found := session.get_providers()[0]) != provider:
        raise ProviderUnavailable(f"ONNX Runtime fell back to {found} from {provider}")


def on_one_core(path: Path) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """Loads a file of one input and one output, whoever made it; returns what runs it.

    On the CPU provider in full precision. Raises ONNX Runtime's own errors.
    """
    session = ort.InferenceSession(str(path), _options(1), providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()

    def run(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = session.run([output.name], {given.name: images})[0]
        return found

    return run


def _options(cores: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores
    options.inter_op_num_threads = 1
    # Threads of one run spin for each other, and stop when it ends: one that spins while
    # idle would take a core from decoding and from everyone else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not providers.has_vnni():
        # Else sums of int8 overflow, and a version answers otherwise than elsewhere (by up to
        # 0.13 in a probability).
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    return options


def _half(model: bytes) -> bytes:
    """Makes the same file compute in fp16, with inputs and outputs as they were."""
    # Imported late: only a GPU needs them.
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    halved = convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True)
    serialized: bytes = halved.SerializeToString()
    return serialized
