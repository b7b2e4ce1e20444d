"""The server that is soaked: its process, its access file, its trainers, its log, its figures."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import psutil
from graftml import NO_RETRY, Client

from bench.running import serving
from service.contract import MANIFEST_FILE

DRAIN_TIMEOUT_S = 90.0
# A folder of the data folder, and in it one for each job.
_WORK_LOG = re.compile(r"\bwork/([^/]+)/")
_CRASHED = "the trainer crashed"
_DIED = "a waiting trainer had died"
_STATE = re.compile(r'^graft_jobs\{.*state="([A-Z]+)".*\} ([0-9.e+]+)', re.MULTILINE)


@dataclass(frozen=True)
class Door:
    """Where the server is called, and the certificate that both sides show; b"" without TLS."""

    address: str
    certificate: bytes = b""
    key: bytes = b""

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a channel; None for an insecure one."""
        if not self.certificate:
            return None
        return grpc.ssl_channel_credentials(self.certificate, self.key, self.certificate)

    def channel(self, max_message_bytes: int = 128 * 2**20) -> grpc.Channel:
        """A bare connection, for what the client would never send."""
        options = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self.credentials, options=options)


@dataclass(frozen=True)
class Crash:
    """A trainer that ended without a result, as the server's log tells it."""

    job_id: str
    at: float
    """The clock's time."""
    message: str


