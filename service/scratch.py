"""Chooses where this process, its libraries and its trainers put temporary files.

`TMPDIR` names the folder, which must be writable. Without it temporary files lie in the
data folder, which always is: a container's other file systems are often read-only. Those
of a trainer are then deleted with its job's folder. Files that a killed process left are
removed at the next start.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from service.config import BadConfig

VARIABLE = "TMPDIR"

log = logging.getLogger(__name__)


def use(data_dir: Path, environment: Mapping[str, str]) -> None:
    """Sets where this process's temporary files go; raises BadConfig for a bad `TMPDIR`.

    Makes no folder yet: `prepare` does, once this process holds the data folder.
    """
    if given := environment.get(VARIABLE):
        try:
            with tempfile.TemporaryFile(dir=given):
                return
        except OSError as error:
            raise BadConfig(
                f"{VARIABLE} is {given!r}, where no temporary file can be written "
                f"({error.strerror}): name a folder that can be, or unset it to have them in the "
                "data folder"
            ) from None
    # SQLite reads the environment variable.
    os.environ[VARIABLE] = tempfile.tempdir = str(_folder(data_dir))


def prepare(data_dir: Path) -> None:
    """Makes the folder in the data folder, and removes an earlier process's files."""
    folder = _folder(data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        left = list(folder.iterdir())
    except OSError:
        # Models can be served without temporary files, such as on a full disk.
        log.exception("the folder for temporary files cannot be made or listed")
        return
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _folder(data_dir: Path) -> Path:
    return data_dir.resolve() / "tmp"
