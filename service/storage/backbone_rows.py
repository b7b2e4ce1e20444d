"""Backbones as rows of the database: pretrained ones in ONNX form, and tenants' own.

Owns the table exported_backbones: forms that stay known for later jobs when the versions on them
are gone; none ever leaves, for a trainer that was given one may work for hours before it
publishes on it. All tenants share them: nothing in a quantised one is of a tenant's images either.
The file of a registered backbone is its tenant's, and in the table registered_backbones; its forms
for other precisions go with it. Every function works in its caller's transaction.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.backbones import ONNX, is_registered
from service.contract import FROZEN_TECHNIQUES, ExportedBackbone, form_name
from service.domain import Manifest
from service.errors import NotFound, Reason, WrongState
from service.ingest.backbone_process import Asked
from service.ingest.names import shown
from service.storage import holds
from service.storage.database import Connection

_MAX_NAMED = 3
ANY = "auto"
"""Held by a job that chooses its backbone by its data: it may choose any."""
EVERYBODY = ""
"""Stands for the tenant of a form that all may use."""


def weights_of(digest: str) -> str:
    """Returns what the weights of a registered backbone are called, from its file's digest."""
    return f"sha256:{digest[:16]}"


def is_kept(manifest: Manifest) -> bool:
    """Whether a version's backbone is a pretrained one as it was; else it is the version's own."""
    # Random weights have no second user; only what was pretrained is worth keeping.
    is_frozen = manifest.method == "feature_based" or manifest.technique in FROZEN_TECHNIQUES
    return is_frozen and not manifest.weights.startswith("random")


def has_reference(manifest: Manifest) -> bool:
    """Whether a version's backbone is noted with its reference: a float form that all share."""
    is_float = manifest.serving_precision != "int8"
    return is_float and is_kept(manifest) and manifest.reference_digest != ""


def keep(connection: Connection, tenant: str, manifest: Manifest) -> None:
    """Notes the backbone of a version that is published, if it is one to keep."""
    form = manifest.serving_precision
    if not is_kept(manifest) or (is_registered(manifest.backbone) and form == "fp32"):
        return
    # The forms for different precisions are different files, each shared by later jobs.
    exported = ExportedBackbone(
        form_name(manifest.weights, form),
        manifest.backbone_digest,
        reference=manifest.reference_digest if has_reference(manifest) else "",
    )
    owner = tenant if is_registered(manifest.backbone) else EVERYBODY
    keep_exported(connection, owner, manifest.backbone, exported)


def keep_exported(
    connection: Connection, tenant: str, backbone: str, exported: ExportedBackbone
) -> None:
    """Notes a form of a backbone, whose blobs were referenced; the first of its file stays."""
    connection.execute(
        "INSERT INTO exported_backbones"
        " (tenant, backbone, weights, digest, reference_digest, create_time_s)"
        " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, backbone, weights)"
        # A reference that was lost is made again, and need not have the same last digits.
        " DO UPDATE SET reference_digest = excluded.reference_digest"
        " WHERE digest = excluded.digest",
        (
            tenant,
            backbone,
            exported.weights,
            exported.digest,
            exported.reference or None,
            time.time(),
        ),
    )


def forms(connection: Connection, backbone: str, tenant: str) -> list[ExportedBackbone]:
    """Lists what a tenant's jobs may use."""
    exported = connection.execute(
        "SELECT weights, digest, reference_digest FROM exported_backbones"
        " WHERE tenant IN (?, ?) AND backbone = ? ORDER BY weights",
        (EVERYBODY, tenant, backbone),
    ).fetchall()
    registered = connection.execute(
        "SELECT digest, licence FROM registered_backbones WHERE tenant = ? AND name = ?",
        (tenant, backbone),
    ).fetchall()
    # Of a registered one its quantised form has the licence, too.
    licence = registered[0]["licence"] if registered else ""
    return [
        *(
            ExportedBackbone(weights_of(row["digest"]), row["digest"], row["licence"])
            for row in registered
        ),
        *(
            ExportedBackbone(
                row["weights"], row["digest"], licence, reference=row["reference_digest"] or ""
            )
            for row in exported
        ),
    ]


