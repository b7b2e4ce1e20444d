"""Closes a data folder to all other users of the machine: what is stored is customers'.

What is made from now on is private by the process's umask, which `__main__` sets
and trainers inherit; what came in another way, as by a copy, is closed at the start.
"""

import logging
import stat
from pathlib import Path

_OTHERS = 0o077
"""The rights that nobody else has: folders are 0700, files 0600."""

# In the data folder's root, and what all else lies under.
_STORED = ("blobs", "cache", "tmp", "uploads", "work", "weights", "*.sqlite*")

log = logging.getLogger(__name__)


def close_to_others(data_dir: Path) -> None:
    """Takes the rights of others on what is stored there already; where it may not, it says so.

    The folder itself is left as it is: it may be a volume's root, or hold other things too.
    """
    for pattern in _STORED:
        for path in data_dir.glob(pattern):
            try:
                found = path.lstat().st_mode
                # What a link leads to may be for others too, such as a mirror of weights.
                if not stat.S_ISLNK(found) and found & _OTHERS:
                    path.chmod(stat.S_IMODE(found) & ~_OTHERS)
            except FileNotFoundError:
                continue  # SQLite's files come and go
            except OSError as error:
                log.warning(
                    "others on this machine may read %s, and its mode cannot be changed: %s",
                    path,
                    error,
                )
