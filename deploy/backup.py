"""Copies a data folder while Graft serves from it, and puts one back.

    python backup.py backup DATA_DIR TARGET
    python backup.py restore TARGET DATA_DIR

The database first, as one state of it; then the blobs that its rows name, which never change and
which the collector leaves alone for an hour after their last row went. A TARGET that is a backup
already is brought up to date: only blobs that are new are copied, and the old state stands until
the new one is whole. `restore` makes DATA_DIR, which must not exist. Both compare every blob that
they copy with its digest. Pretrained weights, caches and what running jobs write are left out;
they come again. Where blobs do not lie in DATA_DIR say --blobs-dir. Needs Python alone, so that it
can be piped into a container. The exit code is 0 when the copy is whole.
"""

import argparse
import hashlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

DATABASE = "graft.sqlite3"
BLOBS = "blobs"
NEW = ".new"


def back_up(data_dir: Path, target: Path, blobs_dir: Path) -> None:
    """Makes the copy, or brings it up to date; exits with the reason why it is not whole."""
    if not (data_dir / DATABASE).is_file():
        sys.exit(f"{data_dir} holds no {DATABASE}: it is no data folder of Graft")
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        # As a backup that was interrupted leaves it; a data folder has more.
        if path.name != BLOBS and not path.name.startswith(DATABASE):
            sys.exit(f"{target} holds {path.name} and is no backup: name a folder of its own")
    # With the journal of one that was killed, which would be taken for the new one's.
    for path in target.glob(DATABASE + NEW + "*"):
        path.unlink()
    new = target / (DATABASE + NEW)
    with (
        closing(sqlite3.connect(data_dir / DATABASE)) as source,
        closing(sqlite3.connect(new)) as copy,
    ):
        source.backup(copy)
        # A single file from here on, without a log beside it.
        copy.execute("PRAGMA journal_mode = DELETE")
        check(copy, data_dir)
        # Nobody died of the jobs that run: they are not to count as crashed.
        copy.execute("UPDATE replicas SET is_draining = 1")
        copy.commit()
        names = set(needed(copy))
    for name in sorted(names):
        copy_blob(blobs_dir / name[:2] / name, target / BLOBS / name[:2] / name)
    os.sync()
    new.replace(target / DATABASE)
    # Not before: until then they are the old state's.
    for path in (target / BLOBS).glob("??/*"):
        if path.name not in names:
            path.unlink()
    os.sync()


def restore(target: Path, data_dir: Path, blobs_dir: Path) -> None:
    """Makes a data folder of a backup, or exits with the reason why there is none."""
    if not (target / DATABASE).is_file():
        sys.exit(f"{target} holds no {DATABASE}: it is no backup")
    if data_dir.exists():
        sys.exit(f"{data_dir} exists: move it away first, and keep it until the server runs again")
    with closing(
        sqlite3.connect(f"{(target / DATABASE).resolve().as_uri()}?mode=ro", uri=True)
    ) as copy:
        check(copy, target)
        names = list(needed(copy))
    # Under another name until it is whole.
    part = data_dir.with_name(data_dir.name + NEW)
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    is_inside = blobs_dir == data_dir / BLOBS
    into = part / BLOBS if is_inside else blobs_dir
    for name in names:
        path = into / name[:2] / name
        # Outside, what was damaged may be why there is a restore.
        if not is_inside and path.exists() and not is_whole(path):
            path.unlink()
        copy_blob(target / BLOBS / name[:2] / name, path)
    shutil.copyfile(target / DATABASE, part / DATABASE)
    os.sync()
    part.rename(data_dir)


def check(copy: sqlite3.Connection, folder: Path) -> None:
    """Exits for a database, read from a folder, that is not whole."""
    (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        sys.exit(damaged(found, folder))


def needed(copy: sqlite3.Connection) -> Iterator[str]:
    """Yields the objects of all blobs that a row names; foreign keys say which rows do."""
    tables = copy.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    named = " UNION ".join(
        f"SELECT {key[3]} FROM {table} WHERE {key[3]} IS NOT NULL"  # nosec B608  # noqa: S608 - names of the schema
        for (table,) in tables
        for key in copy.execute(f"PRAGMA foreign_key_list({table})")
        if key[2] == "blobs"
    )
    rows = copy.execute(f"SELECT digest, generation FROM blobs WHERE digest IN ({named})")  # nosec B608  # noqa: S608
    yield from (f"{digest}-{generation}" for digest, generation in rows)


def copy_blob(source: Path, into: Path) -> None:
    """Copies an object unless it is there; it gets its name when it is whole."""
    if into.exists():
        return
    into.parent.mkdir(parents=True, exist_ok=True)
    part = into.with_name(into.name + NEW)
    try:
        shutil.copyfile(source, part)
    except FileNotFoundError:
        sys.exit(f"{source} is missing: it was deleted meanwhile, or is lost; try once more")
    if not is_whole(part, source.name):
        part.unlink()
        sys.exit(f"{source} is damaged: take it from another backup, or delete what needs it")
    part.rename(into)


def is_whole(path: Path, name: str = "") -> bool:
    """Tells whether a file has the digest that the name of its object begins with."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return found == (name or path.name).partition("-")[0]


def damaged(why: object, folder: Path) -> str:
    """Returns what to say of a folder whose database is damaged."""
    return f"the database of {folder} is damaged ({why}): keep every backup, use the last good one"


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(prog="backup.py", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, first, second in (
        ("backup", "DATA_DIR", "TARGET"),
        ("restore", "TARGET", "DATA_DIR"),
    ):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, metavar=first)
        command.add_argument("target", type=Path, metavar=second)
        command.add_argument("--blobs-dir", type=Path, help="where the server keeps its blobs")
    given = parser.parse_args()
    # The copy is as private as what it is of.
    os.umask(0o077)
    is_backup = given.command == "backup"
    data_dir = given.source if is_backup else given.target
    blobs_dir = given.blobs_dir or data_dir / BLOBS
    try:
        (back_up if is_backup else restore)(given.source, given.target, blobs_dir)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            sys.exit(damaged(error, given.source))
        sys.exit(f"the copy is not whole: {error}")
    except (OSError, shutil.Error, sqlite3.Error) as error:
        sys.exit(f"the copy is not whole: {error}")


if __name__ == "__main__":
    main()
