"""Checks a data folder (`python -m service.check DATA_DIR`): prints a line for each problem.

Compares the database with the files. After a kill, files that the next start removes are
no problem. On a live server a problem is reported only if two scans, some seconds apart,
find it; the first may have caught a write in progress. Changes nothing, and takes no lock.
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
RESCAN_S = 5.0
MAX_PROBLEMS = 1000


def problems(
    data_dir: Path,
    server: Server = "stopped",
    *,
    reads_contents: bool = True,
    rescan_s: float = RESCAN_S,
) -> list[str]:
    """Returns the problems of a data folder, at most 1000 lines; empty for a sound one.

    `server` says how the server of this folder ended, or that it still runs. Without
    `reads_contents` no file is read and compared with its digest. Raises
    FileNotFoundError where there is no database.
    """
    found = _scan(data_dir, server, reads_contents)
    if server == "running" and found:
        time.sleep(rescan_s)
        again = set(_scan(data_dir, server, reads_contents))
        found = [line for line in found if line in again]
    return found


def _scan(data_dir: Path, server: Server, reads_contents: bool) -> list[str]:
    return list(itertools.islice(_lines(data_dir, server, reads_contents), MAX_PROBLEMS))


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
    """Prints the problems; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.check",
        description="Checks a data folder against its database.",
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR")
    state = parser.add_mutually_exclusive_group()
    state.add_argument(
        "--running",
        action="store_true",
        help="a server uses it: report only what two scans some seconds apart both find",
    )
    state.add_argument(
        "--killed",
        action="store_true",
        help="its server was killed and not started since: ignore what a start removes",
    )
    parser.add_argument(
        "--quick", action="store_true", help="check names and sizes; read no file for its digest"
    )
    given = parser.parse_args(arguments)
    server: Server = "running" if given.running else "killed" if given.killed else "stopped"
    try:
        if server != "running" and storage.is_held(given.data_dir):
            print(
                f"a server uses {given.data_dir}: its writes in progress may look like problems; "
                "see --running",
                file=sys.stderr,
            )
        found = problems(given.data_dir, server, reads_contents=not given.quick)
    except OSError as error:
        print(f"cannot check: {error}", file=sys.stderr)
        return EXIT_NO_FOLDER
    for line in found:
        print(line)
    more = " or more" if len(found) == MAX_PROBLEMS else ""
    print(f"{len(found)}{more} problems" if found else "no problems", file=sys.stderr)
    return EXIT_BROKEN if found else EXIT_SOUND


if __name__ == "__main__":
    sys.exit(main())
