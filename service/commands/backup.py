"""`graft-server backup` and `restore`: copy a data folder while a server works on it, and back."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from service import settings
from service.commands import check, command

if TYPE_CHECKING:
    from service.backup import Copied

_SETTINGS = ("data_dir", "blobs_dir")
_MIB = 2**20


def add(commands: command.Commands) -> None:
    parser = command.add(
        commands,
        "backup",
        "copy the data folder, while a server works on it or not",
        back_up,
        more="A backup that is there already is brought up to date: only what is new is copied, "
        "and it stays the backup that it was until all of that is there.",
        exit_codes="0 the backup is whole, 1 it is not, 2 a wrong setting",
    )
    parser.add_argument("target", type=Path, metavar="DEST", help="folder of the backup")
    settings.add_flags(parser, _SETTINGS)
    restoring = command.add(
        commands,
        "restore",
        "make the data folder of a backup, and check it",
        restore,
        more="The data folder must be empty or not there, and no server may use it. Every file "
        "is compared with its digest; then `graft-server check` looks at what came of it.",
        exit_codes="0 restored, and no problems found; 1 not restored, or problems found; "
        "2 a wrong setting",
    )
    restoring.add_argument("source", type=Path, metavar="SRC", help="folder of the backup")
    settings.add_flags(restoring, _SETTINGS)


def back_up(given: argparse.Namespace) -> int:
    """Makes the backup; returns the exit code."""
    config = settings.load_only(_SETTINGS, vars(given), os.environ)
    from service import backup

    with _reported("the backup is not whole"):
        copied = backup.back_up(config.data_dir, config.blobs_folder, given.target)
    print(f"{given.target} is a backup of {config.data_dir}: {_summary(copied)}")
    return command.EXIT_OK


def restore(given: argparse.Namespace) -> int:
    """Restores and checks; returns the exit code."""
    config = settings.load_only(_SETTINGS, vars(given), os.environ)
    from service import backup

    with _reported("not restored"):
        copied = backup.restore(given.source, config.data_dir, config.blobs_folder)
    print(f"{given.source} is restored to {config.data_dir}: {_summary(copied)}")
    # The digests were looked at just now.
    return check.report(config.data_dir, config.blobs_folder, is_quick=True)


@contextmanager
def _reported(failure: str) -> Iterator[None]:
    """Ends the command where there is no whole copy; closes what is written to other users."""
    from service.backup import NoCopy

    before = os.umask(0o077)
    try:
        yield
    except (NoCopy, OSError) as error:
        raise command.Failed(f"{failure}: {command.reason(error)}") from None
    finally:
        os.umask(before)


def _summary(copied: "Copied") -> str:
    """Says what was copied, for people."""
    return (
        f"{copied.blobs} files of {copied.size_bytes / _MIB:.1f} MiB, {copied.new_blobs} of them "
        f"({copied.new_bytes / _MIB:.1f} MiB) copied now"
    )
