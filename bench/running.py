"""A service of its own for a measurement."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Running:
    """Where it listens, and what it is."""

    address: str
    metrics_url: str
    pid: int


@contextlib.contextmanager
def service(data_dir: Path, *flags: str) -> Iterator[Running]:
    """Runs `python -m service` on free ports; its log goes to `data_dir`/service.log."""
    command = [sys.executable, "-m", "service", "--port=0", "--metrics-port=0"]
    data_dir.mkdir(parents=True, exist_ok=True)
    log_file = data_dir / "service.log"
    with log_file.open("w") as log:
        process = subprocess.Popen([*command, f"--data-dir={data_dir}", *flags], stderr=log)
        try:
            entry = _serving(log_file, process)
            yield Running(
                f"127.0.0.1:{entry['port']}",
                f"http://127.0.0.1:{entry['metrics_port']}/metrics",
                process.pid,
            )
        finally:
            process.terminate()
            process.wait(60)


def _serving(log_file: Path, process: "subprocess.Popen[bytes]") -> dict[str, int]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log_file.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry: dict[str, int] = json.loads(line)
                if entry.get("message") == "serving":
                    return entry
        time.sleep(0.02)
    sys.exit("the service did not start:\n" + log_file.read_text())
