"""What tenants store, and whether there is room for more.

Works in its caller's transaction. The bound is handed in: who may store how much is
the operator's.
"""

import msgspec

from service.domain import Manifest, tenant_of
from service.errors import OverQuota
from service.storage import exports
from service.storage.artifacts import Artifacts
from service.storage.database import Connection, Database

_MB = 2**20


def stored_bytes(connection: Connection, tenant: str) -> int:
    """What a tenant's datasets and versions take."""
    (stored,) = connection.execute(
        "SELECT (SELECT COALESCE(SUM(size_bytes), 0) FROM datasets WHERE tenant = ?)"
        " + (SELECT COALESCE(SUM(versions.size_bytes), 0) FROM models"
        " JOIN versions ON versions.model = models.name WHERE models.tenant = ?)",
        (tenant, tenant),
    ).fetchone()
    return int(stored)


def version_bytes(
    connection: Connection,
    artifacts: Artifacts,
    model: str,
    manifest: Manifest,
    artifact_digest: str,
) -> int:
    """What a version of a model, by its key, counts for when it is published.

    Its own files, and its backbone unless that is shared: with another version of
    the tenant, or as a pretrained one with all. It tells nothing of other tenants.
    """
    size = artifacts.version_bytes(artifact_digest)
    if exports.is_kept(manifest):
        return size
    shared = connection.execute(
        "SELECT 1 FROM versions WHERE backbone_digest = ? AND size_bytes > 0"
        " AND (SELECT tenant FROM models WHERE name = model) = ? LIMIT 1",
        (manifest.backbone_digest, tenant_of(model)),
    ).fetchone()
    return size if shared else size + artifacts.backbone_bytes(manifest.backbone_digest)


def measure_old(database: Database, artifacts: Artifacts) -> None:
    """Notes what the versions take that earlier releases published; for the start."""
    with database.read() as connection:
        unmeasured = connection.execute(
            "SELECT model, version FROM versions WHERE size_bytes = 0"
        ).fetchall()
    if not unmeasured:
        return
    with database.transaction() as connection:
        for version in unmeasured:
            row = connection.execute(
                "SELECT * FROM versions WHERE model = ? AND version = ?", tuple(version)
            ).fetchone()
            manifest = msgspec.json.decode(row["manifest_json"], type=Manifest)
            size = version_bytes(
                connection, artifacts, row["model"], manifest, row["artifact_digest"]
            )
            connection.execute(
                "UPDATE versions SET size_bytes = ? WHERE model = ? AND version = ?",
                (size, row["model"], row["version"]),
            )


def check_room(used: int, asked: int, bound: int | None) -> None:
    """Raises OverQuota (stored_bytes) where `asked` bytes more are over the bound.

    At the bound nothing more is taken, 0 bytes neither. None means no bound.
    """
    if bound is None or (used < bound and used + asked <= bound):
        return
    brings = f"this would add {_mb(asked)} to it" if asked else "this would add to it"
    raise OverQuota(
        "stored_bytes",
        f"your datasets and versions take {_mb(used)} of the {_mb(bound)} that you may store, and "
        f"{brings}: delete datasets or versions that you need no longer, or ask the operator for "
        "more",
    )


def _mb(size: int) -> str:
    return f"{size / _MB:.4g} MB"
