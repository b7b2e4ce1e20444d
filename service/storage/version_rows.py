"""Models' versions: the records of them, their rows, and what they were trained on.

Owns the tables version_sources and version_labels, and the column erased_images of versions.
Errors of models and versions that are not there name what there is instead. Every function works
in its caller's transaction.
"""

import difflib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.contract import Gate
from service.domain import (
    GateCheck,
    ImageDecoding,
    Manifest,
    ModelFiles,
    ModelKey,
    VersionSource,
    gate_failures,
)
from service.errors import GraftError, NotFound, Reason, bad_field
from service.storage import backbone_rows, dataset_rows
from service.storage.blobs import Blob
from service.storage.database import Connection, marks

_NEIGHBOURS = 8
"""Names compared on either side of the one that is missing."""
_COMPARED = 40
"""Characters of them: a comparison of long names takes up to 2 ms, on the event loop too."""
_SHOWN = 10


@dataclass(frozen=True)
class ModelRecord:
    """A named line of versions."""

    key: ModelKey
    create_time_s: float
    update_time_s: float
    aliases: dict[str, int]
    version_count: int


@dataclass(frozen=True, kw_only=True)
class VersionRecord:
    """A published version as its row has it; `ModelStore.manifest` tells the rest."""

    model: ModelKey
    version: int
    create_time_s: float
    job_id: str
    manifest_digest: str
    head_digest: str
    backbone_digest: str
    answers_digest: str
    report_json_digest: str
    report_html_digest: str
    backbone: str
    """As requests name it."""
    decoding: ImageDecoding
    gate_checks: tuple[GateCheck, ...]
    aliases: tuple[str, ...]
    is_candidate: bool
    erased_images: int = 0
    """Images that it was trained or measured on and that were erased since."""

    @property
    def files(self) -> ModelFiles:
        """Returns what the engine needs of it."""
        return ModelFiles(
            self.model, self.version, self.backbone_digest, self.head_digest, self.decoding
        )

    @property
    def gate_failures(self) -> list[str]:
        """Lists what of its gate it did not reach, for people."""
        return gate_failures(self.gate_checks)


@dataclass(frozen=True, kw_only=True)
class StoredVersion:
    """A trainer's result whose files are stored, and that is not published yet."""

    manifest: Manifest
    manifest_blob: Blob
    head: Blob
    backbone: Blob
    answers: Blob
    report_json: Blob
    report_html: Blob
    reference: Blob | None = None
    """Of a shared backbone's float form."""

    @property
    def own(self) -> list[Blob]:
        """Lists all of its files but for the backbone, which versions may share."""
        return [self.manifest_blob, self.head, self.answers, self.report_json, self.report_html]

    def files(self, model: ModelKey) -> ModelFiles:
        """Returns what the engine needs of it, as a version of `model`."""
        return ModelFiles(model, 0, self.backbone.digest, self.head.digest, self.manifest.decoding)


@dataclass(frozen=True, kw_only=True)
class NewVersion:
    """A version that is to be published."""

    model: ModelKey
    job_id: str
    stored: StoredVersion
    sources: Sequence[VersionSource] = ()
    """What it was trained on, its base's first."""
    read_s: float = float("inf")
    """When its job read these, seconds since 1970: images may have been erased since."""
    gate: Gate | None = None
    max_stored_bytes: int | None = None
    """What its tenant may store; None for no limit."""


@dataclass(frozen=True)
class Publication:
    """A version that was made; with gate failures it is a candidate."""

    version: int
    manifest: Manifest
    """With its gate's checks as published."""


@dataclass(frozen=True)
class RolledBack:
    """An alias that points to an earlier version again."""

    model: ModelRecord
    from_version: int
    to_version: int


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
    note_sources(connection, *new.model, version, new.sources)
    connection.executemany(
        "INSERT INTO version_labels (tenant, model, version, key, value) VALUES (?, ?, ?, ?, ?)",
        [(*new.model, version, *label) for label in manifest.labels.items()],
    )
    return int(version)


def with_labels(labels: Mapping[str, str]) -> tuple[str, list[str]]:
    """Returns the condition on `models` that one version has all of these, and its values."""
    if not labels:
        return "", []
    has_label = (
        " AND EXISTS (SELECT 1 FROM version_labels AS l WHERE l.tenant = v.tenant"
        " AND l.model = v.model AND l.version = v.version AND l.key = ? AND l.value = ?)"
    )
    version = "SELECT 1 FROM versions AS v WHERE v.tenant = models.tenant AND v.model = models.name"
    values = [text for label in labels.items() for text in label]
    return f" AND EXISTS ({version}{has_label * len(labels)})", values


