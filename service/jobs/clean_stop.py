"""Remembers whether the last process was told to stop, on a full disk too.

A file beside the jobs' folder has one name while jobs may run and another after a
stop that somebody wanted: to rename it takes no room. A job that such a stop leaves
RUNNING did not make its process die.
"""

import logging
from contextlib import suppress
from pathlib import Path

from service.storage import durable

log = logging.getLogger(__name__)


class CleanStop:
    """The file in one data folder."""

    def __init__(self, folder: Path) -> None:
        self._serving = folder / "serving"
        self._stopped = folder / "stopped"

    def is_after_one(self) -> bool:
        """Whether the process before was told to stop; before `begin`."""
        return self._stopped.exists()

    def begin(self) -> None:
        """From here on a death is one. Raises Exhausted or Unavailable as the disk has it."""
        with durable.full_disk_told():
            try:
                self._stopped.rename(self._serving)
            except FileNotFoundError:
                self._serving.touch(mode=0o600)
            durable.sync_folder(self._serving.parent)

    def end(self) -> None:
        """The process is told to stop. Twice is harmless."""
        try:
            with suppress(FileNotFoundError):
                self._serving.rename(self._stopped)
        except OSError:
            log.exception("jobs that cannot be put back now count as crashed at the next start")
