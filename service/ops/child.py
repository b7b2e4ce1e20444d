"""Starts, bounds and ends processes of their own: for what strangers sent, or what may fail.

Both sides of the pipe: the server starts a module, sends it a task as one line, and reads
its records, a line each; the process bounds itself before it does anything else, and ends
when nobody waits any more. Trainers, which `service.jobs` starts, get their environment and
their first bounds from here, too. Knows nothing of what is read.
"""

import ctypes
import os
import resource
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from service.ops import failpoints

POLL_S = 0.2
CPU_ABOVE_S = 10
"""Between the soft limit on processor time, of which the system says that it was reached, and
the hard one, at which it kills and does not say why."""
_PR_SET_NO_NEW_PRIVS = 38
_CHUNK_BYTES = 2**16
_LAST_WORDS_BYTES = 2000

Process = subprocess.Popen[bytes]
T = TypeVar("T", bound=msgspec.Struct)


FURTHER_VARIABLE = "GRAFT_PASS_ENVIRONMENT"
"""The environment variable of the setting that names further ones for children."""
_PASSED = (
    # The system's.
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_*", "TZ", "TZDIR", "TMPDIR", "XDG_*",
    # Loaders, allocators and interpreters.
    "LD_LIBRARY_PATH", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_*", "PYTHON*", "VIRTUAL_ENV",
    # Libraries that compute.
    "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "NUMEXPR_*", "ONEDNN_*", "DNNL_*",
    "ORT_*", "OV_*", "OPENVINO_*", "ATEN_*", "TORCH_*", "PYTORCH_*", "MPLCONFIGDIR",
    "CUDA_*", "CUDNN_*", "CUBLAS_*", "NVIDIA_*", "NCCL_*",
)  # fmt: skip
_PASSED_TO_DOWNLOAD = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_*", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_*",
)  # fmt: skip
"""For trainers, which download weights. Readers connect to nobody."""


def environment_of(environment: Mapping[str, str], *, may_download: bool = False) -> dict[str, str]:
    """Returns what a child gets of the server's environment: variables that are known by name.

    Others may hold secrets of the operator's. FURTHER_VARIABLE names further ones, separated by
    commas; a name that ends with * stands for all that begin so. The server's own settings are
    never passed on, but for failpoints.
    """
    further = environment.get(FURTHER_VARIABLE, "").split(",")
    names = (*_PASSED, *(_PASSED_TO_DOWNLOAD if may_download else ()), *map(str.strip, further))
    starts = tuple(name[:-1] for name in names if name.endswith("*"))
    kept = {
        key: value
        for key, value in environment.items()
        if (key in names or key.startswith(starts)) and not key.startswith("GRAFT_")
    }
    if plan := environment.get(failpoints.VARIABLE):
        kept[failpoints.VARIABLE] = plan
    return kept


@contextmanager
def started(
    module: str, task: msgspec.Struct, environment: Mapping[str, str], work: Path | str
) -> Iterator[tuple[Process, IO[bytes]]]:
    """Starts `python -m MODULE` on a task; yields the process and the file of what it prints.

    It is killed at the end, whatever it is at.
    """
    with (
        tempfile.TemporaryFile(dir=work) as printed,
        subprocess.Popen(
            # Not from the folder that the server was started in.
            (sys.executable, "-P", "-m", module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        try:
            # One that died at once is noticed when it sends no record.
            with suppress(BrokenPipeError):
                process.stdin.write(msgspec.json.encode(task) + b"\n")
                process.stdin.flush()
            yield process, printed
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()


def lines(process: Process, go_on: Callable[[], None]) -> Iterator[bytes]:
    """Yields the lines that a process sends, to its end; ends with what `go_on` raises."""
    assert process.stdout is not None
    handle = process.stdout.fileno()
    waiting = b""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    while True:
        go_on()
        if not poll.poll(POLL_S * 1000):
            continue
        chunk = os.read(handle, _CHUNK_BYTES)
        if not chunk:
            return
        *whole, waiting = (waiting + chunk).split(b"\n")
        yield from whole


def last_words(printed: IO[bytes]) -> str:
    """Returns the end of what a process printed."""
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
    return printed.read().decode(errors="replace")


def take_task(kind: type[T]) -> T:
    """Reads the task of this process from its standard input, whose end ends the process."""
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return task


def _end_with_parent() -> None:
    # Not by `sys.stdin`, whose lock would be held when the interpreter ends.
    while os.read(0, 4096):
        pass
    os._exit(1)


def bound(
    *, memory_bytes: int, cpu_s: int, file_bytes: int, niceness: int, cpu_above_s: int = CPU_ABOVE_S
) -> None:
    """Bounds what this process may use, of address space, processor time and written files."""
    confine()
    limit_files(file_bytes)
    niceness = max(niceness, os.getpriority(os.PRIO_PROCESS, 0))
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    for kind, most, above in (
        (resource.RLIMIT_AS, memory_bytes, 0),
        (resource.RLIMIT_CPU, cpu_s, cpu_above_s),
        (resource.RLIMIT_NOFILE, 256, 0),
    ):
        _lower(kind, most, above)


def confine() -> None:
    """Keeps this process from gaining rights, and from dumping its memory into a file.

    There is no bound on processes, which the kernel counts by user and not by process: the
    server's own threads would count.
    """
    # Where the kernel refuses, a container's runtime or nothing does it.
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _lower(resource.RLIMIT_CORE, 0)


def limit_files(size_bytes: int) -> None:
    """Limits the size of each file that this process writes."""
    _lower(resource.RLIMIT_FSIZE, size_bytes)


def _lower(kind: int, most: int, above: int = 0) -> None:
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY:
        hard = most + above
    resource.setrlimit(kind, (min(most, hard), min(most + above, hard)))


def send(record: msgspec.Struct) -> None:
    """Sends a record to the server."""
    sys.stdout.buffer.write(msgspec.json.encode(record) + b"\n")
    sys.stdout.buffer.flush()
