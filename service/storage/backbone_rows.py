"""Registered backbones as rows of the database, and who is on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.backbones import ONNX
from service.domain import JobState, plain_name
from service.errors import NotFound, Reason, WrongState
from service.ingest.backbone_process import Asked
from service.ingest.names import shown
from service.storage import exports
from service.storage.database import Connection

_MAX_TOLD = 3
_AUTO = "auto"
"""The backbone of a job that chooses one by its data."""


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
        return exports.weights_of(self.digest)


class _Named(msgspec.Struct):
    """What a manifest or a job's request says of its backbone."""

    backbone: str = ""


_named = msgspec.json.Decoder(_Named)


def row_of(connection: Connection, name: str, tenant: str) -> Any:
    """Returns the row of a tenant's backbone, by its whole name; None where there is none."""
    return connection.execute(
        "SELECT * FROM registered_backbones WHERE tenant = ? AND name = ?", (tenant, name)
    ).fetchone()


def find(connection: Connection, name: str, tenant: str) -> RegisteredBackbone:
    """Returns a tenant's backbone, by its name with or without "onnx/"; raises NotFound."""
    row = row_of(connection, ONNX + name.removeprefix(ONNX), tenant)
    if row is None:
        names = connection.execute(
            "SELECT name FROM registered_backbones WHERE tenant = ? ORDER BY name LIMIT 10",
            (tenant,),
        )
        raise not_found(name, [found["name"] for found in names])
    return record_of(row)


def not_found(name: str, registered: Sequence[str]) -> NotFound:
    """Returns the error of a name that no registered backbone has."""
    told = f"{', '.join(registered)} are" if registered else "none is"
    return NotFound(
        Reason.BACKBONE_NOT_FOUND,
        f"no backbone is registered as {shown(name)}: {told}; register its file "
        "(RegisterBackbone), or see ListBackbones",
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


def check_no_versions(
    connection: Connection, record: RegisteredBackbone, digests: set[str]
) -> None:
    """Raises WrongState while versions are on a backbone, whose forms have these digests."""
    marks = ", ".join("?" * len(digests))
    rows = connection.execute(
        "SELECT model, version, manifest_json FROM versions JOIN models ON name = model"  # noqa: S608
        f" WHERE tenant = ? AND backbone_digest IN ({marks}) ORDER BY model, version",
        (record.tenant, *digests),
    )
    # The same file may be registered under two names.
    told = [
        f"version {row['version']} of {plain_name(row['model'])}"
        for row in rows
        if _named.decode(row["manifest_json"]).backbone == record.name
    ]
    if told:
        raise _in_use(record, f"{len(told)} versions are on it", told, "delete those first")


def check_no_jobs(
    connection: Connection, record: RegisteredBackbone, default_backbone: str
) -> None:
    """Raises WrongState while jobs that have not ended are on a backbone, or may choose it."""
    rows = connection.execute(
        "SELECT job_id, request_json FROM jobs WHERE tenant = ? AND state IN (?, ?)"
        " ORDER BY job_id",
        (record.tenant, JobState.QUEUED, JobState.RUNNING),
    )
    told = [
        row["job_id"]
        for row in rows
        if (_named.decode(row["request_json"]).backbone or default_backbone) in (record.name, _AUTO)
    ]
    if told:
        what = f"{len(told)} jobs that have not ended are on it, or may choose it"
        raise _in_use(record, what, told, "wait for them to end, or cancel them")


def _in_use(record: RegisteredBackbone, what: str, named: list[str], remedy: str) -> WrongState:
    more = " and more" if len(named) > _MAX_TOLD else ""
    return WrongState(
        Reason.BACKBONE_IN_USE,
        f"{record.name} cannot be deleted: {what} ({', '.join(named[:_MAX_TOLD])}{more}); {remedy}",
        field="name",
    )


def is_used(connection: Connection, digest: str) -> bool:
    """Tells whether anybody's version or backbone needs the file of a digest."""
    query = "SELECT 1 FROM versions WHERE backbone_digest = ? LIMIT 1"
    is_served = connection.execute(query, (digest,)).fetchone() is not None
    return is_served or digest in exports.digests(connection)