@dataclass(frozen=True)
class Tenant:
    """Who calls; without an access file there is one, who needs no tokens."""

    name: str
    token: str = ""
    """May do everything that is its tenant's."""
    reader: str = ""
    """May only predict."""

    def client(self, door: Door) -> Client:
        """A connection that may do everything; repeats nothing."""
        return Client(
            door.address, token=self.token or None, retry=NO_RETRY, timeout_s=60,
            credentials=door.credentials,
        )  # fmt: skip

    def label(self, name: str) -> str:
        """A class of this tenant's alone: an answer says whose model gave it."""
        return f"{self.name}-{name}"

    def owns(self, labels: Iterable[str]) -> bool:
        """Whether there are labels, and all are its own."""
        found = list(labels)
        return bool(found) and all(each.startswith(f"{self.name}-") for each in found)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """A token as metadata."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def write_access(path: Path, names: list[str]) -> list[Tenant]:
    """Writes an access file for new tenants, each with a token for all and one for predicting."""
    lines: list[str] = []
    tenants = []
    for name in names:
        lines.append(f"[tenants.{name}]\nconcurrent_jobs = 100\nstored_mb = 4096\n")
        made = {}
        for role in ("admin", "predict"):
            secret = secrets.token_urlsafe(32)
            made[role] = f"graft_{name}-{role}_{secret}"
            lines.append(
                f'[[tokens]]\nid = "{name}-{role}"\ntenant = "{name}"\nroles = ["{role}"]\n'
                f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'
            )
        tenants.append(Tenant(name, made["admin"], made["predict"]))
    path.touch(mode=0o600)
    path.write_text("\n".join(lines))
    return tenants


@dataclass(frozen=True)
class Figures:
    """What the server and its trainers take, at one moment."""

    pss_mib: float
    anonymous_mib: float
    descriptors: int
    threads: int
    trainers_mib: float
    trainers: int
    jobs: dict[str, int]


class Served:
    """One server, started when it is made."""

    def __init__(
        self,
        data_dir: Path,
        module: str,
        flags: list[str],
        certificate: bytes = b"",
        key: bytes = b"",
    ) -> None:
        self.data_dir = data_dir
        self.log_file = data_dir.parent / "service.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
        command = [sys.executable, "-m", module, "run", "--port=0", "--metrics-port=0"]
        with self.log_file.open("w") as log:
            # A session of its own: Ctrl-C is the soak's alone.
            self.process = subprocess.Popen(
                [*command, f"--data-dir={data_dir}", *flags],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        entry = serving(self.log_file, self.process)
        self.door = Door(f"127.0.0.1:{entry['port']}", certificate, key)
        self._metrics_url = f"http://127.0.0.1:{entry['metrics_port']}/metrics"
        self._known = psutil.Process(self.process.pid)

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def trainers(self) -> list[psutil.Process]:
        """Its trainers, those that wait too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return self._known.children()
        return []

    def has_result(self, job_id: str) -> bool:
        """Whether the files of the job's version are there, or were and are published."""
        folder = self.data_dir / "work" / "jobs" / job_id
        return not folder.is_dir() or (folder / "out" / MANIFEST_FILE).exists()

    def figures(self) -> Figures:
        """Looks at it; raises OSError or psutil.Error when it is gone."""
        memory = {}
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            memory[name] = float(rest.split()[0]) / 1024
        trainers_mib, trainers = 0.0, 0
        for trainer in self.trainers():
            with contextlib.suppress(psutil.Error):
                trainers_mib += trainer.memory_info().rss / 2**20
                trainers += 1
        with self._known.oneshot():
            descriptors, threads = self._known.num_fds(), self._known.num_threads()
        return Figures(
            memory["Pss"], memory["Anonymous"], descriptors, threads, trainers_mib, trainers,
            self._jobs(),
        )  # fmt: skip

    def cpu_s(self) -> float:
        """Processor time of it and its trainers, of those that ended too."""
        total = sum(self._known.cpu_times()[:4])
        for trainer in self.trainers():
            with contextlib.suppress(psutil.Error):
                total += sum(trainer.cpu_times()[:2])
        return float(total)

    def stored_mib(self) -> float:
        """What the data folder takes."""
        total = 0
        for folder, _, names in os.walk(self.data_dir):
            for name in names:
                with contextlib.suppress(OSError):
                    total += (Path(folder) / name).stat().st_size
        return total / 2**20

    def drain(self) -> tuple[int, float]:
        """Asks it to end; gives its exit code and the seconds it took, killing what does not."""
        begun = time.monotonic()
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(DRAIN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return code, time.monotonic() - begun

    def kill(self) -> None:
        """Ends it at once, where it has not ended."""
        if self.is_alive:
            self.process.kill()
            self.process.wait()

    def complaints(self) -> dict[str, int]:
        """Messages of its log from ERROR up, counted, but for crashes of trainers."""
        found: dict[str, int] = {}
        for entry in self._log():
            message = str(entry.get("message", entry)).partition("\n")[0][:200]
            if entry.get("level") in ("ERROR", "CRITICAL") and not message.startswith(_CRASHED):
                found[message] = found.get(message, 0) + 1
        return found

    def crashes(self) -> list[Crash]:
        """Trainers that crashed at work, in their order."""
        return [
            Crash(
                str(entry.get("job_id", "")),
                datetime.strptime(str(entry["time"]), "%Y-%m-%d %H:%M:%S,%f").timestamp(),
                str(entry["message"])[:1000],
            )
            for entry in self._log()
            if str(entry.get("message", "")).startswith(_CRASHED)
        ]

    def deaths(self) -> int:
        """How many waiting trainers were found dead by a job."""
        return sum(str(entry.get("message", "")).startswith(_DIED) for entry in self._log())

    def _log(self) -> Iterator[dict[str, Any]]:
        with self.log_file.open(errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict):
                        yield entry
                        continue
                yield {"level": "ERROR", "message": line}

    def _jobs(self) -> dict[str, int]:
        with urllib.request.urlopen(self._metrics_url, timeout=60) as answer:  # nosec B310 # our own server
            text = answer.read().decode()
        return {state: int(float(count)) for state, count in _STATE.findall(text)}


def job_of(trainer: psutil.Process) -> str:
    """The job or ranking that a trainer works on, by where it prints; "" for one that waits."""
    with contextlib.suppress(OSError):
        match = _WORK_LOG.search(str(Path(f"/proc/{trainer.pid}/fd/2").readlink()))
        return match[1] if match else ""
    return ""
