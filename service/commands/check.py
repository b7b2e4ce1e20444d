"""`graft-server check`: says whether a data folder, or a backup of one, is whole."""

import argparse
import os
import sqlite3
import sys
from pathlib import Path

from service import settings
from service.commands import command

_SETTINGS = ("data_dir", "blobs_dir")


def add(commands: command.Commands) -> None:
    parser = command.add(
        commands,
        "check",
        "look for what is missing, damaged or contradictory in a data folder or a backup",
        execute,
        more="Compares rows with rows, and files with rows and with their digests; prints a line "
        "for each problem, changes nothing.",
        exit_codes="0 no problems, 1 problems, 2 no data folder or a wrong setting",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER",
        help="a backup or a data folder; that of the settings where left out",
    )  # fmt: skip
    settings.add_flags(parser, _SETTINGS)
    parser.add_argument(
        "--running", action="store_true",
        help="a server uses it: report only what two scans some seconds apart both find",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="read no file for its digest")


def execute(given: argparse.Namespace) -> int:
    """Prints the problems; returns the exit code."""
    config = settings.load_only(_SETTINGS, vars(given), os.environ)
    if given.folder is None:
        return report(config.data_dir, config.blobs_folder, given.running, given.quick)
    blobs_dir = config.blobs_dir if given.blobs_dir else None
    return report(given.folder, blobs_dir, given.running, given.quick)


def report(
    data_dir: Path, blobs_dir: Path | None, is_running: bool = False, is_quick: bool = False
) -> int:
    """Prints the problems of a data folder; returns the exit code."""
    from service import fsck

    try:
        found = fsck.problems(
            data_dir, blobs_dir, is_running=is_running, reads_contents=not is_quick
        )
        try:
            left = fsck.orphans(data_dir, blobs_dir)
        except sqlite3.DatabaseError:
            left = {}  # of which the problems tell
    except OSError as error:
        raise command.Failed(f"cannot check: {command.reason(error)}", command.EXIT_USAGE) from None
    for line in found:
        print(line)
    for what, count in left.items():
        if count:
            print(f"{count} {what}: the server deletes them in time", file=sys.stderr)
    more = " or more" if len(found) == fsck.MAX_PROBLEMS else ""
    print(f"{len(found) or 'no'}{more} problem{'s' * (len(found) != 1)}", file=sys.stderr)
    return command.EXIT_FAILED if found else command.EXIT_OK
