"""Stands in for ONNX Runtime in tests, scripted: no model files, no kernels."""

import hashlib
import threading

import numpy as np

from service.domain import Precision
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.runtime import Read


class FakeSession:
    """Features are the mean red, green and blue of an image, 0 to 1.

    `hold` keeps runs waiting until `release` (ten minutes at most); `fail_next` makes
    the next run raise.
    """

    size = 224
    feature_dim = 3
    precision: Precision = "fp32"
    made_for: Precision = "fp32"
    max_batch = 1_000
    infer_s = 0.0

    def __init__(self, nbytes: int = 1000) -> None:
        self.nbytes = nbytes
        self.batches: list[int] = []
        self.cores: list[int] = []
        self.running = threading.Semaphore(0)
        self.fail_next: Exception | None = None
        self._open = threading.Event()
        self._open.set()

    def hold(self) -> None:
        """Makes runs wait from now on."""
        self._open.clear()

    def release(self) -> None:
        """Lets waiting runs go on."""
        self._open.set()

    def run(self, images: Pixels, cores: int = 0) -> Floats:
        """Computes features float32 [n, 3] of uint8 [n, 224, 224, 3]."""
        self.cores.append(cores)
        self.running.release()
        if not self._open.wait(600):
            raise TimeoutError("nobody released the fake session")
        if (error := self.fail_next) is not None:
            self.fail_next = None
            raise error
        self.batches.append(len(images))
        means: Floats = images.mean(axis=(1, 2), dtype=np.float32) / np.float32(255)
        return means


class FakeRuntime:
    """Gives each content, by its sha256, its own `FakeSession`."""

    is_gpu = False

    def __init__(self, nbytes: int = 1000) -> None:
        self.sessions: dict[str, FakeSession] = {}
        self.loads: list[str] = []
        """Digests of what was loaded."""
        self._nbytes = nbytes

    def session(self, digest: str) -> FakeSession:
        """Returns the session of a content, to script it before or after it is loaded."""
        return self.sessions.setdefault(digest, FakeSession(self._nbytes))

    def load(self, read: Read, digest: str = "") -> FakeSession:
        """Reads the content once."""
        content = hashlib.sha256(read()).hexdigest()
        assert digest in ("", content)
        self.loads.append(content)
        return self.session(content)
