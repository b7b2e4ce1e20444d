"""One data folder, and the servers that come and go on it; what must hold after any of them died.

Trainers are the stand-in of this folder unless a test asks for real ones.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import graftml
import psutil
import pytest
from graftml.retry import NO_RETRY

from service import fsck
from tests.e2e.conftest import GUARD_S, Ended, ServiceProcess

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FLAGS = (
    "--warm-trainers=0", "--provider=cpu", "--precision=fp32", "--max-batch=1", "--threads=1",
    "--pass-environment=STAND_IN_*,POWER_CUT_*",
)  # fmt: skip


class House:
    """A data folder with at most one server on it."""

    def __init__(self, folder: Path, parts: Path | None = None) -> None:
        self.data_dir = folder / "data"
        self._folder = folder
        # None: real trainers.
        self._parts = parts
        self._server: ServiceProcess | None = None
        self._client: graftml.Client | None = None
        self._armed: list[Path] = []
        self.said_last: Sequence[str] = ()
        """The log of the server that `ended`."""
        self.prefix: Sequence[str] = ()
        """What the server's command is given to."""

    @property
    def server(self) -> ServiceProcess:
        assert self._server is not None, "start comes first"
        return self._server

    def start(self, plan: str = "", *flags: str) -> graftml.Client:
        """A server with these faults, and a client that never asks twice."""
        self.start_unready(plan, *flags)
        self._client = graftml.Client(self.server.address, timeout_s=GUARD_S, retry=NO_RETRY)
        return self._client

    def start_unready(self, plan: str, *flags: str) -> None:
        """A server that may die as soon as it serves."""
        self._server = self._started(plan, flags)

    def dies_at_start(self, plan: str) -> None:
        """A server with these faults is killed before it serves."""
        with pytest.raises(Ended) as ended:
            self._server = self._started(plan, ())
        assert "failpoints are armed" in str(ended.value)
        assert "cannot serve" not in str(ended.value)
        self._left()

    def died(self) -> None:
        """Waits for the server's death by its fault; what it left must be whole, nobody's alive."""
        server, self._server = self.server, None
        try:
            code = server.process.wait(GUARD_S)
        finally:
            server.process.kill()
            server.end()
        assert code == -signal.SIGKILL, "".join(server.seen)
        self._left()
        assert fsck.problems(self.data_dir) == []

    def kill(self) -> None:
        """Kills the server between two calls, wherever it is."""
        self.server.process.kill()
        self.died()

    def is_sound(self) -> None:
        """All is at rest and whole: then the server is killed, which must change nothing."""
        wait_until(lambda: self._unsound() == [], lambda: "\n".join(self._unsound()))
        self.kill()
        assert self._unsound() == []

    def said(self, text: str) -> None:
        """Waits for a text in the server's log, which arrives here after what it tells of."""
        wait_until(lambda: text in "".join(self.server.seen), lambda: "".join(self.server.seen))

    def stop(self) -> None:
        """Tells the server to stop, and waits until it has."""
        server, self._server = self.server, None
        server.process.terminate()
        try:
            code = server.process.wait(GUARD_S)
        finally:
            server.process.kill()
            server.end()
        assert code == 0, "".join(server.seen)
        self._left()

    def ended(self, code: int) -> None:
        """Waits for the server to end by itself, with this exit code."""
        server, self._server = self.server, None
        try:
            found = server.process.wait(GUARD_S)
        finally:
            server.process.kill()
            server.end()
        self.said_last = server.seen
        assert found == code, "".join(server.seen)

    def close(self) -> None:
        """Ends what is left, however the test ended."""
        if self._client is not None:
            self._client.close()
        if self._server is not None:
            self._server.process.kill()
            self._server.end()
        for process in self.trainers():
            process.kill()

    def trainers(self) -> list[psutil.Process]:
        """Processes that work for this data folder, whoever started them."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _unsound(self) -> list[str]:
        # Blobs that nothing needs are the collector's, hours later. A job that is still being
        # cancelled has its folder by right, and would leave it if the server were killed now.
        left = [path.name for path in (self.data_dir / "work" / "jobs").glob("*")]
        return fsck.problems(self.data_dir) + [f"{name} has a folder" for name in left]

    def _is_ours(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            own = self._server is not None and process.pid == self._server.process.pid
            return not own and process.environ().get("STAND_IN_HOUSE") == str(self._folder)
        return False

    def _left(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        _, alive = psutil.wait_procs(self.trainers(), timeout=GUARD_S)
        assert not alive, "a trainer outlives its server"
        idle = [file.name for file in self._armed if not file.exists()]
        assert not idle, f"faults that never acted: {idle}"

    def _telling(self, plan: str) -> str:
        """The plan with a file for each fault, which says afterwards that it acted."""
        folder = self._folder / "acted"
        folder.mkdir(parents=True, exist_ok=True)
        told, self._armed = [], []
        for fault in filter(None, plan.split(";")):
            # Tests with files of their own look at them; a number drawn by lot may be too high.
            if "!" in fault or "@*" in fault:
                told.append(fault)
                continue
            file = folder / fault
            # An earlier server's.
            file.unlink(missing_ok=True)
            self._armed.append(file)
            told.append(f"{fault}!{file}")
        return ";".join(told)

    def _started(self, plan: str, flags: Sequence[str]) -> ServiceProcess:
        told = self._telling(plan)
        armed = [f"--failpoints={told}"] if told else []
        return ServiceProcess(
            self.data_dir,
            *FLAGS,
            *armed,
            *flags,
            prefix=self.prefix,
            # Elsewhere, since `-m` looks first where it is started.
            cwd=self._folder,
            environment=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(ROOT), "STAND_IN_HOUSE": str(self._folder)}
        if self._parts is None:
            return own
        return {
            **own,
            "PYTHONPATH": f"{HERE / 'stand_in'}:{ROOT}",
            "STAND_IN_ROOT": str(ROOT),
            "STAND_IN_PARTS": str(self._parts),
        }


@contextmanager
def until_death() -> Iterator[None]:
    """For calls in the middle of which the server dies, and then the client is closed."""
    with suppress(graftml.errors.Unavailable, graftml.errors.Cancelled):
        yield


@contextmanager
def asked(client: graftml.Client, image: Path, model: str, label: str) -> Iterator[list[str]]:
    """Asks a model all the while; every question must be answered with this label."""
    answers: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        is_last = False
        while not is_last:
            # Now and then, since a busy server takes the cores from its trainers; and at the end.
            is_last = is_over.wait(0.1)
            try:
                [answer] = client.predict(image, model=model)
                answers.append(answer.label)
            except Exception as error:
                answers.append(repr(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        # From here on it is under way, however late the thread began.
        wait_until(lambda: bool(answers))
        yield answers
    finally:
        is_over.set()
        asking.join()
    wrong = [answer for answer in answers if answer != label]
    assert not wrong, f"{len(wrong)} of {len(answers)}, such as {wrong[0]}"


def wait_until(holds: Callable[[], bool], why_not: Callable[[], str] = str) -> None:
    """Waits for what nobody gives notice of."""
    deadline = time.monotonic() + GUARD_S
    while not holds():
        assert time.monotonic() < deadline, why_not()
        time.sleep(0.02)
