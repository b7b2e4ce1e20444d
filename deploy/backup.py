"""Copies a data folder while Graft serves from it: python backup.py DATA_DIR TARGET

The database first, as one state of it; then the files that it refers to, which
are never changed once they are there. What was published since is in the copy
without a row, and is swept at the first start from it. A deletion meanwhile can
leave a hole: that is looked for at the end. Pretrained weights and what running
jobs write are left out; they come again. Needs Python alone, so that it can be
piped into a container. TARGET must not exist; it is whole when the exit code is 0.
"""

import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

DATABASE = "graft.sqlite3"
FOLDERS = ("artifacts/backbones", "artifacts/versions", "datasets")


def back_up(data_dir: Path, target: Path) -> None:
    """Makes the copy, or exits with the reason why it is not whole."""
    if not (data_dir / DATABASE).is_file():
        sys.exit(f"{data_dir} holds no {DATABASE}: it is no data folder of Graft")
    if target.exists():
        sys.exit(f"{target} exists: name a folder that does not")
    # The copy is as private as what it is of.
    os.umask(0o077)
    target.mkdir(parents=True)
    with (
        closing(sqlite3.connect(data_dir / DATABASE)) as source,
        closing(sqlite3.connect(target / DATABASE)) as copy,
    ):
        source.backup(copy)
        # A single file from here on, without a log beside it.
        copy.execute("PRAGMA journal_mode = DELETE")
        (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            sys.exit(_damaged(found, target))
        for folder in FOLDERS:
            shutil.copytree(
                data_dir / folder, target / folder, ignore=shutil.ignore_patterns("tmp")
            )
        missing = [path for path in _referred(copy) if not (target / path).exists()]
    if missing:
        sys.exit(f"{missing[0]} was deleted meanwhile: remove {target} and back up again")
    # A name that the server gives when it is told to stop: nobody died of the jobs in it.
    (target / "stopped").touch()
    os.sync()


def _damaged(why: object, target: Path) -> str:
    return f"the database is damaged ({why}): remove {target}, and keep older backups"


def _referred(database: sqlite3.Connection) -> list[str]:
    versions = database.execute("SELECT artifact_digest, backbone_digest FROM versions").fetchall()
    datasets = database.execute("SELECT dataset_id FROM datasets").fetchall()
    return [
        *(f"artifacts/versions/{artifact}" for artifact, _ in versions),
        *(f"artifacts/backbones/{backbone}.onnx" for _, backbone in versions),
        *(f"datasets/{dataset}" for (dataset,) in datasets),
    ]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: backup.py DATA_DIR TARGET")
    target = Path(sys.argv[2])
    try:
        back_up(Path(sys.argv[1]), target)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            sys.exit(_damaged(error, target))
        sys.exit(f"the backup is not whole: {error}")
    except (OSError, shutil.Error, sqlite3.Error) as error:
        sys.exit(f"the backup is not whole: {error}")
