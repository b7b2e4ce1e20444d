"""Backbones that tenants registered.

Owns the table registered_backbones. The files lie among all backbones, named by their
digests, and are shared by whoever registered the same; a row is written when its file is in
place, and a file goes with the last row that names it. The checker is handed in. `close`
makes what is being checked give up.
"""

import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec

from service.contract import ExportedBackbone, PretrainedBackbone
from service.errors import Expired, GraftError, Reason, Unavailable, WrongState
from service.ingest.backbone_process import Asked, Checker
from service.ops import failpoints
from service.storage import backbone_rows, durable, exports, quotas
from service.storage.artifacts import Artifacts
from service.storage.backbone_rows import RegisteredBackbone
from service.storage.backbone_upload import BackboneUpload, Came, Description, bad
from service.storage.database import Database

__all__ = ["BackboneStore", "BackboneUpload", "Description", "RegisteredBackbone"]


class BackboneStore:
    """All registered backbones."""

    def __init__(
        self, database: Database, artifacts: Artifacts, checker: Checker, max_bytes: int
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._checker = checker
        self._max_bytes = max_bytes
        self._closing = threading.Event()

    def begin(
        self, description: Description, *, tenant: str, max_stored_bytes: int | None
    ) -> BackboneUpload:
        """Starts to take a file in; it counts when the upload is finished.

        Raises InvalidInput, and OverQuota (stored_bytes) where the tenant has no room for it.
        """
        name, asked = description.checked()
        used = 0
        if max_stored_bytes is not None:
            with self._database.read() as connection:
                used = quotas.stored_bytes(connection, tenant)
        with durable.full_disk_told():
            folder = self._artifacts.new_folder()
        return BackboneUpload(
            folder,
            self._max_bytes,
            partial(quotas.check_room, used, bound=max_stored_bytes),
            partial(self._finished, description, name, asked, tenant, max_stored_bytes),
        )

    def exported_digest(self, backbone: str, weights: str, tenant: str) -> str:
        """Returns the digest of the file that computes a backbone; "" where none is exported."""
        with self._database.read() as connection:
            return dict(exports.forms(connection, backbone, tenant)).get(weights, "")

    def pretrained(self, tenant: str) -> list[PretrainedBackbone]:
        """Returns all of a tenant's, by name, as jobs start from them."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT * FROM registered_backbones WHERE tenant = ? ORDER BY name", (tenant,)
            ).fetchall()
            found = [
                (backbone_rows.record_of(row), exports.forms(connection, row["name"], tenant))
                for row in rows
            ]
        return [
            PretrainedBackbone(
                backbone=record.name,
                weights=record.weights,
                exported=[
                    ExportedBackbone(
                        weights,
                        str(self._artifacts.backbone_path(digest)),
                        digest,
                        record.licence,
                    )
                    for weights, digest in forms
                ],
            )
            for record, forms in found
        ]

    def page(self, after: str, count: int, tenant: str) -> list[RegisteredBackbone]:
        """Returns the first of a tenant's backbones whose names come after another."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT * FROM registered_backbones WHERE tenant = ? AND name > ?"
                " ORDER BY name LIMIT ?",
                (tenant, after, count),
            ).fetchall()
        return [backbone_rows.record_of(row) for row in rows]

    def delete(self, name: str, tenant: str, default_backbone: str) -> None:
        """Deletes a tenant's backbone.

        Raises NotFound, or WrongState (BACKBONE_IN_USE) while versions are on it, or jobs may
        be that have not ended; those that name no backbone are on `default_backbone`.
        """
        with self._database.transaction() as connection:
            record = backbone_rows.find(connection, name, tenant)
            digests = {digest for _, digest in exports.forms(connection, record.name, tenant)}
            backbone_rows.check_no_versions(connection, record, digests)
            backbone_rows.check_no_jobs(connection, record, default_backbone)
            connection.execute(
                "DELETE FROM registered_backbones WHERE tenant = ? AND name = ?",
                (tenant, record.name),
            )
            exports.forget(connection, record.name, tenant)
            unused = [digest for digest in digests if not backbone_rows.is_used(connection, digest)]
            # As of a version: after the commit, and before anybody can publish on it.
            self._database.after_commit(partial(self._remove, unused))

    def close(self) -> None:
        """Makes what is being checked give up soon, with Unavailable."""
        self._closing.set()

    def _finished(
        self,
        description: Description,
        name: str,
        asked: Asked,
        tenant: str,
        max_stored_bytes: int | None,
        came: Came,
    ) -> RegisteredBackbone:
        if description.sha256 and description.sha256.lower() != came.digest:
            raise bad(
                "sha256",
                f"the file's sha256 is {came.digest}, and another was expected: it was damaged on "
                "its way, or it is another file",
            )
        with self._database.read() as connection:
            row = backbone_rows.row_of(connection, name, tenant)
        known = None if row is None else backbone_rows.record_of(row)
        if known is not None:
            if (known.source_digest, known.asked) != (came.digest, asked):
                raise WrongState(
                    Reason.BACKBONE_IN_USE,
                    f"{name} is registered already, from another file or with another "
                    "description: choose another name, or delete it first",
                    field="description.name",
                )
            if self._artifacts.has_backbone(known.digest):
                return self._renewed(known, description.licence)
        rewritten = came.file.with_name("backbone.onnx")
        with durable.full_disk_told():
            checked = self._checker.check(
                came.file, rewritten, asked, partial(self._check_open, came)
            )
            record = RegisteredBackbone(
                tenant=tenant,
                name=name,
                digest=durable.digest_of(rewritten),
                source_digest=came.digest,
                asked=asked,
                width=checked.width,
                licence=description.licence,
                size_bytes=rewritten.stat().st_size,
                create_time_s=time.time(),
            )
            return self._keep(record, rewritten, max_stored_bytes)

    def _renewed(self, known: RegisteredBackbone, licence: str) -> RegisteredBackbone:
        now = replace(known, licence=licence or known.licence)
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE registered_backbones SET licence = ? WHERE tenant = ? AND name = ?",
                (now.licence, now.tenant, now.name),
            )
        return now

    def _keep(
        self, record: RegisteredBackbone, file: Path, max_stored_bytes: int | None
    ) -> RegisteredBackbone:
        try:
            self._artifacts.put_backbone(file, record.digest)
            failpoints.reach("backbone.stored")
            return self._noted(record, file, max_stored_bytes)
        except BaseException:
            # What cannot be told now the next start sweeps.
            with suppress(GraftError), self._database.transaction() as connection:
                if not backbone_rows.is_used(connection, record.digest):
                    remove = partial(self._artifacts.remove, backbones=[record.digest])
                    self._database.after_commit(remove)
            raise

    def _noted(
        self, record: RegisteredBackbone, file: Path, max_stored_bytes: int | None
    ) -> RegisteredBackbone:
        with self._database.transaction() as connection:
            # It may have gone with another's since; in here nobody deletes one.
            if not self._artifacts.backbone_path(record.digest).exists():
                self._artifacts.put_backbone(file, record.digest)
            row = backbone_rows.row_of(connection, record.name, record.tenant)
            if row is not None:
                known = backbone_rows.record_of(row)
                if (known.source_digest, known.digest) == (record.source_digest, record.digest):
                    return known
                raise WrongState(
                    Reason.BACKBONE_IN_USE,
                    f"{record.name} is registered already, from another file or in a form that "
                    "this Graft does not make: choose another name",
                    field="description.name",
                )
            if max_stored_bytes is not None:
                used = quotas.stored_bytes(connection, record.tenant)
                quotas.check_room(used, record.size_bytes, max_stored_bytes)
            connection.execute(
                "INSERT INTO registered_backbones (tenant, name, digest, source_digest,"
                " asked_json, width, licence, size_bytes, create_time_s)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.tenant,
                    record.name,
                    record.digest,
                    record.source_digest,
                    msgspec.json.encode(record.asked).decode(),
                    record.width,
                    record.licence,
                    record.size_bytes,
                    record.create_time_s,
                ),
            )
        failpoints.reach("backbone.kept")
        return record

    def _remove(self, digests: list[str]) -> None:
        failpoints.reach("backbone.deleted")
        self._artifacts.remove(backbones=digests)

    def _check_open(self, came: Came) -> None:
        if self._closing.is_set():
            raise Unavailable(
                Reason.SHUTTING_DOWN,
                "the service is stopping: send the file again soon",
                retry_after_s=5.0,
            )
        if came.is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: nothing is stored")