def get(connection: Connection, model: ModelKey, version: int) -> Any:
    """Returns a version's row; raises NotFound (MODEL_NOT_FOUND or VERSION_NOT_FOUND)."""
    row = connection.execute(
        "SELECT * FROM versions WHERE tenant = ? AND model = ? AND version = ?", (*model, version)
    ).fetchone()
    if row is None:
        check_model(connection, model)
        raise version_not_found(connection, model, version)
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
        decoding=ImageDecoding(
            row["background"], row["bit_depth"], row["image_size"], row["framing"]
        ),
        gate_checks=tuple(gate_checks(row)),
        aliases=tuple(alias for alias, number in aliases.items() if number == row["version"]),
        is_candidate=bool(row["is_candidate"]),
        erased_images=row["erased_images"],
    )


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


def note_sources(
    connection: Connection, tenant: str, model: str, version: int, sources: Sequence[VersionSource]
) -> None:
    """Notes the sources of a version, the oldest first."""
    connection.executemany(
        "INSERT INTO version_sources (tenant, model, version, position, role, dataset_id, folder)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (tenant, model, version, position, each.role, each.dataset_id, each.folder)
            for position, each in enumerate(sources)
        ],
    )


def mark_erased(connection: Connection, tenant: str, dataset_ids: Collection[str]) -> None:
    """Counts an image that was erased from datasets for every version that was trained on one."""
    if not dataset_ids:
        return
    connection.execute(
        "UPDATE versions SET erased_images = erased_images + 1 WHERE tenant = ? AND EXISTS"  # nosec B608  # noqa: S608 - marks
        " (SELECT 1 FROM version_sources AS s WHERE s.tenant = versions.tenant"
        " AND s.model = versions.model AND s.version = versions.version"
        f" AND s.dataset_id IN ({marks(dataset_ids)}))",
        (tenant, *dataset_ids),
    )


def trained_on(
    connection: Connection, tenant: str, before_s: Mapping[str, float]
) -> list[tuple[str, int]]:
    """Returns models with numbers of versions that were published on a dataset before its time."""
    found = set()
    for dataset_id, time_s in before_s.items():
        rows = connection.execute(
            "SELECT v.model, v.version FROM version_sources AS s JOIN versions AS v"
            " ON v.tenant = s.tenant AND v.model = s.model AND v.version = s.version"
            " WHERE s.tenant = ? AND s.dataset_id = ? AND v.create_time_s <= ?",
            (tenant, dataset_id, time_s),
        )
        found |= {(row["model"], row["version"]) for row in rows}
    return sorted(found)


def check_model(connection: Connection, model: ModelKey) -> None:
    """Raises what `model_not_found` makes when there is no such model."""
    found = connection.execute("SELECT 1 FROM models WHERE tenant = ? AND name = ?", model)
    if found.fetchone() is None:
        raise model_not_found(connection, model)


def model_not_found(connection: Connection, model: ModelKey) -> GraftError:
    """Makes the error for a model that does not exist; it names close ones.

    Looks only at names that sort next to it, so that it stays cheap enough for
    the event loop however many models there are.
    """
    tenant, name = model
    if not name:
        return bad_field("model", "model is empty: name one")
    shown = name if len(name) <= 80 else name[:77] + "..."
    rows = [
        *connection.execute(
            "SELECT name FROM models WHERE tenant = ? AND name >= ? ORDER BY name LIMIT ?",
            (tenant, name, _NEIGHBOURS),
        ),
        *connection.execute(
            "SELECT name FROM models WHERE tenant = ? AND name < ? ORDER BY name DESC LIMIT ?",
            (tenant, name, _NEIGHBOURS),
        ),
    ]
    names = {row["name"][:_COMPARED]: row["name"] for row in rows}
    near = difflib.get_close_matches(name[:_COMPARED], names, n=3)
    if near:
        hint = f"did you mean {' or '.join(names[each] for each in near)}?"
    elif rows:
        hint = "the list of models shows which there are"
    else:
        hint = "there are no models yet; fine-tune one"
    return NotFound(Reason.MODEL_NOT_FOUND, f"no model is called {shown!r}: {hint}")


def version_not_found(connection: Connection, model: ModelKey, version: int) -> NotFound:
    """Makes the error for a version that does not exist; it names those that do."""
    rows = connection.execute(
        "SELECT version FROM versions WHERE tenant = ? AND model = ? ORDER BY version DESC LIMIT ?",
        (*model, _SHOWN + 1),
    ).fetchall()
    newest = "newest " if len(rows) > _SHOWN else ""
    which = ", ".join(str(row["version"]) for row in reversed(rows[:_SHOWN]))
    return NotFound(
        Reason.VERSION_NOT_FOUND,
        f"model {model.name} has no version {version}; its {newest}versions are {which}",
    )
