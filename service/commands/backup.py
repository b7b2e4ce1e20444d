"""`graft-server backup`: copies a data folder while a server works on it."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from service import settings
from service.commands import command

if TYPE_CHECKING:
    from service.backup import Copied

SETTINGS = ("data_dir", "blobs_dir")
_MIB = 2**20


def add(commands: command.Commands) -> None:
    """Adds the subcommand."""
    parser = command.add(
        commands,
        "backup",
        "copy the data folder, while a server works on it or not",
        execute,
        more="A backup that is there already is brought up to date: only what is new is copied, "
        "and it stays the backup that it was until all of that is there.",
        exit_codes="0 the backup is whole, 1 it is not, 2 a wrong setting",
    )
    parser.add_argument("target", type=Path, metavar="DEST", help="folder of the backup")
    settings.add_flags(parser, SETTINGS)


def execute(given: argparse.Namespace) -> int:
    """Makes the backup; returns the exit code."""
    config = settings.load_only(SETTINGS, vars(given), os.environ)
    from service import backup

    with command.private_files():
        try:
            copied = backup.back_up(config.data_dir, config.blobs_folder, given.target)
        except (backup.NoCopy, OSError) as error:
            raise command.Failed(f"the backup is not whole: {command.reason(error)}") from None
    print(f"{given.target} is a backup of {config.data_dir}: {summary(copied)}")
    return command.EXIT_OK


def summary(copied: "Copied") -> str:
    """Says what was copied, for people."""
    return (
        f"{copied.blobs} files of {copied.size_bytes / _MIB:.1f} MiB, {copied.new_blobs} of them "
        f"({copied.new_bytes / _MIB:.1f} MiB) copied now"
    )
