"""Versions as rows of the database; every function works in its caller's transaction."""

import time
from typing import Any

import msgspec

from service.domain import GateCheck, ImageDecoding, Manifest, ModelFiles, ModelKey
from service.storage import backbone_rows, dataset_rows, missing, version_sources
from service.storage.database import Connection
from service.storage.records import NewVersion, VersionRecord


def insert(connection: Connection, new: NewVersion, manifest: Manifest) -> int:
    """Writes the row of a model's next version, and its sources'; returns its number."""
    stored, decoding, now = new.stored, manifest.decoding, time.time()
    (version,) = connection.execute(
        "INSERT INTO models (tenant, name, create_time_s, last_version) VALUES (?, ?, ?, 1)"
        " ON CONFLICT (tenant, name) DO UPDATE SET last_version = models.last_version + 1"
        " RETURNING last_version",
        (*new.model, now),
    ).fetchone()
    connection.execute(
        "INSERT INTO versions (tenant, model, version, job_id, create_time_s, manifest_digest,"
        " head_digest, backbone_digest, answers_digest, report_json_digest, report_html_digest,"
        " backbone, background, bit_depth, image_size, framing, gate_checks_json, is_candidate,"
        " erased_images, size_bytes, backbone_bytes)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *new.model,
            version,
            new.job_id,
            now,
            stored.manifest_blob.digest,
            stored.head.digest,
            stored.backbone.digest,
            stored.answers.digest,
            stored.report_json.digest,
            stored.report_html.digest,
            manifest.backbone,
            decoding.background,
            decoding.bit_depth,
            decoding.size,
            decoding.framing,
            msgspec.json.encode(manifest.gate_checks).decode(),
            int(bool(manifest.gate_failures)),
            dataset_rows.erased_since(
                connection,
                {source.dataset_id for source in new.sources} - {""},
                new.model.tenant,
                new.read_s,
            ),
            sum(blob.size_bytes for blob in stored.own),
            # A pretrained one is everybody's.
            0 if backbone_rows.is_kept(manifest) else stored.backbone.size_bytes,
        ),
    )
    version_sources.note(connection, *new.model, version, new.sources)
    return int(version)


def get(connection: Connection, model: ModelKey, version: int) -> Any:
    """Returns a version's row; raises NotFound (MODEL_NOT_FOUND or VERSION_NOT_FOUND)."""
    row = connection.execute(
        "SELECT * FROM versions WHERE tenant = ? AND model = ? AND version = ?", (*model, version)
    ).fetchone()
    if row is None:
        missing.check_model(connection, model)
        raise missing.version_not_found(connection, model, version)
    return row


def record_of(row: Any, aliases: dict[str, int]) -> VersionRecord:
    """Returns the version of a row of the table `versions`, with those of its model's aliases."""
    return VersionRecord(
        model=ModelKey(row["tenant"], row["model"]),
        version=row["version"],
        create_time_s=row["create_time_s"],
        job_id=row["job_id"],
        manifest_digest=row["manifest_digest"],
        head_digest=row["head_digest"],
        backbone_digest=row["backbone_digest"],
        answers_digest=row["answers_digest"],
        report_json_digest=row["report_json_digest"],
        report_html_digest=row["report_html_digest"],
        backbone=row["backbone"],
        decoding=_decoding(row),
        gate_checks=tuple(gate_checks(row)),
        aliases=tuple(alias for alias, number in aliases.items() if number == row["version"]),
        is_candidate=bool(row["is_candidate"]),
        erased_images=row["erased_images"],
    )


def files_of(row: Any) -> ModelFiles:
    """Returns what the engine needs of a row of the table `versions`."""
    return ModelFiles(
        ModelKey(row["tenant"], row["model"]),
        row["version"],
        row["backbone_digest"],
        row["head_digest"],
        _decoding(row),
    )


def _decoding(row: Any) -> ImageDecoding:
    """Returns how images of a row of the table `versions` become pixels."""
    return ImageDecoding(row["background"], row["bit_depth"], row["image_size"], row["framing"])


def gate_checks(row: Any) -> list[GateCheck]:
    """Returns the conditions of the gate of a row of the table `versions`, as published."""
    return msgspec.json.decode(row["gate_checks_json"], type=list[GateCheck])


def stored_bytes(connection: Connection, tenant: str) -> int:
    """Counts what a tenant's versions take; a backbone that several share counts once."""
    (stored,) = connection.execute(
        "SELECT (SELECT COALESCE(SUM(size_bytes), 0) FROM versions WHERE tenant = ?)"
        " + (SELECT COALESCE(SUM(bytes), 0) FROM (SELECT MAX(backbone_bytes) AS bytes"
        " FROM versions WHERE tenant = ? AND backbone_bytes > 0 GROUP BY backbone_digest)"
        " AS backbones)",
        (tenant, tenant),
    ).fetchone()
    return int(stored)
