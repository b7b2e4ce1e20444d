"""Trainers that wait for their job with everything imported, so that no job waits for it.

A launcher around `ProcessLauncher`: each job still gets a process of its own, and
where no warm one is ready, a cold one. A warm process is `python -m trainer wait`;
it reads one line, an `Order`, from its standard input and goes on as `run` does.
When its job is over, or has gone on for some seconds, those that are missing are
started: their imports would slow the job that they were started behind. Stops with
`close`.
"""

import asyncio
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

from service import contract
from service.contract import JobSpec, Order, Spec
from service.jobs.launchers.process import (
    KILLED_S,
    MAX_LINE_BYTES,
    TMPDIR,
    ProcessLauncher,
    ProcessTrainer,
    kill_group,
    lower_priority,
    name_of,
    temporary_files_in,
    write_spec,
)

REFILL_S = 5.0
"""How long the next warm trainer waits for the job before it to end."""

log = logging.getLogger(__name__)


class WarmLauncher:
    """Keeps `count` trainers warm."""

    def __init__(
        self,
        environment: Mapping[str, str],
        count: int,
        command: Sequence[str] = (sys.executable, "-m", "trainer", "wait"),
        cold: ProcessLauncher | None = None,
        refill_s: float = REFILL_S,
    ) -> None:
        self._cold = cold or ProcessLauncher(environment)
        self._environment = self._cold.environment
        self._count = count
        self._command = tuple(command)
        self._refill_s = refill_s
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
        if self._waiting:
            # Before one is taken, which a full disk would leave to nobody.
            spec_file, log_file = await asyncio.to_thread(write_spec, spec, folder)
        while self._waiting and not self._closing.is_set():
            waiting = self._waiting.pop(0)
            own = temporary_files_in(self._environment, folder)
            if await waiting.take(_order(spec, spec_file, log_file, own.get(TMPDIR, ""))):
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
                {over, closing}, timeout=self._refill_s, return_when=asyncio.FIRST_COMPLETED
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
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=printed,
                # It has no job's folder yet.
                env={
                    **temporary_files_in(self._environment, Path(tempfile.gettempdir())),
                    **self._environment,
                },
                start_new_session=True,
                limit=MAX_LINE_BYTES,
            )
        except BaseException:
            printed.close()
            raise
        lower_priority(process.pid, self._cold.niceness)
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


def _order(spec: Spec, spec_file: Path, log_file: Path, tmp_dir: str) -> Order:
    command: Literal["run", "rank"] = "run" if isinstance(spec, JobSpec) else "rank"
    return Order(command=command, spec=str(spec_file), log=str(log_file), tmp_dir=tmp_dir)
