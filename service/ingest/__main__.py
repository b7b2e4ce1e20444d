"""`python -m service.ingest`: reads one dataset, in a process with limits.

Its standard input brings a `Task` as one line; when that input is closed nobody waits any
more, and the process ends. Its standard output has one JSON `Record` a line. The file
CURRENT_FILE names what is being decoded, a slot for each thread, so that a file that breaks
a decoder can be named.
"""

import errno
import fcntl
import mmap
import resource
import sys
import time
from pathlib import Path

from service.engine import preprocess
from service.errors import GraftError
from service.ingest import reader
from service.ingest.process import CURRENT_FILE, CURRENT_SLOT_BYTES, Failed, Progressed, Task
from service.ops import child, failpoints

_MANY_PIXELS = 16_000_000
"""Images with more are decoded one at a time, by all readers of a server together."""
_PROGRESS_S = 0.25


def main() -> int:
    """Reads the dataset of the task; returns the exit code."""
    task = child.take_task(Task)
    limits = task.request.limits
    child.bound(
        memory_bytes=task.memory_bytes,
        cpu_s=task.cpu_s,
        # Room for what is known once the files are counted.
        cpu_above_s=limits.max_files * task.file_cpu_s + child.CPU_ABOVE_S,
        file_bytes=limits.max_unpacked_bytes + 2**30,
        niceness=task.niceness,
    )
    try:
        child.send(
            reader.read(
                task.request,
                _Inspector(task).inspect,
                task.threads,
                on_progress=_Progress(task).tell,
            )
        )
    except reader.OverRoom as error:
        child.send(Failed(size_bytes=error.size_bytes))
    except GraftError as error:
        child.send(Failed(reason=error.reason, message=error.message, field=error.field))
    except OSError as error:
        child.send(Failed(errno=error.errno or 0, message=error.strerror or str(error)))
    except MemoryError:
        child.send(Failed(errno=errno.ENOMEM))
    except RuntimeError as error:
        # What Python says where there is no memory for a thread's stack.
        if "start new thread" not in str(error):
            raise
        child.send(Failed(errno=errno.ENOMEM))
    return 0


class _Inspector:
    """Decodes images, and notes which."""

    def __init__(self, task: Task) -> None:
        self._turn = Path(task.turn_file)
        work = Path(task.request.work)
        with (work / CURRENT_FILE).open("wb+") as file:
            # Written, since a hole that cannot be filled on a full disk ends the process.
            file.write(bytes(CURRENT_SLOT_BYTES * task.threads))
            file.flush()
            self._current = mmap.mmap(file.fileno(), 0)
        self._free = list(range(task.threads))

    def inspect(self, data: bytes, name: str) -> preprocess.ImageFacts:
        """Decodes an image; see `preprocess.inspect`."""
        slot = self._free.pop()
        try:
            self._note(slot, name)
            failpoints.reach("dataset.decoding")
            if not _has_many_pixels(data):
                return preprocess.inspect(data)
            with self._turn.open("wb") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX)
                return preprocess.inspect(data)
        finally:
            self._note(slot, "")
            self._free.append(slot)

    def _note(self, slot: int, name: str) -> None:
        at = slot * CURRENT_SLOT_BYTES
        data = name.encode(errors="replace")[:CURRENT_SLOT_BYTES]
        self._current[at : at + CURRENT_SLOT_BYTES] = data.ljust(CURRENT_SLOT_BYTES, b"\0")


def _has_many_pixels(data: bytes) -> bool:
    try:
        return preprocess.count_pixels(data) > _MANY_PIXELS
    except GraftError:
        return False  # the decoder says what is wrong with it


class _Progress:
    """Sends how far the reading is, a few times a second."""

    def __init__(self, task: Task) -> None:
        self._cpu_s, self._file_cpu_s = task.cpu_s, task.file_cpu_s
        self._sent_s = 0.0

    def tell(self, done: int, total: int) -> None:
        if not done:
            # Now that it is known how many files there are.
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            most = self._cpu_s + total * self._file_cpu_s
            resource.setrlimit(resource.RLIMIT_CPU, (min(most, hard - child.CPU_ABOVE_S), hard))
        now = time.monotonic()
        if now - self._sent_s >= _PROGRESS_S:
            self._sent_s = now
            child.send(Progressed(done, total))


if __name__ == "__main__":
    sys.exit(main())
