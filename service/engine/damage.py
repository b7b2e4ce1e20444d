"""Files of versions that are not what was published: found when they are read, and remembered.

Every file of a backbone or head is read through `read`, which compares its digest.
What was found is kept until the file is seen whole: a call for it is refused
without reading it again, unless it changed on disk or a minute passed. `Damages`
lives on the event loop, but for what looks at files, which may wait for a disk.
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

_LOOK_AGAIN_S = 60.0
"""Also where nothing changed: a disk may fail for a while."""
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}
"""What says nothing of the file."""
_WHAT_TO_DO = "put its file back from a backup, or publish the version again"

Look = tuple[int, int, int, int] | None
"""Of a file: inode, bytes, when its content and when anything of it changed; None where none is."""

log = logging.getLogger(__name__)


def read(path: Path, digest: str, kind: str) -> bytes:
    """The content of a backbone's or head's file, whose sha256 is `digest` where one is given.

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
        if error.errno in _PASSING:
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
    """The error of a backbone or head that cannot be used."""
    return Damaged(Reason.MODEL_UNLOADABLE, f"the version's {kind} {what}; {_WHAT_TO_DO}")


@dataclass(frozen=True)
class _Found:
    kind: str
    error: Damaged
    look: Look
    until: float
    """When to look again, of the clock."""


@dataclass(eq=False)
class Watch:
    """Held over a load: what is damaged and forgotten by then was deleted meanwhile."""

    forgotten: set[Path] = field(default_factory=set)


class Damages:
    """What was found, by file."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._gauge = metrics.damaged
        self._clock = clock
        self._found: dict[Path, _Found] = {}
        self._watches: list[Watch] = []

    def check(self, path: Path) -> Look:
        """How the file looks now; raises Damaged where it is known not to be whole as it is.

        For a thread: a network's folder may answer late, or never.
        """
        look = look_at(path)
        found = self._found.get(path)
        if found is not None and found.look == look and self._clock() < found.until:
            # A new one, or every raise would lengthen its trace.
            raise Damaged(found.error.reason, found.error.message)
        return look

    def watch(self) -> "Watch":
        """Begins to see which files are forgotten, until `unwatch`."""
        watch = Watch()
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: "Watch") -> None:
        """Ends it."""
        self._watches.remove(watch)

    def of(self, paths: Iterable[Path]) -> str:
        """What was found of these files when they were last read; "" for nothing."""
        return "; ".join(self._found[path].error.message for path in paths if path in self._found)

    def note(self, kind: str, path: Path, look: Look, error: Damaged) -> None:
        """Remembers what was found in a file that looked like `look` before it was read."""
        known = self._found.get(path)
        self._found[path] = _Found(kind, error, look, self._clock() + _LOOK_AGAIN_S)
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
        """Says that the file was seen whole."""
        if self._drop(path):
            log.info("a file that was damaged is whole again", extra={"file": str(path)})

    def forget(self, paths: Collection[Path]) -> None:
        """For files that are deleted."""
        for watch in self._watches:
            watch.forgotten.update(paths)
        for path in paths:
            self._drop(path)

    def _drop(self, path: Path) -> bool:
        found = self._found.pop(path, None)
        if found is not None:
            self._gauge.labels(found.kind).dec()
        return found is not None


def look_at(path: Path) -> Look:
    """What tells whether a file is another one, or was written to."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns
