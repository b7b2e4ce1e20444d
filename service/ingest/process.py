"""Starts readers: a process for each dataset, with limits on what it may use.

What a hostile file does to a decoder ends that process, and with it that dataset alone.
Knows no database. Blocks; may be used by many threads.
"""

import errno
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from service.domain import Count
from service.errors import Exhausted, InvalidInput, Reason, unusable_dataset
from service.ingest.names import shown
from service.ingest.reader import OnProgress, OverRoom, Read, ReadRequest, untold
from service.ops import child

CURRENT_FILE = "reading"
"""In the folder of a request: the names of the files that are being decoded."""
CURRENT_SLOT_BYTES = 512

MEMORY_BYTES = 2 * 2**30
"""Of address space, of which not all is used: the largest images take up to 1.3 GB."""
THREAD_MEMORY_BYTES = 2**29
"""More for each thread, which may decode an image that is not among the largest."""
CPU_S = 3600
"""Limit on processor time, of all threads together, for what is not an image's."""
FILE_CPU_S = 1
"""More of it for each file; the largest images take two, most a tenth."""
_MAX_READERS = 4


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The order to a reader's process."""

    request: ReadRequest
    threads: int
    niceness: int
    memory_bytes: int
    cpu_s: int
    file_cpu_s: int
    turn_file: str
    """Locked by the one reader that decodes an image of many pixels."""


class Progressed(msgspec.Struct, frozen=True, tag="progress"):
    """A record of how many of how many files are read."""

    done: Count
    total: Count


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """The last record of a reader that failed."""

    reason: Reason | None = None
    message: str = ""
    field: str = ""
    errno: int = 0
    """The system's error number, ENOMEM for memory; 0 where it is not at fault."""
    size_bytes: int = 0
    """Bytes that were unpacked when the room for them was used up; 0 otherwise."""


Record = Progressed | Read | Failed

_decoder = msgspec.json.Decoder(Record)


class ReaderProcesses:
    """Reads datasets in processes of their own, a few at once."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        threads: int,
        niceness: int = 0,
        memory_bytes: int | None = None,
        cpu_s: int = CPU_S,
        file_cpu_s: int = FILE_CPU_S,
    ) -> None:
        self._environment = child.environment_of(environment)
        self._threads = threads
        self._niceness = niceness
        self._memory_bytes = memory_bytes or MEMORY_BYTES + threads * THREAD_MEMORY_BYTES
        self._cpu_s, self._file_cpu_s = cpu_s, file_cpu_s
        self._turn_file = folder / "turn"
        self._reading: Counter[str] = Counter()
        self._ended = threading.Condition()

    def read(
        self,
        request: ReadRequest,
        go_on: Callable[[], None] = lambda: None,
        on_progress: OnProgress = untold,
    ) -> Read:
        """As `reader.read`; raises InvalidInput for a file that breaks a decoder, by name, too."""
        task = Task(
            request=request,
            threads=self._threads,
            niceness=self._niceness,
            memory_bytes=self._memory_bytes,
            cpu_s=self._cpu_s,
            file_cpu_s=self._file_cpu_s,
            turn_file=str(self._turn_file),
        )
        with (
            self._place(request.tenant, go_on),
            child.started("service.ingest", task, self._environment, request.work) as started,
        ):
            process, printed = started
            for line in child.lines(process, go_on):
                match _decoder.decode(line):
                    case Progressed(done, total):
                        on_progress(done, total)
                    case Read() as read:
                        return read
                    case Failed() as failed:
                        raise self._error(failed)
            raise self._death(process.wait(), request, printed)

    @contextmanager
    def _place(self, tenant: str, go_on: Callable[[], None]) -> Iterator[None]:
        """Waits for a place among the readers, of which one tenant has all but one at most."""
        with self._ended:
            while (
                self._reading.total() >= _MAX_READERS or self._reading[tenant] >= _MAX_READERS - 1
            ):
                self._ended.wait(child.POLL_S)
                go_on()
            self._reading[tenant] += 1
        try:
            yield
        finally:
            with self._ended:
                self._reading[tenant] -= 1
                self._ended.notify_all()

    def _error(self, failed: Failed) -> Exception:
        if failed.reason is not None:
            return InvalidInput(failed.reason, failed.message, field=failed.field)
        if failed.size_bytes:
            return OverRoom(failed.size_bytes)
        if failed.errno == errno.ENOMEM:
            return self._too_large("")
        return OSError(failed.errno, failed.message)

    def _death(self, code: int, request: ReadRequest, printed: IO[bytes]) -> Exception:
        at = _current(Path(request.work))
        if code == -signal.SIGXCPU:
            return unusable_dataset(
                f"reading the images took more processor time than so many may take{at}: send "
                "fewer or smaller images"
            )
        if code == -signal.SIGKILL:
            return self._too_large(at)
        if code < 0:
            name = signal.Signals(-code).name
            return unusable_dataset(
                f"the process that decodes images was ended by {name}{at}: a file breaks the "
                "decoder; remove it, or save it again in another format"
            )
        words = child.last_words(printed)
        return RuntimeError(f"the reader ended with code {code}; its last words:\n{words}")

    def _too_large(self, at: str) -> Exhausted:
        return Exhausted(
            Reason.OUT_OF_MEMORY,
            f"the process that decodes images ran out of memory{at}: send smaller images, or "
            "give the server more memory",
        )


def _current(work: Path) -> str:
    with suppress(OSError):
        data = (work / CURRENT_FILE).read_bytes()
        slots = (
            data[at : at + CURRENT_SLOT_BYTES] for at in range(0, len(data), CURRENT_SLOT_BYTES)
        )
        names = [slot.rstrip(b"\0").decode(errors="replace") for slot in slots]
        if named := [shown(name) for name in names if name]:
            return f" at {' or '.join(named)}"
    return ""
