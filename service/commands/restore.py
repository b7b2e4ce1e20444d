"""`graft-server restore`: makes a data folder of a backup, and checks it."""

import argparse
import os
from pathlib import Path

from service import settings
from service.commands import check, command
from service.commands.backup import SETTINGS, summary


def add(commands: command.Commands) -> None:
    """Adds the subcommand."""
    parser = command.add(
        commands,
        "restore",
        "make the data folder of a backup, and check it",
        execute,
        more="The data folder must be empty or not there, and no server may use it. Every file "
        "is compared with its digest; then `graft-server check` looks at what came of it.",
        exit_codes="0 restored, and no problems found; 1 not restored, or problems found; "
        "2 a wrong setting",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the backup")
    settings.add_flags(parser, SETTINGS)


def execute(given: argparse.Namespace) -> int:
    """Restores and checks; returns the exit code."""
    config = settings.load_only(SETTINGS, vars(given), os.environ)
    from service import backup

    with command.private_files():
        try:
            copied = backup.restore(given.source, config.data_dir, config.blobs_folder)
        except (backup.NoCopy, OSError) as error:
            raise command.Failed(f"not restored: {command.reason(error)}") from None
    print(f"{given.source} is restored to {config.data_dir}: {summary(copied)}")
    # The digests were looked at just now.
    return check.report(config.data_dir, config.blobs_folder, is_quick=True)
