"""Deletes what was stored of a trainer's result that no version came of.

Two jobs may put the same backbone at the same time: what is in use is decided in a
transaction, and whoever publishes after it puts back what is gone.
"""

from functools import partial
from pathlib import Path

from service.storage import exports
from service.storage.artifacts import Artifacts
from service.storage.database import Database


def discard(database: Database, artifacts: Artifacts, out_dir: Path) -> None:
    """Deletes the files that `Artifacts.put` made of a result, but for those in use."""
    version, backbone = artifacts.digests_of(out_dir)
    with database.transaction() as connection:
        used = connection.execute(
            "SELECT artifact_digest, backbone_digest FROM versions"
            " WHERE artifact_digest = ? OR backbone_digest = ?",
            (version, backbone),
        ).fetchall()
        kept = {digest for row in used for digest in row} | exports.digests(connection) | {""}
        # After the commit and before the next transaction, as when a version is deleted.
        database.after_commit(
            partial(
                artifacts.remove,
                versions={version} - kept,
                backbones={backbone} - kept,
            )
        )
