"""Published models: their versions, their aliases, and which one is meant.

Owns the tables models, versions, version_sources and pins. Version numbers are never given twice
within a model; a deleted model is gone with its numbers, and its name begins again at 1. A
version that did not pass its gate is a candidate: it has a number, and `latest` does not move to
it before it is promoted. A version's files are blobs, put before it is published; deleting one
deletes rows alone.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.contract import ExportedBackbone
from service.domain import LATEST, Manifest, ModelFiles, ModelKey, VersionSource, check_alias
from service.errors import Internal, Reason, WrongState
from service.ops import failpoints
from service.storage import aliases, backbone_rows, pagination, results, version_rows
from service.storage.blobs import Blobs
from service.storage.changes import Changes
from service.storage.database import Connection, Database
from service.storage.manifests import Manifests, with_checks
from service.storage.quotas import Quotas
from service.storage.version_rows import (
    ModelRecord,
    NewVersion,
    Publication,
    RolledBack,
    StoredVersion,
    VersionRecord,
)

_MAX_RESOLVED = 20_000
"""Limit on remembered look-ups; some 700 bytes each."""

_Asked = tuple[ModelKey, int | None, str | None]

_MODEL = (
    "SELECT models.tenant, models.name, models.create_time_s,"
    " (SELECT MAX(versions.create_time_s) FROM versions WHERE versions.tenant = models.tenant"
    " AND versions.model = models.name) AS update_time_s,"
    " (SELECT COUNT(*) FROM versions WHERE versions.tenant = models.tenant"
    " AND versions.model = models.name) AS version_count"
    " FROM models"
)


class ModelStore:
    """All published models; every method may be called from any thread."""

    def __init__(self, database: Database, blobs: Blobs, changes: Changes, quotas: Quotas) -> None:
        self._database = database
        self._blobs = blobs
        self._changes = changes
        self._quotas = quotas
        self._resolved: OrderedDict[_Asked, ModelFiles] = OrderedDict()
        """What was asked for, the least recently used first."""
        self._manifests = Manifests(blobs)
        self._generation = 0
        self._guard = threading.Lock()
        changes.listen("model", self._forget)

    def put_result(self, out_dir: Path) -> StoredVersion:
        """Stores a trainer's result, before it is published.

        Doing it again changes nothing. Raises Aborted (TRAINING_FAILED) when it is not whole,
        and as `Blobs.put_all`.
        """
        return results.put(self._blobs, out_dir)

    def publish(self, connection: Connection, new: NewVersion) -> Publication:
        """Makes the model's next version within the caller's transaction; touches no file.

        `latest`, and the gate's alias where it names one, move to it, unless it did not pass its
        gate, or what it was compared with is not what serves any more. Publishing for a job that
        has published answers with its version. Raises BlobGone where its files were collected
        since they were put (put them again), OverQuota: stored_bytes where its tenant would
        store more than it may, aliases where the gate's would be one too many.
        """
        stored, manifest, model = new.stored, new.stored.manifest, new.model
        done = connection.execute(
            "SELECT version, manifest_digest, gate_checks_json FROM versions WHERE job_id = ?",
            (new.job_id,),
        ).fetchone()
        if done is not None:
            if done["manifest_digest"] != stored.manifest_blob.digest:
                raise Internal(
                    Reason.INTERNAL,
                    f"{new.job_id} has published version {done['version']} from another result",
                )
            return Publication(
                int(done["version"]), with_checks(manifest, version_rows.gate_checks(done))
            )
        needed = [*stored.own, stored.backbone, *([stored.reference] if stored.reference else [])]
        self._blobs.reference(connection, needed)
        if new.gate is not None and new.gate.not_worse_than:
            checks = aliases.checked(
                connection,
                model,
                new.gate.not_worse_than,
                manifest.gate_checks,
                manifest.incumbent_version,
            )
            manifest = with_checks(manifest, checks)
        version = version_rows.insert(connection, new, manifest)
        self._quotas.check_version(connection, model.tenant, new.max_stored_bytes)
        failpoints.reach("version.inserted")
        if not manifest.gate_failures:
            aliases.point(connection, model, LATEST, version)
            if new.gate is not None and new.gate.alias:
                aliases.point(connection, model, new.gate.alias, version)
        backbone_rows.keep(connection, model.tenant, manifest)
        self._changes.note(connection, "model", *model)
        return Publication(version, manifest)

    def keep_exported(self, backbone: str, exported: ExportedBackbone, out_dir: Path) -> None:
        """Stores a backbone that a trainer exported, and notes it for all jobs.

        Raises Aborted (TRAINING_FAILED) when it is not whole, and as `Blobs.put_all`.
        """
        blobs = results.put_exported(self._blobs, out_dir, exported)
        with self._database.transaction() as connection:
            self._blobs.reference(connection, blobs)
            backbone_rows.keep_exported(connection, backbone_rows.EVERYBODY, backbone, exported)

    def get_model(self, model: ModelKey) -> ModelRecord:
        """Returns one model; raises NotFound (MODEL_NOT_FOUND)."""
        with self._database.read() as connection:
            return _model(connection, model)

    def list_models(
        self,
        page_size: int,
        page_token: str,
        tenant: str,
        name_prefix: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> tuple[list[ModelRecord], str]:
        """Returns a page of a tenant's models by name, and the token of the next, or "".

        Only models whose name begins with `name_prefix`, and that have a version with all of
        `labels`.
        """
        limit = pagination.size(page_size)
        (after,) = pagination.key("models", tenant, page_token, str) or ("",)
        condition, values = version_rows.with_labels(labels or {})
        with self._database.read() as connection:
            rows = connection.execute(
                f"{_MODEL} WHERE models.tenant = ? AND models.name > ?"
                f" AND substr(models.name, 1, length(?)) = ?{condition}"
                " ORDER BY models.name LIMIT ?",
                (tenant, after, name_prefix, name_prefix, *values, limit + 1),
            ).fetchall()
            models = [_model_record(connection, row) for row in rows[:limit]]
        more = len(rows) > limit
        return models, pagination.token("models", tenant, models[-1].key.name) if more else ""

    def delete_model(self, model: ModelKey, *, force: bool = False) -> None:
        """Deletes a model with its versions and aliases.

        Raises NotFound (MODEL_NOT_FOUND), or WrongState (MODEL_IN_USE) when aliases other
        than `latest` point to its versions and `force` is not given.
        """
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            version_rows.check_model(connection, model)
            if not force:
                aliases.check_unnamed(connection, model)
            aliases.forget_model(connection, model)
            connection.execute("DELETE FROM versions WHERE tenant = ? AND model = ?", model)
            connection.execute("DELETE FROM models WHERE tenant = ? AND name = ?", model)
            self._changes.note(connection, "model", *model)

    def get_version(self, model: ModelKey, version: int | None, alias: str | None) -> VersionRecord:
        """Returns a version by number, by alias, or by neither (`latest`).

        Raises NotFound with MODEL_NOT_FOUND, VERSION_NOT_FOUND or ALIAS_NOT_FOUND.
        """
        with self._database.read() as connection:
            if version is None:
                version = aliases.version_of(connection, model, alias or LATEST)
            row = version_rows.get(connection, model, version)
            return version_rows.record_of(row, aliases.all_of(connection, model))

    def sources(self, model: ModelKey, version: int) -> list[VersionSource]:
        """Returns what a version was trained on, its base's first; empty where it is gone."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT role, dataset_id, folder FROM version_sources"
                " WHERE tenant = ? AND model = ? AND version = ? ORDER BY position",
                (*model, version),
            )
            return [VersionSource(**row) for row in rows]

    def newest(self, model: ModelKey) -> VersionRecord | None:
        """Returns the newest version of a model that is not a candidate, or None."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT * FROM versions WHERE tenant = ? AND model = ? AND is_candidate = 0"
                " ORDER BY version DESC LIMIT 1",
                model,
            ).fetchone()
        return None if row is None else version_rows.record_of(row, {})

    def manifest(self, record: VersionRecord) -> Manifest:
        """Returns a version's manifest, with its gate's checks as published.

        Reads its blob where it is not in memory; raises as `Blobs.read`.
        """
        return self._manifests.of(record)

    def remembered(
        self, model: ModelKey, version: int | None, alias: str | None
    ) -> ModelFiles | None:
        """Returns what `resolve` found before, if it still holds; blocks for nothing."""
        asked = (model, version, alias)
        with self._guard:
            known = self._resolved.get(asked)
            if known is not None:
                self._resolved.move_to_end(asked)
            return known

    def resolve(self, model: ModelKey, version: int | None, alias: str | None) -> ModelFiles:
        """Returns what a version is answered by, from memory where it was asked for before.

        By number, by alias, or by neither (`latest`). Raises NotFound as `get_version`.
        """
        if (known := self.remembered(model, version, alias)) is not None:
            return known
        generation = self._generation
        with self._database.read() as connection:
            number = version
            if number is None:
                number = aliases.version_of(connection, model, alias or LATEST)
            files = version_rows.record_of(version_rows.get(connection, model, number), {}).files
        with self._guard:
            # What changed during the read may be missing from it.
            if generation == self._generation:
                self._resolved[model, version, alias] = files
                if len(self._resolved) > _MAX_RESOLVED:
                    self._resolved.popitem(last=False)
        return files

    def pin(self, model: ModelKey, version: int) -> None:
        """Has every replica keep a version in memory, in the place of the model's pinned one.

        Raises NotFound where it is not there.
        """
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            version_rows.get(connection, model, version)
            connection.execute(
                "INSERT INTO pins (tenant, model, version) VALUES (?, ?, ?)"
                " ON CONFLICT (tenant, model) DO UPDATE SET version = excluded.version",
                (*model, version),
            )
            self._changes.note(connection, "pins", *model)

    def unpin(self, model: ModelKey) -> None:
        """Ends that; a model that is not pinned is fine. Raises NotFound (MODEL_NOT_FOUND)."""
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            version_rows.check_model(connection, model)
            connection.execute("DELETE FROM pins WHERE tenant = ? AND model = ?", model)
            self._changes.note(connection, "pins", *model)

    def pinned(self) -> list[ModelFiles]:
        """Returns all versions that replicas keep in memory, of all tenants."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT versions.* FROM pins JOIN versions ON versions.tenant = pins.tenant"
                " AND versions.model = pins.model AND versions.version = pins.version"
                " ORDER BY pins.tenant, pins.model"
            )
            return [version_rows.record_of(row, {}).files for row in rows]

    def list_versions(
        self, model: ModelKey, page_size: int, page_token: str
    ) -> tuple[list[VersionRecord], str]:
        """Returns a page of a model's versions, newest first, and the token of the next, or "".

        A page is short enough for the manifests of all of it to be sent. Raises NotFound
        (MODEL_NOT_FOUND).
        """
        limit = pagination.size(page_size)
        (before,) = pagination.key("versions", model.tenant, page_token, int) or (2**62,)
        with self._database.read() as connection:
            version_rows.check_model(connection, model)
            found = connection.execute(
                "SELECT versions.*, blobs.size_bytes AS manifest_bytes FROM versions"
                " JOIN blobs ON blobs.digest = versions.manifest_digest"
                " WHERE versions.tenant = ? AND versions.model = ? AND versions.version < ?"
                " ORDER BY versions.version DESC LIMIT ?",
                (*model, before, limit + 1),
            )
            rows, more = pagination.page(found, limit, "manifest_bytes")
            named = aliases.all_of(connection, model)
        versions = [version_rows.record_of(row, named) for row in rows]
        token = pagination.token("versions", model.tenant, versions[-1].version) if more else ""
        return versions, token

    def numbers(self, model: ModelKey) -> list[int]:
        """Returns the numbers of a model's versions, newest first; raises NotFound."""
        with self._database.read() as connection:
            version_rows.check_model(connection, model)
            rows = connection.execute(
                "SELECT version FROM versions WHERE tenant = ? AND model = ? ORDER BY version DESC",
                model,
            )
            return [row["version"] for row in rows]

    def delete_version(self, model: ModelKey, version: int) -> None:
        """Deletes a version; `latest` falls back to the newest that is left and no candidate.

        Where candidates alone are left, `latest` goes. Raises NotFound, or WrongState
        (ALIAS_IN_USE) when another alias points to it or when it is the model's last one.
        """
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            version_rows.get(connection, model, version)
            named = [a for a, v in aliases.all_of(connection, model).items() if v == version]
            if others := [alias for alias in named if alias != LATEST]:
                raise WrongState(
                    Reason.ALIAS_IN_USE,
                    f"version {version} of {model.name} is called {aliases.shown(others)}: "
                    "point these aliases to another version, or delete them, first",
                )
            left, newest = connection.execute(
                "SELECT COUNT(*), MAX(CASE WHEN is_candidate = 0 THEN version END)"
                " FROM versions WHERE tenant = ? AND model = ? AND version <> ?",
                (*model, version),
            ).fetchone()
            if left == 0:
                raise WrongState(
                    Reason.ALIAS_IN_USE,
                    f"version {version} is the last one of {model.name}, and a model has "
                    "one at least: delete the model instead",
                )
            aliases.forget_version(connection, model, version)
            if named and newest is None:
                aliases.remove(connection, model, LATEST)
            elif named:
                aliases.point(connection, model, LATEST, newest)
            connection.execute(
                "DELETE FROM versions WHERE tenant = ? AND model = ? AND version = ?",
                (*model, version),
            )
            self._changes.note(connection, "model", *model)

    def promote_version(self, model: ModelKey, version: int) -> ModelRecord:
        """Publishes a candidate: `latest` moves to it, and it is none any more.

        Raises NotFound, or WrongState (NOT_A_CANDIDATE).
        """
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            if not version_rows.get(connection, model, version)["is_candidate"]:
                raise WrongState(
                    Reason.NOT_A_CANDIDATE,
                    f"version {version} of {model.name} is published already: point "
                    "an alias to it, or roll one back to it",
                )
            connection.execute(
                "UPDATE versions SET is_candidate = 0"
                " WHERE tenant = ? AND model = ? AND version = ?",
                (*model, version),
            )
            aliases.point(connection, model, LATEST, version)
            self._changes.note(connection, "model", *model)
            return _model(connection, model)

    def set_alias(self, model: ModelKey, alias: str, version: int) -> ModelRecord:
        """Points an alias to a version, a candidate too; the alias may be new.

        Raises InvalidInput, NotFound, or WrongState (ALIAS_RESERVED) for `latest`.
        """
        check_alias(alias, "alias")
        aliases.check_not_reserved(alias)
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            version_rows.get(connection, model, version)
            aliases.point(connection, model, alias, version)
            self._changes.note(connection, "model", *model)
            return _model(connection, model)

    def roll_back_alias(self, model: ModelKey, alias: str) -> RolledBack:
        """Points an alias, `latest` too, back to where it pointed before.

        Again, to the one before that; deleted versions are passed over. Raises
        NotFound, or WrongState (NO_EARLIER_VERSION).
        """
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            before, now = aliases.roll_back(connection, model, alias)
            self._changes.note(connection, "model", *model)
            return RolledBack(_model(connection, model), before, now)

    def delete_alias(self, model: ModelKey, alias: str) -> ModelRecord:
        """Removes an alias; raises NotFound, or WrongState (ALIAS_RESERVED) for `latest`."""
        aliases.check_not_reserved(alias)
        with self._database.transaction(f"tenant:{model.tenant}") as connection:
            aliases.version_of(connection, model, alias)
            aliases.remove(connection, model, alias)
            self._changes.note(connection, "model", *model)
            return _model(connection, model)

    def report(self, record: VersionRecord, html: bool) -> bytes:
        """Reads a report, UTF-8, with the version in it; raises as `Blobs.read`."""
        if html:
            return results.filled_html(
                self._blobs.read(record.report_html_digest, "report"), record
            )
        return results.filled_json(self._blobs.read(record.report_json_digest, "report"), record)

    def exported_backbones(self, backbone: str, tenant: str) -> list[ExportedBackbone]:
        """Returns the forms of a backbone that a tenant's jobs need not export again."""
        with self._database.read() as connection:
            forms = backbone_rows.forms(connection, backbone, tenant)
        # One that is missing is exported again, and put in its place.
        there = self._blobs.are_there(form.digest for form in forms)
        return [form for form in forms if form.digest in there]

    def counts(self) -> dict[str, int]:
        """Counts models, versions, aliases and backbones in use."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT (SELECT COUNT(*) FROM models) AS models,"
                " (SELECT COUNT(*) FROM versions) AS versions,"
                " (SELECT COUNT(*) FROM aliases) AS aliases,"
                " (SELECT COUNT(DISTINCT backbone_digest) FROM versions) AS backbones"
            ).fetchone()
        return dict(row)

    def _forget(self, tenant: str, name: str) -> None:
        failpoints.reach("model.changed")
        with self._guard:
            self._generation += 1
            if not name:
                self._resolved.clear()
                return
            for asked in [asked for asked in self._resolved if asked[0] == (tenant, name)]:
                del self._resolved[asked]


def _model(connection: Connection, model: ModelKey) -> ModelRecord:
    row = connection.execute(
        f"{_MODEL} WHERE models.tenant = ? AND models.name = ?", model
    ).fetchone()
    if row is None:
        raise version_rows.model_not_found(connection, model)
    return _model_record(connection, row)


def _model_record(connection: Connection, row: Any) -> ModelRecord:
    key = ModelKey(row["tenant"], row["name"])
    return ModelRecord(
        key,
        row["create_time_s"],
        row["update_time_s"],
        aliases.all_of(connection, key),
        row["version_count"],
    )
