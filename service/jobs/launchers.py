"""Starts trainers: one process each, records on its standard output.

The process gets a session of its own, so that it can be killed with whatever it
started, and a standard input whose closing tells it that its parent is gone. Of the
environment it gets what `service.ops.child` passes on: the job's spec says everything
else. Knows no jobs but their specs. `Trainer.stop` ends one for certain.

`ProcessLauncher` starts a process for each job. `WarmLauncher` keeps some that wait for their job
with everything imported, so that no job waits for it.
"""

import asyncio
import logging
import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

import msgspec

from service import contract
from service.contract import Command, ExportSpec, JobSpec, Order, RankSpec, Record, Spec
from service.jobs.uninterrupted import begun
from service.ops import child

SPEC_FILE = "spec.json"
LOG_FILE = "trainer.log"
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The variable that says which GPUs CUDA shows to a process; an empty one shows none."""
TMPDIR = "TMPDIR"
"""The variable that says where temporary files go."""
MAX_LINE_BYTES = 2**20
"""A record with 100 files that were left out and 10,000 classes fits."""
KILLED_S = 10.0
"""How long a killed process may take to be gone; longer means the kernel is stuck."""
REFILL_S = 20.0
"""How long the next warm trainer waits for the job before it to end."""

log = logging.getLogger(__name__)


class Gpus:
    """Shares the machine's GPUs out among trainers. Safe from any thread.

    `names` are as CUDA_VISIBLE_DEVICES has them, in CUDA's order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # The service itself computes on the first one: that is lent last.
        self._lent = dict.fromkeys([*names[1:], *names[:1]], 0)
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[str]:
        """Yields the name of the GPU with the fewest trainers; "" where there is none."""
        if not self._lent:
            yield ""
            return
        with self._lock:
            name = min(self._lent, key=self._lent.__getitem__)
            self._lent[name] += 1
        try:
            yield name
        finally:
            with self._lock:
                self._lent[name] -= 1


class Trainer(Protocol):
    """A trainer at work."""

    async def next_record(self) -> Record | None:
        """The next record; None when there will be no more."""

    async def wait(self) -> int:
        """The exit code; minus the signal's number when a signal ended it."""

    async def stop(self, grace_s: float) -> None:
        """Asks it to end, kills it and its children after `grace_s`. Harmless after its end."""

    def last_words(self) -> list[str]:
        """The last lines of what it printed that is not a record."""


class Launcher(Protocol):
    """Starts trainers."""

    async def start(self, spec: Spec, folder: Path) -> Trainer:
        """Starts one on a job or a ranking; `folder` is its own."""


async def start_held(launcher: Launcher, spec: Spec, folder: Path, stop_grace_s: float) -> Trainer:
    """Starts a trainer; one that was being started when the caller was cancelled is stopped."""
    # A process that nobody holds would go on for ever.
    return await begun(launcher.start(spec, folder), lambda trainer: trainer.stop(stop_grace_s))


def lower_priority(pid: int, niceness: int) -> None:
    """Has a trainer that was just started go behind whoever asks for answers."""
    # Nobody may raise a priority, and a server may have been started with a low one.
    niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, 0))
    # All threads of its group, which is its own; it may have ended already.
    with suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PGRP, pid, niceness)


def kill_group(process: asyncio.subprocess.Process) -> None:
    """Kills a process that leads a group of its own, and whatever it started in that group."""
    # A number is not given again while a group has it. So where a process that was waited for is
    # there again, no child of it is left, and the number is a stranger's.
    is_reused = process.returncode is not None and Path(f"/proc/{process.pid}").exists()
    if not is_reused:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


