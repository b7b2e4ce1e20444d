"""One dataset as a row of the database."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from service.domain import DEFAULT_TENANT, ClassCount, ReadSummary, plain_name
from service.errors import NotFound, Reason
from service.ingest.archives import FILE_BYTES
from service.ingest.names import shown
from service.storage.database import Connection


@dataclass(frozen=True)
class DatasetRecord:
    """A stored set of images; its name and its summary are of the last upload of them."""

    dataset_id: str
    tenant: str
    display_name: str
    digest: str
    """Of the images, whoever has them."""
    create_time_s: float
    size_bytes: int
    """Of its images' files."""
    classes: list[ClassCount]
    image_count: int
    summary: ReadSummary
    is_unlabelled: bool
    """It can be the target of domain adaptation alone; `classes` is empty."""
    case_sensitive: bool = False
    """Class names may differ in upper and lower case alone."""

    @property
    def disk_bytes(self) -> int:
        """Counts what it takes on disk."""
        return self.size_bytes + self.image_count * FILE_BYTES


def renew(connection: Connection, known: DatasetRecord, uploaded: DatasetRecord) -> DatasetRecord:
    """Gives a stored dataset the name and the summary of its newest upload, and returns it."""
    now = replace(
        known,
        display_name=uploaded.display_name or known.display_name,
        summary=uploaded.summary,
        case_sensitive=known.case_sensitive or uploaded.case_sensitive,
    )
    connection.execute(
        "UPDATE datasets SET display_name = ?, summary_json = ?, case_sensitive = ?"
        " WHERE dataset_id = ?",
        (
            now.display_name,
            msgspec.json.encode(now.summary).decode(),
            int(now.case_sensitive),
            now.dataset_id,
        ),
    )
    return now


def insert(connection: Connection, record: DatasetRecord, digest: str) -> None:
    """Adds a dataset, whose digest is unique among those of all tenants."""
    connection.execute(
        "INSERT INTO datasets (dataset_id, display_name, digest, create_time_s,"
        " size_bytes, classes_json, image_count, summary_json, case_sensitive,"
        " is_unlabelled, tenant) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.dataset_id,
            record.display_name,
            digest,
            record.create_time_s,
            record.size_bytes,
            msgspec.json.encode(record.classes).decode(),
            record.image_count,
            msgspec.json.encode(record.summary).decode(),
            int(record.case_sensitive),
            int(record.is_unlabelled),
            record.tenant,
        ),
    )


def id_of(tenant: str, digest: str) -> str:
    """Returns the id of a tenant's dataset of a digest."""
    # From which nobody can tell what another tenant's dataset of the same images is called.
    if tenant != DEFAULT_TENANT:
        digest = hashlib.sha256(f"{tenant}\0{digest}".encode()).hexdigest()
    return f"ds-{digest[:20]}"


def find(connection: Connection, dataset_id: str, tenant: str) -> Any:
    """Returns the row of a tenant's dataset; raises NotFound (DATASET_NOT_FOUND)."""
    row = connection.execute(
        "SELECT * FROM datasets WHERE dataset_id = ? AND tenant = ?", (dataset_id, tenant)
    ).fetchone()
    if row is None:
        raise NotFound(
            Reason.DATASET_NOT_FOUND,
            f"no dataset has the id {shown(dataset_id)}: upload it, or see ListDatasets",
        )
    return row


def record_of(row: Any) -> DatasetRecord:
    """Returns the dataset of a row."""
    return DatasetRecord(
        dataset_id=row["dataset_id"],
        tenant=row["tenant"],
        display_name=row["display_name"],
        digest=plain_name(row["digest"]),
        create_time_s=row["create_time_s"],
        size_bytes=row["size_bytes"],
        classes=msgspec.json.decode(row["classes_json"], type=list[ClassCount]),
        image_count=row["image_count"],
        summary=msgspec.json.decode(row["summary_json"], type=ReadSummary),
        case_sensitive=bool(row["case_sensitive"]),
        is_unlabelled=bool(row["is_unlabelled"]),
    )
