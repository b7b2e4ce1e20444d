"""Datasets as rows of the database: the tables datasets, dataset_packs and erasures.

Every function works in its caller's transaction.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain import DEFAULT_TENANT, ClassCount, ReadSummary
from service.errors import NotFound, Reason, unusable_dataset
from service.ingest.names import shown
from service.storage.database import Connection, marks

_PAGE = 500
_MIN_CLASSES = 2
"""That a job needs, with those of its base."""


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
    index_digest: str
    """sha256 of its index."""
    case_sensitive: bool = False
    """Class names may differ in upper and lower case alone."""
    erased_count: int = 0
    """Images that were erased: they count in `digest` and in nothing else."""


def insert(connection: Connection, record: DatasetRecord, packs: Iterable[str]) -> None:
    """Adds a dataset, whose digest is unique among those of its tenant, with its packs."""
    connection.execute(
        "INSERT INTO datasets (tenant, dataset_id, display_name, digest, create_time_s,"
        " size_bytes, classes_json, image_count, erased_count, summary_json, case_sensitive,"
        " is_unlabelled, index_digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.tenant,
            record.dataset_id,
            record.display_name,
            record.digest,
            record.create_time_s,
            record.size_bytes,
            msgspec.json.encode(record.classes).decode(),
            record.image_count,
            record.erased_count,
            msgspec.json.encode(record.summary).decode(),
            int(record.case_sensitive),
            int(record.is_unlabelled),
            record.index_digest,
        ),
    )
    _set_packs(connection, record, packs)


def update(connection: Connection, record: DatasetRecord, packs: Iterable[str]) -> None:
    """Gives a dataset another index and other packs, and what follows from them."""
    connection.execute(
        "UPDATE datasets SET display_name = ?, size_bytes = ?, classes_json = ?, image_count = ?,"
        " erased_count = ?, summary_json = ?, case_sensitive = ?, index_digest = ?"
        " WHERE tenant = ? AND dataset_id = ?",
        (
            record.display_name,
            record.size_bytes,
            msgspec.json.encode(record.classes).decode(),
            record.image_count,
            record.erased_count,
            msgspec.json.encode(record.summary).decode(),
            int(record.case_sensitive),
            record.index_digest,
            record.tenant,
            record.dataset_id,
        ),
    )
    connection.execute(
        "DELETE FROM dataset_packs WHERE tenant = ? AND dataset_id = ?",
        (record.tenant, record.dataset_id),
    )
    _set_packs(connection, record, packs)


def _set_packs(connection: Connection, record: DatasetRecord, packs: Iterable[str]) -> None:
    connection.executemany(
        "INSERT INTO dataset_packs (tenant, dataset_id, digest) VALUES (?, ?, ?)",
        [(record.tenant, record.dataset_id, digest) for digest in packs],
    )


def packs_of(connection: Connection, dataset_id: str, tenant: str) -> list[str]:
    """Returns the sha256 of each pack of a dataset, sorted."""
    rows = connection.execute(
        "SELECT digest FROM dataset_packs WHERE tenant = ? AND dataset_id = ? ORDER BY digest",
        (tenant, dataset_id),
    )
    return [row["digest"] for row in rows]


def all_of(connection: Connection, tenant: str) -> list[DatasetRecord]:
    """Returns all datasets of a tenant."""
    rows = connection.execute("SELECT * FROM datasets WHERE tenant = ?", (tenant,))
    return [record_of(row) for row in rows]


def all_packs(connection: Connection, tenant: str) -> list[str]:
    """Returns the sha256 of every pack of a tenant, sorted."""
    rows = connection.execute(
        "SELECT DISTINCT digest FROM dataset_packs WHERE tenant = ? ORDER BY digest", (tenant,)
    )
    return [row["digest"] for row in rows]


def sharing(connection: Connection, packs: Iterable[str], tenant: str) -> list[DatasetRecord]:
    """Returns a tenant's datasets that have images in any of some packs, by their ids."""
    wanted = list(packs)
    rows = connection.execute(
        "SELECT * FROM datasets WHERE tenant = ? AND dataset_id IN"  # nosec B608  # noqa: S608 - marks
        f" (SELECT dataset_id FROM dataset_packs WHERE tenant = ? AND digest IN ({marks(wanted)}))"
        " ORDER BY dataset_id",
        (tenant, tenant, *wanted),
    )
    return [record_of(row) for row in rows]


def note_erased(
    connection: Connection, records: Iterable[DatasetRecord], image_digest: str, time_s: float
) -> None:
    """Notes that an image was erased from datasets."""
    connection.executemany(
        "INSERT INTO erasures (tenant, dataset_id, image_digest, time_s) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (tenant, dataset_id, image_digest) DO UPDATE SET time_s = excluded.time_s",
        [(record.tenant, record.dataset_id, image_digest, time_s) for record in records],
    )


def erasures_of(connection: Connection, image_digest: str, tenant: str) -> dict[str, float]:
    """Returns when an image was erased, by dataset; seconds since 1970."""
    rows = connection.execute(
        "SELECT dataset_id, time_s FROM erasures WHERE tenant = ? AND image_digest = ?",
        (tenant, image_digest),
    )
    return {row["dataset_id"]: row["time_s"] for row in rows}