class ProcessLauncher:
    """Starts `python -m trainer COMMAND SPEC`."""

    def __init__(
        self,
        environment: Mapping[str, str],
        command: Sequence[str] = (sys.executable, "-m", "trainer"),
        niceness: int = 10,
    ) -> None:
        self._niceness = niceness
        self.environment = child.environment_of(environment, may_download=True)
        self._command = tuple(command)

    async def start(self, spec: Spec, folder: Path) -> "ProcessTrainer":
        """Starts one; raises OSError when the process cannot be had."""
        spec_file, log_file = await asyncio.to_thread(write_spec, spec, folder)
        command = (*self._command, command_of(spec), str(spec_file))
        with await asyncio.to_thread(log_file.open, "ab") as printed:
            process = await self.spawn(command, printed, folder, spec.gpu)
        return ProcessTrainer(process, log_file, name_of(spec, folder))

    async def spawn(
        self, command: Sequence[str], printed: IO[bytes], folder: Path, gpu: str
    ) -> asyncio.subprocess.Process:
        """Starts a trainer's process, whose temporary files lie in `folder`; raises OSError."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=printed,
            env={**temporary_files_in(self.environment, folder), **self.environment, VISIBLE: gpu},
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        lower_priority(process.pid, self._niceness)
        return process


class ProcessTrainer:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process, log_file: Path, job_id: str) -> None:
        self._process = process
        self._log_file = log_file
        self._job_id = job_id

    @property
    def pid(self) -> int:
        """Its process id, which is its group's too."""
        return self._process.pid

    async def next_record(self) -> Record | None:
        """See `Trainer`. A line that is not a record is logged and passed over."""
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:
                self._complain(f"a line of more than {MAX_LINE_BYTES} bytes")
                continue
            if not line:
                return None
            try:
                return contract.decode_record(line)
            except msgspec.DecodeError:
                self._complain(repr(line[:200]))

    async def wait(self) -> int:
        """See `Trainer`. What it still prints is thrown away."""
        assert self._process.stdout is not None
        # A full pipe would keep it from ending, and its end from being seen.
        while await self._process.stdout.read(MAX_LINE_BYTES):
            pass
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        gone = asyncio.create_task(self.wait())
        if self._process.returncode is None:
            # Not `terminate`: it may reap the process before asyncio does, and its code is lost.
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._exit()
        # Its children too, even when it ended by itself and left them.
        kill_group(self._process)
        try:
            async with asyncio.timeout(KILLED_S):
                await gone
        except TimeoutError:
            log.exception("the trainer could not be killed", extra={"job_id": self._job_id})

    def last_words(self) -> list[str]:
        """See `Trainer`; reads the end of a file."""
        with suppress(OSError), self._log_file.open("rb") as file:
            file.seek(max(0, self._log_file.stat().st_size - 8192))
            return list(deque(file.read().decode(errors="replace").splitlines(), maxlen=30))
        return []

    async def _exit(self) -> None:
        # asyncio's own wait goes on while a child of the trainer holds its output open.
        try:
            handle = os.pidfd_open(self._process.pid)
        except ProcessLookupError:
            return
        loop, is_over = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(handle, is_over.set)
        try:
            await is_over.wait()
        finally:
            loop.remove_reader(handle)
            os.close(handle)

    def _complain(self, what: str) -> None:
        log.warning("the trainer wrote %s, which is not a record", what,
                    extra={"job_id": self._job_id})  # fmt: skip


