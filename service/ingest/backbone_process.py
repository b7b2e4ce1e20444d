"""Has files that are to be backbones checked: one at a time, in a process with limits.

What a hostile file does to a parser or a kernel ends that process alone. Knows no database.
Blocks; may be used by many threads.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from service.domain import Count
from service.errors import Exhausted, Expired, InvalidInput, Reason
from service.ops import child

MOST_FEATURES = 16_384
_CPU_S = 300
"""Processor time; the largest networks take some seconds for each of seven images."""
_CHECK_S = 900.0
"""Longest time, on a busy machine."""
_MEMORY_BYTES = 2**31
_MEMORY_FACTOR = 8
"""Address space that the process may have at all: so much, and for each byte of the file; what it
may take at each step is less (`backbone_check`)."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """How a file is to be used, as its caller describes it."""

    size: int
    """Side of the images, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of red, green and blue from 0 to 1."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    output: str = ""
    """The value that the features are; "" for the graph's one output."""

    @property
    def axes(self) -> tuple[int, int, int]:
        """Returns the shape of one image as the file takes it."""
        side = self.size
        return (3, side, side) if self.layout == "nchw" else (side, side, 3)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """The order to a process."""

    source: str
    target: str
    """Where the rewritten file goes."""
    asked: Asked
    file_bytes: int
    memory_bytes: int
    cpu_s: int
    niceness: int


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """The record of a file that serves: the rewritten one is written."""

    width: Count
    """Features of an image."""
    opset: Count


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """The record of a file that does not, or of a disk that is at fault."""

    reason: Reason | None = None
    message: str = ""
    errno: int = 0
    """The disk's error number; 0 where the disk is not at fault."""


_decoder = msgspec.json.Decoder(Checked | Failed)


class BackboneChecks:
    """Checks and rewrites files in processes of their own."""

    def __init__(
        self, environment: Mapping[str, str], *, niceness: int = 0, cpu_s: int = _CPU_S
    ) -> None:
        # One thread computes: what others would reserve counts as the file's.
        self._environment = child.environment_of(environment) | {"OPENBLAS_NUM_THREADS": "1"}
        self._niceness = niceness
        self._cpu_s = cpu_s
        self._turn = threading.Lock()

    def check(self, source: Path, target: Path, asked: Asked, go_on: Callable[[], None]) -> Checked:
        """Writes the form of `source` that serves to `target`; ends with what `go_on` raises.

        Raises InvalidInput (BACKBONE_UNUSABLE), Exhausted (OUT_OF_MEMORY), Expired, OSError.
        """
        size = source.stat().st_size
        task = Task(
            source=str(source),
            target=str(target),
            asked=asked,
            file_bytes=size,
            memory_bytes=_MEMORY_BYTES + _MEMORY_FACTOR * size,
            cpu_s=self._cpu_s,
            niceness=self._niceness,
        )
        module = "service.ingest.backbone_check"
        with (
            self._in_turn(go_on),
            child.started(module, task, self._environment, source.parent) as (process, printed),
        ):
            for line in child.lines(process, _within(_CHECK_S, go_on)):
                match _decoder.decode(line):
                    case Checked() as checked:
                        return checked
                    case Failed(reason=reason, message=message, errno=errno):
                        raise InvalidInput(reason, message) if reason else OSError(errno, message)
            raise self._death(process.wait(), child.last_words(printed))

    @contextmanager
    def _in_turn(self, go_on: Callable[[], None]) -> Iterator[None]:
        while not self._turn.acquire(timeout=child.POLL_S):
            go_on()
        try:
            yield
        finally:
            self._turn.release()

    def _death(self, code: int, words: str) -> Exception:
        if code == -signal.SIGXCPU:
            return unusable(
                f"checking it took more than {self._cpu_s} s of processor time: choose a smaller "
                "network, or smaller images"
            )
        if code == -signal.SIGKILL:
            return Exhausted(
                Reason.OUT_OF_MEMORY,
                "the process that checks the file ran out of memory: choose a smaller network, or "
                "give the server more memory",
            )
        if code < 0:
            return unusable(
                f"the process that checks it was ended by {signal.Signals(-code).name}: it breaks "
                "ONNX's parser or ONNX Runtime; export it again, with another opset perhaps"
            )
        return RuntimeError(f"the check ended with code {code}; its last words:\n{words}")


def unusable(what: str) -> InvalidInput:
    """Returns the refusal of a file."""
    return InvalidInput(Reason.BACKBONE_UNUSABLE, f"the file cannot serve as a backbone: {what}")


def _within(seconds: float, go_on: Callable[[], None]) -> Callable[[], None]:
    ends = time.monotonic() + seconds

    def check() -> None:
        go_on()
        if time.monotonic() > ends:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the file was not checked within {seconds:g} s: try again when the server has "
                "less to do, or choose a smaller network",
            )

    return check
