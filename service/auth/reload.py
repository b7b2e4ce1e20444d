"""Values read from files and reloaded when the files change; the last good one stays in force."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from service.ops.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")


class BadFile(ValueError):  # noqa: N818
    """A file cannot be used; the message says which one, why and what to do."""


class Reloaded(Generic[T]):
    """The value of some files. `poll` is called by one thread at a time; any may read `value`."""

    def __init__(
        self, what: str, paths: Sequence[Path], read: Callable[[], T], metrics: Metrics
    ) -> None:
        """Reads the files with `read`, which raises BadFile; `what` is their label in metrics."""
        self._what, self._paths, self._read = what, paths, read
        self._metrics = metrics
        self._failing = metrics.reload_failing.labels(what)
        self._failing.set(0)
        self._seen = self._signature()
        self.value = read()
        self._problem = ""
        """Found by the last poll."""
        self._reported = ""

    def poll(self, *, is_stale: bool = False) -> bool:
        """Reads the files again if they changed; returns whether there is a new value.

        With `is_stale` it reads them in any case: the value depends on something
        else that may have changed. Raises nothing for files that cannot be used.
        """
        signature = self._signature()
        has_changed = signature != self._seen
        if not has_changed and not self._problem and not is_stale:
            return False
        try:
            value = self._read()
        except BadFile as error:
            self._seen = signature
            self._fail(str(error))
            return False
        if self._signature() != signature:
            # Written while it was read: the next poll reads it whole.
            return False
        self._seen = signature
        if not has_changed and not self._problem and value == self.value:
            return False
        self.value = value
        self._problem = self._reported = ""
        self._failing.set(0)
        self._metrics.reloads.labels(self._what, "ok").inc()
        return True

    def _fail(self, problem: str) -> None:
        # At the second poll: a file may be half written, or a key not yet renamed after its
        # certificate. Each problem once.
        is_confirmed, self._problem = problem == self._problem, problem
        if not is_confirmed or problem == self._reported:
            return
        self._reported = problem
        self._failing.set(1)
        self._metrics.reloads.labels(self._what, "failed").inc()
        log.error(
            "the new %s cannot be used, the one before stays in force: %s",
            self._what.replace("_", " "),
            problem,
        )

    def _signature(self) -> tuple[tuple[int, int, int, int] | None, ...]:
        return tuple(_of_file(path) for path in self._paths)


def _of_file(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
