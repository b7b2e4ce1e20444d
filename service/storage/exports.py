"""Pretrained backbones in ONNX form, kept for later jobs when the versions on them are gone.

Owns the table exported_backbones. A trainer that was told of one may work for hours
before it publishes on it, so none ever leaves. All tenants share the float forms; a
quantised one holds the ranges of its tenant's images, and is for that tenant alone. The
float form of a registered backbone is its tenant's, and in the table registered_backbones;
its quantised form is here, and goes with it.
"""

import time

from service.backbones import is_registered
from service.contract import FROZEN_TECHNIQUES
from service.domain import Manifest, plain_name, tenant_key, tenant_of
from service.storage.database import Connection

_INT8 = ":int8"
"""After the weights of a quantised form."""


def weights_of(digest: str) -> str:
    """Returns what the weights of a registered backbone are called, from its file's digest."""
    return f"sha256:{digest[:16]}"


def is_kept(manifest: Manifest) -> bool:
    """Whether a version's backbone is a pretrained one as it was; else it is the version's own."""
    # Random weights have no second user; only what was pretrained is worth keeping.
    is_frozen = manifest.method == "feature_based" or manifest.technique in FROZEN_TECHNIQUES
    return is_frozen and not manifest.weights.startswith("random")


def keep(connection: Connection, tenant: str, manifest: Manifest) -> None:
    """Notes the backbone of a version that is published, if it is one to keep."""
    if not is_kept(manifest):
        return
    # Float and quantised forms are different files, each shared by later jobs.
    is_int8 = manifest.serving_precision == "int8"
    if is_registered(manifest.backbone) and not is_int8:
        return
    form = tenant_key(tenant, manifest.weights + _INT8) if is_int8 else manifest.weights
    connection.execute(
        "INSERT INTO exported_backbones (backbone, weights, digest, create_time_s)"
        " VALUES (?, ?, ?, ?) ON CONFLICT (backbone, weights) DO NOTHING",
        (manifest.backbone, form, manifest.backbone_digest, time.time()),
    )


def forms(connection: Connection, backbone: str, tenant: str) -> list[tuple[str, str]]:
    """The weights, as the trainer names them, and the digests of what a tenant's jobs may use."""
    rows = connection.execute(
        "SELECT weights, digest FROM exported_backbones WHERE backbone = ? ORDER BY weights",
        (backbone,),
    )
    found = [
        (plain_name(row["weights"]) if row["weights"].endswith(_INT8) else row["weights"],
         row["digest"])
        for row in rows
        if not row["weights"].endswith(_INT8) or tenant_of(row["weights"]) == tenant
    ]  # fmt: skip
    registered = connection.execute(
        "SELECT digest FROM registered_backbones WHERE tenant = ? AND name = ?", (tenant, backbone)
    ).fetchall()
    return [(weights_of(row["digest"]), row["digest"]) for row in registered] + found


def forget(connection: Connection, backbone: str, tenant: str) -> None:
    """Forgets the quantised forms of a registered backbone that its tenant deletes."""
    rows = connection.execute(
        "SELECT weights FROM exported_backbones WHERE backbone = ?", (backbone,)
    ).fetchall()
    connection.executemany(
        "DELETE FROM exported_backbones WHERE backbone = ? AND weights = ?",
        [(backbone, row["weights"]) for row in rows if tenant_of(row["weights"]) == tenant],
    )


def digests(connection: Connection) -> set[str]:
    """Returns all that are kept, with or without a version."""
    rows = connection.execute(
        "SELECT digest FROM exported_backbones UNION SELECT digest FROM registered_backbones"
    )
    return {row["digest"] for row in rows}
