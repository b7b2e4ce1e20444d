"""Real processes: `python -m service` on free ports, with real trainers behind it."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from graft import Client

START_TIMEOUT_S = 30.0


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
    ) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
        command = [sys.executable, "-m", "service", "--port=0", "--metrics-port=0"]
        self.process = subprocess.Popen(
            [*prefix, *command, f"--data-dir={data_dir}", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**own, **(environment or {})},
            cwd=cwd,
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

    def wait_for(self, message: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """The next log line with this message."""
        while True:
            try:
                entry = self.lines.get(timeout=timeout_s)
            except queue.Empty:
                raise AssertionError("".join(self.seen)) from None
            if entry is None:
                raise Ended("".join(self.seen))
            if entry.get("message") == message:
                return entry

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
        code = self.process.wait(40)
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


StartService = Callable[..., ServiceProcess]


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[StartService]:
    started: list[ServiceProcess] = []

    def start(*flags: str, data_dir: Path | None = None) -> ServiceProcess:
        service = ServiceProcess(data_dir or tmp_path / "data", *flags)
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
            client = stack.enter_context(Client(service.address, timeout_s=30))
            client.wait_ready(timeout_s=START_TIMEOUT_S)
            return client

        yield to


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