def erased_since(
    connection: Connection, dataset_ids: Iterable[str], tenant: str, since_s: float
) -> int:
    """Counts the images that were erased from any of some datasets since a time.

    For a version that is published now: so many of what its job read at that time are gone.
    """
    wanted = list(dataset_ids)
    if not wanted:
        return 0
    (count,) = connection.execute(
        "SELECT COUNT(DISTINCT image_digest) FROM erasures"  # nosec B608  # noqa: S608 - marks
        f" WHERE tenant = ? AND time_s >= ? AND dataset_id IN ({marks(wanted)})",
        (tenant, since_s, *wanted),
    ).fetchone()
    return int(count)


def id_of(tenant: str, digest: str) -> str:
    """Returns the id of a tenant's dataset of a digest."""
    # From which nobody can tell what another tenant's dataset of the same images is called.
    if tenant != DEFAULT_TENANT:
        digest = hashlib.sha256(f"{tenant}\0{digest}".encode()).hexdigest()
    return f"ds-{digest[:20]}"


def find(connection: Connection, dataset_id: str, tenant: str) -> DatasetRecord:
    """Returns a tenant's dataset; raises NotFound (DATASET_NOT_FOUND)."""
    row = connection.execute(
        "SELECT * FROM datasets WHERE tenant = ? AND dataset_id = ?", (tenant, dataset_id)
    ).fetchone()
    if row is None:
        raise _not_found(dataset_id)
    return record_of(row)


def _not_found(dataset_id: str, field: str = "") -> NotFound:
    return NotFound(
        Reason.DATASET_NOT_FOUND,
        f"no dataset has the id {shown(dataset_id)}: upload it, or take one of the list of "
        "datasets",
        field=field,
    )


def find_digest(connection: Connection, digest: str, tenant: str) -> DatasetRecord | None:
    """Returns a tenant's dataset of a digest, where there is one."""
    row = connection.execute(
        "SELECT * FROM datasets WHERE tenant = ? AND digest = ?", (tenant, digest)
    ).fetchone()
    return None if row is None else record_of(row)


def delete_unused(connection: Connection, before_s: float) -> int:
    """Deletes some datasets that are older, that nothing holds or was trained on; counts them."""
    deleted = connection.execute(
        "DELETE FROM datasets WHERE (tenant, dataset_id) IN (SELECT tenant, dataset_id"
        " FROM datasets AS old WHERE create_time_s < ? AND NOT EXISTS (SELECT 1 FROM holds"
        " WHERE holds.tenant = old.tenant AND kind = 'dataset' AND name = old.dataset_id)"
        " AND NOT EXISTS (SELECT 1 FROM version_sources AS s"
        " WHERE s.tenant = old.tenant AND s.dataset_id = old.dataset_id) LIMIT ?)",
        (before_s, _PAGE),
    )
    return deleted.rowcount


def check_usable(
    connection: Connection,
    tenant: str,
    dataset_id: str,
    field: str = "dataset_id",
    *,
    is_target: bool = False,
    is_alone: bool = False,
) -> None:
    """Raises NotFound (DATASET_NOT_FOUND), or InvalidInput for one that has no classes to learn.

    One that `is_alone`, without the images of a base, needs two. Another tenant's is not found.
    """
    row = connection.execute(
        "SELECT is_unlabelled, classes_json FROM datasets WHERE tenant = ? AND dataset_id = ?",
        (tenant, dataset_id),
    ).fetchone()
    if row is None:
        raise _not_found(dataset_id, field)
    if row["is_unlabelled"] and not is_target:
        raise unusable_dataset(
            f"dataset {dataset_id} was uploaded without classes, so that it can be the target of "
            "domain adaptation alone: upload its images with their classes to learn from them",
            field,
        )
    if is_alone:
        classes = msgspec.json.decode(row["classes_json"], type=list[ClassCount])
        check_classes([count.label for count in classes], field)


def check_classes(labels: Collection[str], field: str) -> None:
    """Raises InvalidInput (DATASET_UNUSABLE) for fewer classes than can be told apart."""
    if len(labels) < _MIN_CLASSES:
        named = f" ({', '.join(map(shown, labels))})" if labels else ""
        raise unusable_dataset(
            f"the images are of {len(labels)} class{named}, and {_MIN_CLASSES} are needed to tell "
            "apart: add images of another class, or go on from a version that has some",
            field,
        )


def record_of(row: Any) -> DatasetRecord:
    """Returns the dataset of a row."""
    return DatasetRecord(
        dataset_id=row["dataset_id"],
        tenant=row["tenant"],
        display_name=row["display_name"],
        digest=row["digest"],
        create_time_s=row["create_time_s"],
        size_bytes=row["size_bytes"],
        classes=msgspec.json.decode(row["classes_json"], type=list[ClassCount]),
        image_count=row["image_count"],
        erased_count=row["erased_count"],
        summary=msgspec.json.decode(row["summary_json"], type=ReadSummary),
        case_sensitive=bool(row["case_sensitive"]),
        is_unlabelled=bool(row["is_unlabelled"]),
        index_digest=row["index_digest"],
    )


def stored_bytes(connection: Connection, tenant: str) -> int:
    """Counts what a tenant's datasets take; what several of them share counts once."""
    (stored,) = connection.execute(
        "SELECT COALESCE(SUM(size_bytes), 0) FROM blobs WHERE digest IN"
        " (SELECT digest FROM dataset_packs WHERE tenant = ?"
        " UNION SELECT index_digest FROM datasets WHERE tenant = ?)",
        (tenant, tenant),
    ).fetchone()
    return int(stored)
