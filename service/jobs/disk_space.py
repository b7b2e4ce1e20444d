"""Tells whether the disk of the data folder lets a job begin.

A job that begins without room fails in a moment, and the next one after it, until none
is left. Knows no jobs.
"""

import logging
import os
from pathlib import Path

_MIB = 2**20

log = logging.getLogger(__name__)


class DiskSpace:
    """The disk that a folder is on."""

    def __init__(self, folder: Path, min_free_bytes: int) -> None:
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._why_not = ""

    def has_room(self) -> bool:
        """Tells whether it can be written and has so many free bytes; logs changes. Blocks."""
        why_not = self._what_is_wrong()
        if why_not and not self._why_not:
            log.error("no job is started: %s", why_not)
        elif self._why_not and not why_not:
            log.info("jobs are started again")
        self._why_not = why_not
        return not why_not

    def _what_is_wrong(self) -> str:
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return ""  # a job's attempt tells what is wrong
        if disk.f_flag & os.ST_RDONLY:
            return f"the disk of {self._folder} is read-only: make it writable"
        if (free := disk.f_bavail * disk.f_frsize) < self._min_free_bytes:
            return (
                f"the disk of {self._folder} has {free / _MIB:.4g} MB left, less than the "
                f"{self._min_free_bytes / _MIB:.4g} MB that a job needs at least: make room"
            )
        return ""