def temporary_files_in(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Has temporary files lie in a trainer's own folder, where the environment names none."""
    return {} if environment.get(TMPDIR) else {TMPDIR: str(folder)}


def name_of(spec: Spec, folder: Path) -> str:
    """What the log calls it: the job's id, or the ranking's folder."""
    return spec.job_id if isinstance(spec, JobSpec) else folder.name


def command_of(spec: Spec) -> Command:
    """Returns what a trainer is told to do with a spec."""
    commands: dict[type[Spec], Command] = {JobSpec: "run", RankSpec: "rank", ExportSpec: "export"}
    return commands[type(spec)]


def write_spec(spec: Spec, folder: Path) -> tuple[Path, Path]:
    """Writes what a trainer is to do into its folder; returns that file and the log's."""
    spec_file = folder / SPEC_FILE
    spec_file.write_bytes(contract.encode(spec))
    return spec_file, folder / LOG_FILE


class WarmLauncher:
    """Keeps `count` trainers warm.

    A launcher around `ProcessLauncher`: each job still gets a process of its own, and
    where no warm one is ready, a cold one. A warm process is `python -m trainer wait`;
    it reads one line, an `Order`, from its standard input and goes on as `run` does.
    When its job is over, or has gone on for some seconds, those that are missing are
    started: their imports would slow the job that they were started behind. Stops with
    `close`.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        count: int,
        command: Sequence[str] = (sys.executable, "-m", "trainer", "wait"),
        cold: ProcessLauncher | None = None,
    ) -> None:
        self._cold = cold or ProcessLauncher(environment)
        self._count = count
        self._command = tuple(command)
        self._waiting: list[_Waiting] = []
        self._starting = 0
        self._refills: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()

    async def open(self) -> None:
        """Starts the first ones; returns before they are warm."""
        await self._refill()

    async def close(self) -> None:
        """Ends those that wait; the ones at work are their jobs'."""
        self._closing.set()
        # Not cancelled: one that is starting a process would leave it to nobody.
        if self._refills:
            _, late = await asyncio.wait(self._refills, timeout=KILLED_S)
            if late:
                log.error("%d trainers were still being started to wait", len(late))
        while self._waiting:
            await self._waiting.pop().kill()

    async def start(self, spec: Spec, folder: Path) -> ProcessTrainer:
        """Gives the job to a warm trainer, or to a cold one; raises OSError when neither is had."""
        if isinstance(spec, ExportSpec):
            # Nobody waits for it, and a job may come meanwhile.
            return await self._cold.start(spec, folder)
        if self._waiting:
            # Before one is taken, which a full disk would leave to nobody.
            spec_file, log_file = await asyncio.to_thread(write_spec, spec, folder)
        while self._waiting and not self._closing.is_set():
            waiting = self._waiting.pop(0)
            own = temporary_files_in(self._cold.environment, folder)
            order = Order(
                command=command_of(spec),
                spec=str(spec_file),
                log=str(log_file),
                tmp_dir=own.get(TMPDIR, ""),
                gpu=spec.gpu,
            )
            if await waiting.take(order):
                self._refill_after(waiting.process)
                return ProcessTrainer(waiting.process, log_file, name_of(spec, folder))
            log.warning("a waiting trainer had died: %s", " | ".join(waiting.last_words()))
            await waiting.kill()
        trainer = await self._cold.start(spec, folder)
        if self._count and not self._refills:
            self._refill_after(None)
        return trainer

    @property
    def waiting(self) -> int:
        """How many wait for a job."""
        return len(self._waiting)

    def _refill_after(self, process: "asyncio.subprocess.Process | None") -> None:
        task = asyncio.create_task(self._refill_when_over(process), name="warm trainer")
        self._refills.add(task)
        task.add_done_callback(self._refills.discard)

    async def _refill_when_over(self, process: "asyncio.subprocess.Process | None") -> None:
        if process is not None:
            over = asyncio.create_task(process.wait())
            closing = asyncio.create_task(self._closing.wait())
            await asyncio.wait(
                {over, closing}, timeout=REFILL_S, return_when=asyncio.FIRST_COMPLETED
            )
            over.cancel()
            closing.cancel()
        await self._refill()

    async def _refill(self) -> None:
        while len(self._waiting) + self._starting < self._count and not self._closing.is_set():
            self._starting += 1
            try:
                waiting = await self._started()
            except OSError:
                # Jobs go on with cold ones, which say the same of themselves.
                log.exception("no trainer could be started to wait")
                return
            finally:
                self._starting -= 1
            if self._closing.is_set():
                # `close` may have gone on without it.
                await waiting.kill()
            else:
                self._waiting.append(waiting)

    async def _started(self) -> "_Waiting":
        printed = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        try:
            # It has no job's folder and GPU yet.
            folder = Path(tempfile.gettempdir())
            process = await self._cold.spawn(self._command, printed, folder, gpu="")
        except BaseException:
            printed.close()
            raise
        return _Waiting(process, printed)


class _Waiting:
    """A process that waits for its order."""

    def __init__(self, process: asyncio.subprocess.Process, printed: IO[bytes]) -> None:
        self.process = process
        self._printed = printed

    async def take(self, order: Order) -> bool:
        """Hands the job over; whether the process lived to take it."""
        assert self.process.stdin is not None
        if self.process.returncode is not None:
            return False
        try:
            self.process.stdin.write(contract.encode(order) + b"\n")
            await self.process.stdin.drain()
        except OSError:
            return False
        self._printed.close()
        return True

    def last_words(self) -> list[str]:
        """The last lines that it printed."""
        self._printed.seek(0)
        return self._printed.read()[-2000:].decode(errors="replace").splitlines()[-5:]

    async def kill(self) -> None:
        """Ends the process and whatever it started."""
        kill_group(self.process)
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(KILLED_S):
                await self.process.wait()
        except TimeoutError:
            log.exception("a waiting trainer could not be killed")
        self._printed.close()
