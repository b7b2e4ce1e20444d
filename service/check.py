"""`python -m service.check DATA_DIR`: the stores held against the disk, a line for each fault.

Of a stopped server everything is looked at. After a kill, what the next start
sweeps is passed over. Of a running server only what two looks, some seconds
apart, both saw is told: the first may see things on their way. Changes nothing,
and holds no lock.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from service.jobs import check as jobs
from service.storage import check as storage

Server = Literal["stopped", "killed", "running"]

EXIT_SOUND = 0
EXIT_BROKEN = 1
EXIT_NO_FOLDER = 2
LOOK_AGAIN_S = 5.0
MAX_TOLD = 1000
"""Most lines."""


def problems(
    data_dir: Path,
    server: Server = "stopped",
    *,
    reads_contents: bool = True,
    look_again_s: float = LOOK_AGAIN_S,
) -> list[str]:
    """What is broken in a data folder, at most 1000 lines; empty when all is well.

    `server` says what became of the one that used the folder. Raises
    FileNotFoundError where there is no database.
    """
    found = _look(data_dir, server, reads_contents)
    if server == "running" and found:
        time.sleep(look_again_s)
        still = set(_look(data_dir, server, reads_contents))
        found = [line for line in found if line in still]
    return found


def _look(data_dir: Path, server: Server, reads_contents: bool) -> list[str]:
    return list(itertools.islice(_lines(data_dir, server, reads_contents), MAX_TOLD))


def _lines(data_dir: Path, server: Server, reads_contents: bool) -> Iterator[str]:
    workers = len(os.sched_getaffinity(0))
    with storage.read_only(data_dir) as connection:
        try:
            yield from (unsound := list(storage.database_problems(connection)))
            if any(line.startswith(storage.UNKNOWN_FORMAT) for line in unsound):
                return
            yield from storage.model_problems(connection)
            yield from storage.artifact_problems(
                connection, data_dir / "artifacts", reads_contents=reads_contents
            )
            yield from storage.dataset_problems(
                connection,
                data_dir / "datasets",
                reads_contents=reads_contents,
                workers=workers,
            )
            yield from jobs.job_problems(connection)
            yield from jobs.size_problems(connection)
            yield from jobs.version_problems(connection)
            yield from jobs.dataset_use_problems(connection)
            if server == "stopped":
                yield from storage.leftovers(connection, data_dir)
                yield from jobs.leftovers(connection, data_dir / "work")
        except storage.DatabaseError as error:
            yield f"database: cannot be read: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the lines; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.check", description="Checks a data folder against its database."
    )
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--running",
        action="store_true",
        help="a server works on it: tell only what two looks some seconds apart both saw",
    )
    beside.add_argument(
        "--killed",
        action="store_true",
        help="its server was killed and not started since: pass over what a start sweeps",
    )
    parser.add_argument(
        "--quick", action="store_true", help="names and sizes alone; read no file for its digest"
    )
    given = parser.parse_args(arguments)
    server: Server = "running" if given.running else "killed" if given.killed else "stopped"
    try:
        if server != "running" and storage.is_held(given.data_dir):
            print(
                f"a server holds {given.data_dir}: what it is at may look broken; see --running",
                file=sys.stderr,
            )
        found = problems(given.data_dir, server, reads_contents=not given.quick)
    except OSError as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return EXIT_NO_FOLDER
    for line in found:
        print(line)
    more = " or more" if len(found) == MAX_TOLD else ""
    print(f"{len(found)}{more} problems" if found else "all is well", file=sys.stderr)
    return EXIT_BROKEN if found else EXIT_SOUND


if __name__ == "__main__":
    sys.exit(main())
