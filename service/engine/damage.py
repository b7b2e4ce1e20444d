"""Remembers files of versions that are not what was published, once one was read.

Every file of a backbone or head is read through `read`, which compares its digest.
What was found is kept until the file was read whole: a call for it is refused
without reading it again, unless it changed on disk or a minute passed. `Damages`
lives on the event loop, but for `check` and `stamp_of`, which may wait for a disk.
"""

import errno
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import Damaged, Exhausted, Reason, Unavailable
from service.ops.metrics import Metrics

_READ_AGAIN_S = 60.0
"""Time after which an unchanged file is read again: a disk may fail for a while."""
_TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
"""Errors which do not mean that the file is damaged."""
_WHAT_TO_DO = "put its file back from a backup, or publish the version again"

FileStamp = tuple[int, int, int, int] | None
"""A file's inode, bytes, and times of its content's and of any change; None where none is."""

log = logging.getLogger(__name__)


def read(path: Path, digest: str, kind: str) -> bytes:
    """Reads a backbone's or head's file, whose sha256 is `digest` where one is given.

    Raises Damaged (MODEL_UNLOADABLE), Unavailable (STORAGE_BUSY) when the process has
    no more files to open, or Exhausted (OUT_OF_MEMORY).
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise unloadable(kind, "is missing") from error
    except MemoryError as error:
        raise Exhausted(
            Reason.OUT_OF_MEMORY, f"there is no memory to read the version's {kind}: try again"
        ) from error
    except OSError as error:
        if error.errno in _TRANSIENT:
            raise Unavailable(
                Reason.STORAGE_BUSY,
                f"the version's {kind} could not be read just now ({error.strerror}): try again",
                retry_after_s=1.0,
            ) from error
        raise unloadable(kind, f"cannot be read ({error.strerror})") from error
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise unloadable(kind, "is damaged: its content is not what was published")
    return data


def unloadable(kind: str, what: str) -> Damaged:
    """Makes the error of a backbone or head that cannot be used."""
    return Damaged(Reason.MODEL_UNLOADABLE, f"the version's {kind} {what}; {_WHAT_TO_DO}")


@dataclass(frozen=True)
class _Found:
    kind: str
    error: Damaged
    stamp: FileStamp
    until: float
    """Time from which the file is read again, by the clock."""


@dataclass(eq=False)
class Watch:
    """Records deletions during a load, so that a deleted file is not reported as damaged."""

    forgotten: set[Path] = field(default_factory=set)


class Damages:
    """Damaged files, by path."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._gauge = metrics.damaged
        self._clock = clock
        self._found: dict[Path, _Found] = {}
        self._watches: list[Watch] = []

    def check(self, path: Path) -> FileStamp:
        """Returns the file's stamp; raises Damaged where it is known to be damaged as it is.

        For a thread: a network's folder may answer late, or never.
        """
        stamp = stamp_of(path)
        found = self._found.get(path)
        if found is not None and found.stamp == stamp and self._clock() < found.until:
            # A new one, or every raise would lengthen its trace.
            raise Damaged(found.error.reason, found.error.message)
        return stamp

    def watch(self) -> "Watch":
        """Begins to record which files are forgotten, until `unwatch`."""
        watch = Watch()
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: "Watch") -> None:
        """Ends the recording."""
        self._watches.remove(watch)

    def of(self, paths: Iterable[Path]) -> str:
        """Describes what was found in these files when last read; "" for nothing."""
        return "; ".join(self._found[path].error.message for path in paths if path in self._found)

    def note(self, kind: str, path: Path, stamp: FileStamp, error: Damaged) -> None:
        """Remembers what was found in a file that had this stamp before it was read."""
        known = self._found.get(path)
        self._found[path] = _Found(kind, error, stamp, self._clock() + _READ_AGAIN_S)
        if known is None:
            self._gauge.labels(kind).inc()
        if known is None or known.error.message != error.message:
            log.error(
                "a version cannot be served: %s",
                error.message,
                exc_info=error.__cause__,
                extra={"file": str(path)},
            )

    def clear(self, path: Path) -> None:
        """Notes that the file was read whole."""
        if self._drop(path):
            log.info("a file that was damaged is whole again", extra={"file": str(path)})

    def forget(self, paths: Collection[Path]) -> None:
        """Drops files that were deleted."""
        for watch in self._watches:
            watch.forgotten.update(paths)
        for path in paths:
            self._drop(path)

    def _drop(self, path: Path) -> bool:
        found = self._found.pop(path, None)
        if found is not None:
            self._gauge.labels(found.kind).dec()
        return found is not None


def stamp_of(path: Path) -> FileStamp:
    """Reads what changes when a file is replaced or written to."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns
