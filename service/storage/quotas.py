"""What tenants store, and whether there is room for more.

Works in its caller's transaction. The bound is handed in: who may store how much is
the operator's.
"""

import logging
from typing import Any

import msgspec

from service.domain import Manifest
from service.errors import Exhausted, OverQuota, Unavailable
from service.ingest.archives import FILE_BYTES
from service.storage import disk_errors, exports
from service.storage.artifacts import Artifacts
from service.storage.database import Connection, Database

_MB = 2**20
_MAKE_ROOM = "delete datasets or versions that you need no longer, or ask the operator for more"

log = logging.getLogger(__name__)


def stored_bytes(connection: Connection, tenant: str) -> int:
    """Counts what a tenant's datasets, versions, registered backbones and jobs take.

    An image counts FILE_BYTES beside its own bytes; what several versions share counts once.
    """
    (stored,) = connection.execute(
        "SELECT (SELECT COALESCE(SUM(size_bytes + image_count * ?), 0) FROM datasets"
        " WHERE tenant = ?)"
        " + (SELECT COALESCE(SUM(versions.size_bytes), 0) FROM models"
        " JOIN versions ON versions.model = models.name WHERE models.tenant = ?)"
        " + (SELECT COALESCE(SUM(bytes), 0) FROM (SELECT MAX(backbone_bytes) AS bytes FROM models"
        " JOIN versions ON versions.model = models.name"
        " WHERE models.tenant = ? AND backbone_bytes > 0 GROUP BY backbone_digest) AS backbones)"
        " + (SELECT COALESCE(SUM(size_bytes), 0) FROM registered_backbones WHERE tenant = ?)"
        " + COALESCE((SELECT size_bytes FROM job_bytes WHERE tenant = ?), 0)",
        (FILE_BYTES, tenant, tenant, tenant, tenant, tenant),
    ).fetchone()
    return int(stored)


def version_bytes(
    artifacts: Artifacts, manifest: Manifest, artifact_digest: str
) -> tuple[int, int]:
    """What a version's own files take, and its backbone: 0 where that is a pretrained one.

    Such a one is everybody's. Whether other tenants have the backbone makes no difference.
    """
    own = artifacts.version_bytes(artifact_digest)
    is_kept = exports.is_kept(manifest)
    return own, 0 if is_kept else artifacts.backbone_bytes(manifest.backbone_digest)


def measure_old(database: Database, artifacts: Artifacts) -> None:
    """Notes what the versions take that earlier releases published; for the start.

    Where the disk or the database does not let it, the next start does.
    """
    try:
        with database.read() as connection:
            unmeasured = connection.execute("SELECT * FROM versions WHERE size_bytes = 0")
            sizes = [(*_row_bytes(artifacts, row), row) for row in unmeasured]
        # Those whose files are gone stay as they are.
        found = [size for size in sizes if size[0]]
        if not found:
            return
        with database.transaction() as connection:
            connection.executemany(
                "UPDATE versions SET size_bytes = ?, backbone_bytes = ?"
                " WHERE model = ? AND version = ?",
                [(own, backbone, row["model"], row["version"]) for own, backbone, row in found],
            )
    except (Exhausted, Unavailable) as error:
        if error.reason not in disk_errors.PASSING:
            raise
        log.exception("what old versions take cannot be noted yet")
    except OSError:
        log.exception("what old versions take cannot be measured")


def _row_bytes(artifacts: Artifacts, row: Any) -> tuple[int, int]:
    manifest = msgspec.json.decode(row["manifest_json"], type=Manifest)
    return version_bytes(artifacts, manifest, row["artifact_digest"])


def check_room(used: int, asked: int, bound: int | None) -> None:
    """Raises OverQuota (stored_bytes) where `asked` bytes more are over the bound.

    At the bound nothing more is taken, 0 bytes neither. None means no bound.
    """
    if bound is None or (used < bound and used + asked <= bound):
        return
    brings = f"this would add {_mb(asked)} to it" if asked else "this would add to it"
    raise OverQuota(
        "stored_bytes",
        f"your datasets, versions, backbones and jobs take {_mb(used)} of the {_mb(bound)} that "
        f"you may store, and {brings}: {_MAKE_ROOM}",
    )


def check_version(connection: Connection, tenant: str, bound: int | None) -> None:
    """As `check_room`, for a version whose row has just been written."""
    if bound is None or (used := stored_bytes(connection, tenant)) <= bound:
        return
    raise OverQuota(
        "stored_bytes",
        f"with this version your datasets, versions, backbones and jobs would take {_mb(used)} of "
        f"the {_mb(bound)} that you may store: {_MAKE_ROOM}; then fine-tune again, which is quick "
        "where the images' features are kept",
    )


def _mb(size: int) -> str:
    return f"{size / _MB:.4g} MB"
