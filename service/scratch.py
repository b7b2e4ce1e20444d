"""Temporary files: where this process, its libraries and its trainers put them.

`TMPDIR` says where, and has to be a folder that can be written. Without it they lie in
the data folder, the one place that surely can be: a container's other file systems are
often read-only. A trainer's then go with its job's folder. What a process that was
killed left there is removed at the next start.
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
    """Makes the folder for temporary files this process's; raises BadConfig for a bad `TMPDIR`."""
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
    folder = _folder(data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the database, which is beside it, says what is wrong with the data folder
    # SQLite reads the variable itself.
    os.environ[VARIABLE] = tempfile.tempdir = str(folder)


def sweep(data_dir: Path) -> None:
    """Removes what an earlier process left, once the data folder is this one's alone."""
    try:
        left = list(_folder(data_dir).iterdir())
    except FileNotFoundError:
        return
    except OSError:
        log.exception("what was left of temporary files cannot be seen")
        return
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _folder(data_dir: Path) -> Path:
    return data_dir.resolve() / "tmp"
