"""The server that is soaked: who may call it, its trainers and their kills, its log."""

import contextlib
import hashlib
import json
import random
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from graftml import NO_RETRY, Client

from bench.running import Running, anonymous_mib
from bench.soak.book import Book
from service.contract import MANIFEST_FILE

_WORK_LOG = re.compile(r"\bwork/jobs/([^/]+)/")
_CRASHED = "the trainer crashed"
_DIED = "a waiting trainer had died"
_LOOKS = 300
_LOOK_EVERY_S = 0.05
_SETTLED = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True)
class Tenant:
    """One that calls."""

    name: str
    token: str
    """May do everything that is its tenant's."""
    reader: str
    """May only predict."""

    def client(self, address: str) -> Client:
        """Connects; repeats nothing."""
        return Client(address, token=self.token, retry=NO_RETRY, timeout_s=60)

    def label(self, name: str) -> str:
        """Names a class of this tenant's alone: an answer says whose model gave it."""
        return f"{self.name}-{name}"

    def owns(self, labels: Iterable[str]) -> bool:
        """Whether there are labels, and all are its own."""
        found = list(labels)
        return bool(found) and all(each.startswith(f"{self.name}-") for each in found)


def write_access(path: Path, names: list[str]) -> list[Tenant]:
    """Writes an access file for new tenants, each with a token for all and one for predicting."""
    lines: list[str] = []
    tenants = []
    for name in names:
        lines.append(f"[tenants.{name}]\nconcurrent_jobs = 100\nstored_mb = 4096\n")
        made = []
        for role in ("admin", "predict"):
            secret = secrets.token_urlsafe(32)
            made.append(f"graft_{name}-{role}_{secret}")
            lines.append(
                f'[[tokens]]\nid = "{name}-{role}"\ntenant = "{name}"\nroles = ["{role}"]\n'
                f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'
            )
        tenants.append(Tenant(name, *made))
    path.touch(mode=0o600)
    path.write_text("\n".join(lines))
    return tenants


@dataclass(frozen=True)
class Sample:
    """What the server takes at one moment."""

    at_s: float
    mib: float
    """Its own memory: that of files which it maps goes up and down with the trainers."""
    descriptors: int
    threads: int


def watch(running: Running, book: Book, stop: threading.Event, samples: list[Sample]) -> None:
    """Takes a sample a second, and a last one at the end."""
    process = psutil.Process(running.pid)
    with book.at_work("the watch over the server"):
        while True:
            is_last = stop.wait(1.0)
            if running.process.poll() is not None:
                book.find("the server ended", "it must serve to the end")
                stop.set()
                return
            mib, threads = anonymous_mib(running.pid), process.num_threads()
            samples.append(Sample(book.now_s(), mib, process.num_fds(), threads))
            if is_last:
                return


class Killer:
    """Kills trainers at work, and notes which: nothing else excuses a crash."""

    def __init__(self, running: Running, data_dir: Path, book: Book, stop: threading.Event) -> None:
        self._server = psutil.Process(running.pid)
        self._jobs = data_dir / "work" / "jobs"
        self._book = book
        self._stop = stop

    def step(self) -> None:
        """Kills one, if there comes one at work whose job was not killed before."""
        for _ in range(_LOOKS):
            for trainer in self._server.children():
                job = _job_of(trainer)
                if self._book.may_kill(job):
                    self._stop.wait(random.uniform(0, 0.3))
                    self._kill(trainer, job)
                    return
            if self._stop.wait(_LOOK_EVERY_S):
                return

    def _kill(self, trainer: psutil.Process, job_id: str) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Nothing must change between the look and the kill.
            trainer.suspend()
            while (status := trainer.status()) not in _SETTLED:
                time.sleep(0.001)
            if status == psutil.STATUS_STOPPED and _job_of(trainer) == job_id:
                folder, job = self._jobs / job_id, self._book.jobs[job_id]
                job.had_result = not folder.is_dir() or (folder / "out" / MANIFEST_FILE).exists()
                job.is_killed = True
                trainer.kill()
            else:
                trainer.resume()


def _job_of(trainer: psutil.Process) -> str:
    # Where it prints tells what it works on; "" of one that waits.
    with contextlib.suppress(OSError):
        match = _WORK_LOG.search(str(Path(f"/proc/{trainer.pid}/fd/2").readlink()))
        return match[1] if match else ""
    return ""


def read_log(file: Path) -> tuple[Counter[str], Counter[str]]:
    """Reads complaints (messages from ERROR up, dead waiting trainers), and crashes by job."""
    complaints: Counter[str] = Counter()
    crashes: Counter[str] = Counter()
    for line in file.read_text(errors="replace").splitlines():
        entry: Any = None
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
        if not isinstance(entry, dict):
            entry = {"level": "ERROR", "message": line}
        message = str(entry.get("message", "")).partition("\n")[0][:200]
        if message.startswith(_CRASHED):
            crashes[str(entry.get("job_id", ""))] += 1
        elif entry.get("level") in ("ERROR", "CRITICAL") or message.startswith(_DIED):
            complaints[message] += 1
    return complaints, crashes
