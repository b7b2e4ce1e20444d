"""Real processes: `python -m service run` on free ports, with real trainers behind it."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from graftml import Client

from tests.extractors import MEAN, SIZE, STD, layered, write

ROOT = Path(__file__).parents[2]

GUARD_S = 300.0
"""After which a broken test ends: far longer than anything here takes, on a busy machine too."""

UNHURRIED = (
    f"--predict-timeout-s={GUARD_S}",
    f"--load-timeout-s={GUARD_S}",
    f"--message-timeout-s={GUARD_S}",
    f"--heartbeat-timeout-s={GUARD_S}",
    f"--database-timeout-s={GUARD_S}",
    f"--drain-s={GUARD_S / 2}",
    # Beside other busy processes trainers would get next to nothing of a core, and threads of
    # theirs would spin while they wait for each other.
    "--trainer-niceness=0",
    "--trainer-threads=1",
    # Else every server would measure its backbones and quantise the default one, beside the others.
    "--provider=cpu",
    "--precision=fp32",
)
"""Deadlines of the service that none of its work shall miss; a test of one sets its own."""

INSTANT = "bench.instant"
"""The service's own stores, engine and sockets with trainers that train nothing, of any classes."""


class Ended(AssertionError):  # noqa: N818
    """A process ended before it said what was waited for; all that it said."""


class ServiceProcess:
    """One running service, its log lines, its addresses."""

    def __init__(
        self,
        data_dir: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
        module: str = "service",
    ) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
        command = [sys.executable, "-m", module, "run", "--port=0", "--metrics-port=0"]
        self.process = subprocess.Popen(
            # Of a flag that is given twice the last one counts.
            [*prefix, *command, f"--data-dir={data_dir}", *UNHURRIED, *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**own, **(environment or {})},
            # Where `-m` looks first.
            cwd=cwd or ROOT,
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            serving = self.wait_for("serving")
        except AssertionError:
            self.process.kill()
            self.end()
            raise
        self.address = f"127.0.0.1:{serving['port']}"
        self.metrics_url = f"http://127.0.0.1:{serving['metrics_port']}/metrics"

    def wait_for(self, message: str) -> dict[str, Any]:
        """The next log line with this message."""
        while True:
            try:
                entry = self.lines.get(timeout=GUARD_S)
            except queue.Empty:
                raise AssertionError("".join(self.seen)) from None
            if entry is None:
                raise Ended("".join(self.seen))
            if entry.get("message") == message:
                return entry

    def metrics(self) -> str:
        """What Prometheus would read."""
        with urllib.request.urlopen(self.metrics_url, timeout=GUARD_S) as answer:
            return str(answer.read().decode())

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.seen.append(line)
            with contextlib.suppress(ValueError):
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def end(self) -> int:
        """Drains it; returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(GUARD_S)
        self._reader.join(GUARD_S)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


StartService = Callable[..., ServiceProcess]


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    started: list[ServiceProcess] = []

    def start(*flags: str, module: str = "service") -> ServiceProcess:
        service = ServiceProcess(tmp_path / "data", *flags, module=module)
        started.append(service)
        return service

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.kill()
        service.end()


Connect = Callable[[ServiceProcess], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def to(service: ServiceProcess) -> Client:
            client = stack.enter_context(Client(service.address, timeout_s=GUARD_S))
            client.wait_ready(timeout_s=GUARD_S)
            return client

        yield to


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One for all tests that need no other: what trainers export and compute is kept for them all.

    Its models and jobs are everybody's, so each test names its own. Precision and threads
    are the defaults.
    """
    service = ServiceProcess(
        tmp_path_factory.mktemp("shared") / "data", "--precision=auto", "--trainer-threads=0"
    )
    try:
        yield service
    finally:
        assert service.end() == 0


@pytest.fixture(scope="package")
def client(shared: ServiceProcess) -> Iterator[Client]:
    """Of the shared service."""
    with Client(shared.address, timeout_s=GUARD_S) as client:
        client.wait_ready(timeout_s=GUARD_S)
        yield client


def register_small(client: Client, folder: Path, width: int = 64) -> str:
    """Registers a backbone of few weights, which tells digits apart; returns its name.

    For jobs whose backbone is of no account: they need no torch.
    """
    file = write(folder / "small.onnx", layered(width))
    return client.register_backbone(file, "small", size=SIZE, mean=MEAN, std=STD).name


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real scans: handwritten digits 0 to 3, 20 of each, as PNG files in a folder per class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    data = load_digits(n_class=4)
    for number, (scan, digit) in enumerate(zip(data.images, data.target, strict=True)):
        folder = root / str(digit)
        folder.mkdir(exist_ok=True)
        if len(list(folder.iterdir())) < 20:
            ink = Image.fromarray((255 - scan * (255 / 16)).astype("uint8"))
            ink.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root