def forget(connection: Connection, backbone: str, tenant: str) -> None:
    """Forgets the further forms of a registered backbone that its tenant deletes."""
    connection.execute(
        "DELETE FROM exported_backbones WHERE tenant = ? AND backbone = ?", (tenant, backbone)
    )


@dataclass(frozen=True, kw_only=True)
class RegisteredBackbone:
    """A registered backbone."""

    tenant: str
    name: str
    """As requests name it: "onnx/NAME"."""
    digest: str
    """Of the file that serves."""
    source_digest: str
    """Of the file that came."""
    asked: Asked
    width: int
    licence: str
    size_bytes: int
    create_time_s: float

    @property
    def weights(self) -> str:
        """Returns what its weights are called in manifests: another file has another name."""
        return weights_of(self.digest)


def row_of(connection: Connection, name: str, tenant: str) -> Any:
    """Returns the row of a tenant's backbone, by its whole name; None where there is none."""
    return connection.execute(
        "SELECT * FROM registered_backbones WHERE tenant = ? AND name = ?", (tenant, name)
    ).fetchone()


def find(connection: Connection, name: str, tenant: str) -> RegisteredBackbone:
    """Returns a tenant's backbone, by its name with or without "onnx/"; raises NotFound."""
    row = row_of(connection, ONNX + name.removeprefix(ONNX), tenant)
    if row is None:
        raise not_found(name, names(connection, tenant)[:10])
    return record_of(row)


def names(connection: Connection, tenant: str) -> list[str]:
    """Returns the names of all backbones that a tenant registered, sorted."""
    rows = connection.execute(
        "SELECT name FROM registered_backbones WHERE tenant = ? ORDER BY name", (tenant,)
    )
    return [row["name"] for row in rows]


def not_found(name: str, registered: Sequence[str]) -> NotFound:
    """Returns the error of a name that no registered backbone has."""
    told = f"{', '.join(registered)} are" if registered else "none is"
    return NotFound(
        Reason.BACKBONE_NOT_FOUND,
        f"no backbone is registered as {shown(name)}: {told}; register its file "
        "first, or take one of the list of backbones",
        field="backbone",
    )


def record_of(row: Any) -> RegisteredBackbone:
    """Returns the backbone of a row."""
    return RegisteredBackbone(
        tenant=row["tenant"],
        name=row["name"],
        digest=row["digest"],
        source_digest=row["source_digest"],
        asked=msgspec.json.decode(row["asked_json"], type=Asked),
        width=row["width"],
        licence=row["licence"],
        size_bytes=row["size_bytes"],
        create_time_s=row["create_time_s"],
    )


def check_unused(connection: Connection, record: RegisteredBackbone) -> None:
    """Raises WrongState while versions are on a backbone, or jobs that have not ended hold it."""
    rows = connection.execute(
        "SELECT model, version FROM versions WHERE tenant = ? AND backbone = ?"
        " ORDER BY model, version LIMIT ?",
        (record.tenant, record.name, _MAX_NAMED + 1),
    )
    if versions := [f"version {row['version']} of {row['model']}" for row in rows]:
        raise _in_use(record, "versions are on it", versions, "delete those first")
    jobs = [
        holder
        for name in (record.name, ANY)
        for holder in holds.holders(connection, record.tenant, "backbone", name)
    ]
    if jobs:
        raise _in_use(
            record,
            "jobs that have not ended are on it, or may choose it",
            sorted({*jobs}),
            "wait for them to end, or cancel them",
        )


def stored_bytes(connection: Connection, tenant: str) -> int:
    """Counts what a tenant's registered backbones take."""
    (stored,) = connection.execute(
        "SELECT COALESCE(SUM(size_bytes), 0) FROM registered_backbones WHERE tenant = ?", (tenant,)
    ).fetchone()
    return int(stored)


def _in_use(record: RegisteredBackbone, what: str, named: list[str], remedy: str) -> WrongState:
    more = " and more" if len(named) > _MAX_NAMED else ""
    return WrongState(
        Reason.BACKBONE_IN_USE,
        f"{record.name} cannot be deleted: {what} ({', '.join(named[:_MAX_NAMED])}{more}); "
        f"{remedy}",
        field="name",
    )
