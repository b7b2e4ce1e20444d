import hashlib
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service.engine import head as heads
from service.engine.engine import Engine, EngineLimits, ModelFiles
from service.engine.head import Head
from service.errors import unloadable
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeRuntime
from tests.keys import key

GUARD_S = 60.0
"""Ends what hangs."""

COLOURS = ("red", "green", "blue")
FEATURES = 4
"""Of an image, from the backbone of one convolution."""


def image(colour: str, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """An encoded image of one colour."""
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


class Stored(dict[str, bytes]):
    """Stored files by their digests."""

    def add(self, content: bytes) -> str:
        """Stores a file; returns its digest."""
        digest = hashlib.sha256(content).hexdigest()
        self[digest] = content
        return digest

    def add_head(self, head: Head, folder: Path) -> str:
        """Stores a head, by way of a file in `folder`; returns its digest."""
        heads.save(head, folder / "head.safetensors")
        return self.add((folder / "head.safetensors").read_bytes())

    def read(self, digest: str, kind: str) -> bytes:
        """Reads as `Blobs.read`."""
        if digest not in self:
            raise unloadable(kind, "is missing")
        return self[digest]


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"version": "test"})


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(runtime: FakeRuntime, stored: Stored, metrics: Metrics) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(clock: Callable[[], float] = time.monotonic, **changes: float) -> Engine:
        bounds = {
            "threads": 1,
            "max_batch": 8,
            "max_queue": 64,
            "max_bytes": 1_000_000,
            "load_timeout_s": GUARD_S,
        }
        limits = EngineLimits(**{**bounds, **changes})  # type: ignore[arg-type]
        engine = Engine(runtime, stored.read, limits, metrics, clock)
        made.append(engine)
        return engine

    yield make
    for session in runtime.sessions.values():
        session.release()
    for engine in made:
        engine.close()


MakeModel = Callable[..., ModelFiles]


@pytest.fixture
def make_model(stored: Stored, tmp_path: Path) -> MakeModel:
    """Writes a model whose head names the strongest colour, on a shared backbone."""

    def make(
        name: str = "colours", backbone: str = "b0", classes: tuple[str, ...] = COLOURS
    ) -> ModelFiles:
        weight = np.eye(len(classes), 3, dtype=np.float32) * 20
        # A temperature of its own, so that heads of two names are two files.
        temperature = 1 + sum(name.encode()) * 1e-9
        bias = np.zeros(len(classes), np.float32)
        head_digest = stored.add_head(Head(weight, bias, classes, temperature), tmp_path)
        return ModelFiles(key(name), 1, stored.add(backbone.encode()), head_digest)

    return make


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uint8 [n, 224, 224, 3] -> float32 [n, 4]: a seeded convolution and a mean."""
    weight = np.random.default_rng(0).normal(size=(FEATURES, 3, 7, 7)).astype(np.float32) / 1000
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "weight"], ["convolved"], strides=[4, 4]),
        helper.make_node("Relu", ["convolved"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    graph = helper.make_graph(
        nodes,
        "backbone",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 224, 224, 3])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path_factory.mktemp("backbone") / "b.onnx"
    onnx.save(model, path)
    return path
