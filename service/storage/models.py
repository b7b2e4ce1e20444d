"""Published models: their versions, their aliases, and which one is meant.

Owns the tables models and versions, and says which artifacts are live. Models are
named by their keys, in messages by what their tenants call them. Version numbers are
never given twice within a model; a deleted model is gone with its numbers, and its
name begins again at 1. A version that did not pass its gate is a candidate: it has a
number, and `latest` does not move to it before it is promoted. Writes through
`publish` belong to the caller's transaction.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from service.contract import ExportedBackbone, Gate
from service.domain import LATEST, Manifest, check_alias, plain_name, tenant_key, tenant_of
from service.errors import Reason, WrongState
from service.ops import failpoints
from service.storage import aliases, comparisons, exports, pages, quotas, suggestions, unpublished
from service.storage.artifacts import Artifacts, StoredVersion
from service.storage.database import Connection, Database
from service.storage.records import ModelRecord, Publication, Removed, RolledBack, VersionRecord
from service.storage.reports import filled_html, filled_json

_MAX_RESOLVED = 20_000
"""Bound on remembered look-ups; some 5 KB each."""

_MODEL = (
    "SELECT name, create_time_s,"
    " (SELECT MAX(create_time_s) FROM versions WHERE model = name) AS update_time_s,"
    " (SELECT COUNT(*) FROM versions WHERE model = name) AS version_count"
    " FROM models"
)


class ModelStore:
    """All published models. Sweeps the artifacts that none of them needs when made."""

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._artifacts = artifacts
        self._resolved: dict[tuple[str, int | None, str | None], VersionRecord] = {}
        self.on_removed: Callable[[Removed], None] = lambda _: None
        """Called with every committed deletion, in its thread, though its caller may have left."""
        self._generation = 0
        self._guard = threading.Lock()
        with database.read() as connection:
            rows = connection.execute("SELECT artifact_digest, backbone_digest FROM versions")
            versions, backbones = set(), set()
            for row in rows:
                versions.add(row["artifact_digest"])
                backbones.add(row["backbone_digest"])
            backbones |= exports.digests(connection)
        artifacts.sweep(versions=versions, backbones=backbones)
        quotas.measure_old(database, artifacts)

    def publish(
        self,
        connection: Connection,
        model: str,
        job_id: str,
        stored: StoredVersion,
        gate: Gate | None = None,
        max_stored_bytes: int | None = None,
    ) -> Publication:
        """Makes the model's next version within the caller's transaction.

        `latest`, and the gate's alias where it names one, move to it, unless it did
        not pass its gate, or what it was compared with is not what serves any more.
        Publishing for a job that has published answers with its version. Raises OverQuota:
        stored_bytes where its tenant would store more than `max_stored_bytes`, aliases
        where the gate's would be one too many.
        """
        done = connection.execute(
            "SELECT version, manifest_json FROM versions WHERE job_id = ?", (job_id,)
        ).fetchone()
        if done is not None:
            manifest = msgspec.json.decode(done["manifest_json"], type=Manifest)
            return Publication(int(done["version"]), manifest)
        self._artifacts.restore(stored)
        manifest = stored.manifest
        if gate is not None and gate.not_worse_than:
            manifest = comparisons.checked(connection, model, gate.not_worse_than, manifest)
        now = time.time()
        (version,) = connection.execute(
            "INSERT INTO models (name, create_time_s, last_version, tenant) VALUES (?, ?, 1, ?)"
            " ON CONFLICT (name) DO UPDATE SET last_version = last_version + 1"
            " RETURNING last_version",
            (model, now, tenant_of(model)),
        ).fetchone()
        connection.execute(
            "INSERT INTO versions (model, version, job_id, create_time_s, manifest_json,"
            " head_digest, backbone_digest, artifact_digest, is_candidate, size_bytes,"
            " backbone_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                model,
                version,
                job_id,
                now,
                msgspec.json.encode(manifest).decode(),
                stored.head_digest,
                stored.backbone_digest,
                stored.artifact_digest,
                bool(manifest.gate_failures),
                *quotas.version_bytes(self._artifacts, manifest, stored.artifact_digest),
            ),
        )
        quotas.check_version(connection, tenant_of(model), max_stored_bytes)
        failpoints.reach("version.inserted")
        if not manifest.gate_failures:
            aliases.point(connection, model, LATEST, version)
            if gate is not None and gate.alias:
                aliases.point(connection, model, gate.alias, version)
        exports.keep(connection, tenant_of(model), manifest)
        self._database.after_commit(partial(self._forget_resolved, model))
        return Publication(int(version), manifest)

    def discard(self, out_dir: Path) -> None:
        """Deletes what was stored of a trainer's result that is not published after all."""
        unpublished.discard(self._database, self._artifacts, out_dir)

    def get_model(self, name: str) -> ModelRecord:
        """One model; raises NotFound (MODEL_NOT_FOUND)."""
        with self._database.read() as connection:
            return _model(connection, name)

    def list_models(
        self, page_size: int, page_token: str, tenant: str
    ) -> tuple[list[ModelRecord], str]:
        """A page of a tenant's models by name, and the token of the next ("" on the last)."""
        limit = pages.size(page_size)
        kind = tenant_key(tenant, "models")
        (after,) = pages.key(kind, page_token, str) or ("",)
        with self._database.read() as connection:
            rows = connection.execute(
                f"{_MODEL} WHERE tenant = ? AND name > ? ORDER BY name LIMIT ?",
                (tenant, after, limit + 1),
            ).fetchall()
            models = [_model_record(connection, row) for row in rows[:limit]]
        return models, pages.token(kind, models[-1].name) if len(rows) > limit else ""

    def delete_model(self, name: str, *, force: bool = False) -> Removed:
        """Deletes a model with its versions and aliases.

        Raises NotFound (MODEL_NOT_FOUND), or WrongState (MODEL_IN_USE) when aliases other
        than `latest` point to its versions and `force` is not given.
        """
        with self._database.transaction() as connection:
            suggestions.check_model(connection, name)
            if not force:
                aliases.check_unnamed(connection, name)
            rows = connection.execute("SELECT * FROM versions WHERE model = ?", (name,)).fetchall()
            aliases.forget_model(connection, name)
            connection.execute("DELETE FROM versions WHERE model = ?", (name,))
            connection.execute("DELETE FROM models WHERE name = ?", (name,))
            return self._remove(connection, name, rows)

    def get_version(self, model: str, version: int | None, alias: str | None) -> VersionRecord:
        """Returns a version by number, by alias, or by neither (`latest`).

        Raises NotFound with MODEL_NOT_FOUND, VERSION_NOT_FOUND or ALIAS_NOT_FOUND.
        """
        with self._database.read() as connection:
            if version is None:
                version = aliases.version_of(connection, model, alias or LATEST)
            row = _version_row(connection, model, version)
            return self._version(row, aliases.all_of(connection, model))

    def newest(self, model: str) -> VersionRecord | None:
        """The newest version of a model that is no candidate; None where there is none."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT * FROM versions WHERE model = ? AND is_candidate = 0 ORDER BY version DESC",
                (model,),
            ).fetchone()
        return None if row is None else self._version(row, {})

    def remembered(
        self, model: str, version: int | None, alias: str | None
    ) -> VersionRecord | None:
        """Returns what `resolve` found before, if it still holds; blocks for nothing."""
        return self._resolved.get((model, version, alias))

    def resolve(self, model: str, version: int | None, alias: str | None) -> VersionRecord:
        """Returns a version as `get_version` does, from memory where it was asked for before."""
        asked = (model, version, alias)
        if (known := self._resolved.get(asked)) is not None:
            return known
        generation = self._generation
        record = self.get_version(model, version, alias)
        with self._guard:
            # What changed during the read may be missing from it.
            if generation == self._generation:
                if len(self._resolved) >= _MAX_RESOLVED:
                    del self._resolved[next(iter(self._resolved))]
                self._resolved[asked] = record
        return record

    def fallbacks(self, model: str, alias: str | None) -> list[int]:
        """What may answer by an alias (`latest` for None) whose version is damaged, best first.

        Empty for an alias that does not fall back, or is not there. One short read.
        """
        alias = alias or LATEST
        with self._database.read() as connection:
            if alias not in aliases.falling_back(connection, model):
                return []
            return aliases.earlier(connection, model, alias)

    def list_versions(
        self, model: str, page_size: int, page_token: str
    ) -> tuple[list[VersionRecord], str]:
        """A page of a model's versions, newest first; raises NotFound (MODEL_NOT_FOUND)."""
        limit = pages.size(page_size)
        (before,) = pages.key("versions", page_token, int) or (2**62,)
        with self._database.read() as connection:
            suggestions.check_model(connection, model)
            found = connection.execute(
                "SELECT * FROM versions WHERE model = ? AND version < ?"
                " ORDER BY version DESC LIMIT ?",
                (model, before, limit + 1),
            )
            rows, more = pages.page(found, limit, "manifest_json")
            named = aliases.all_of(connection, model)
        versions = [self._version(row, named) for row in rows]
        return versions, pages.token("versions", versions[-1].version) if more else ""

    def numbers(self, model: str) -> list[int]:
        """Returns the numbers of a model's versions, newest first; raises NotFound."""
        with self._database.read() as connection:
            suggestions.check_model(connection, model)
            rows = connection.execute(
                "SELECT version FROM versions WHERE model = ? ORDER BY version DESC", (model,)
            )
            return [row["version"] for row in rows]

    def delete_version(self, model: str, version: int) -> Removed:
        """Deletes a version; `latest` falls back to the newest that is left and no candidate.

        Where candidates alone are left, `latest` goes. Raises NotFound, or WrongState
        (ALIAS_IN_USE) when another alias points to it or when it is the model's last one.
        """
        with self._database.transaction() as connection:
            row = _version_row(connection, model, version)
            named = [a for a, v in aliases.all_of(connection, model).items() if v == version]
            if others := [alias for alias in named if alias != LATEST]:
                raise WrongState(
                    Reason.ALIAS_IN_USE,
                    f"version {version} of {plain_name(model)} is called {aliases.shown(others)}: "
                    "point these aliases to another version, or delete them, first",
                )
            left, newest = connection.execute(
                "SELECT COUNT(*), MAX(CASE WHEN is_candidate = 0 THEN version END)"
                " FROM versions WHERE model = ? AND version <> ?",
                (model, version),
            ).fetchone()
            if left == 0:
                raise WrongState(
                    Reason.ALIAS_IN_USE,
                    f"version {version} is the last one of {plain_name(model)}, and a model has "
                    "one at least: delete the model instead",
                )
            aliases.forget_version(connection, model, version)
            if named and newest is None:
                aliases.remove(connection, model, LATEST)
            elif named:
                aliases.point(connection, model, LATEST, newest)
            connection.execute(
                "DELETE FROM versions WHERE model = ? AND version = ?", (model, version)
            )
            return self._remove(connection, model, [row])

    def promote_version(self, model: str, version: int) -> ModelRecord:
        """Publishes a candidate: `latest` moves to it, and it is none any more.

        Raises NotFound, or WrongState (NOT_A_CANDIDATE).
        """
        with self._database.transaction() as connection:
            if not _version_row(connection, model, version)["is_candidate"]:
                raise WrongState(
                    Reason.NOT_A_CANDIDATE,
                    f"version {version} of {plain_name(model)} is published already: to have an "
                    "alias point to it use SetAlias, or RollbackAlias",
                )
            connection.execute(
                "UPDATE versions SET is_candidate = 0 WHERE model = ? AND version = ?",
                (model, version),
            )
            aliases.point(connection, model, LATEST, version)
            self._database.after_commit(partial(self._forget_resolved, model))
            return _model(connection, model)

    def set_alias(
        self, model: str, alias: str, version: int, *, falls_back: bool = False
    ) -> ModelRecord:
        """Points an alias to a version, a candidate too; the alias may be new.

        One that falls back is answered by where it pointed before while its version is
        damaged. Raises InvalidInput, NotFound, or WrongState (ALIAS_RESERVED) for `latest`.
        """
        check_alias(alias, "alias")
        aliases.check_not_reserved(alias)
        with self._database.transaction() as connection:
            _version_row(connection, model, version)
            aliases.point(connection, model, alias, version)
            aliases.fall_back(connection, model, alias, falls_back)
            self._database.after_commit(partial(self._forget_resolved, model))
            return _model(connection, model)

    def roll_back_alias(self, model: str, alias: str) -> RolledBack:
        """Points an alias, `latest` too, back to where it pointed before.

        Again, to the one before that; deleted versions are passed over. Raises
        NotFound, or WrongState (NO_EARLIER_VERSION).
        """
        with self._database.transaction() as connection:
            before, now = aliases.roll_back(connection, model, alias)
            self._database.after_commit(partial(self._forget_resolved, model))
            return RolledBack(_model(connection, model), before, now)

    def delete_alias(self, model: str, alias: str) -> ModelRecord:
        """Removes an alias; raises NotFound, or WrongState (ALIAS_RESERVED) for `latest`."""
        aliases.check_not_reserved(alias)
        with self._database.transaction() as connection:
            aliases.version_of(connection, model, alias)
            aliases.remove(connection, model, alias)
            self._database.after_commit(partial(self._forget_resolved, model))
            return _model(connection, model)

    def report(self, record: VersionRecord, html: bool) -> bytes:
        """Reads a report, UTF-8, with the version in it; raises Damaged (MODEL_UNLOADABLE)."""
        content = self._artifacts.report(record.artifact_digest, html=html)
        fill = filled_html if html else filled_json
        return fill(content, record.version, record.is_candidate, record.manifest.gate_failures)

    def exported_backbones(self, backbone: str, tenant: str) -> list[ExportedBackbone]:
        """Pretrained forms of a backbone that a tenant's jobs need not export again."""
        with self._database.read() as connection:
            forms = exports.forms(connection, backbone, tenant)
        return [
            ExportedBackbone(weights, str(self._artifacts.backbone_path(digest)), digest)
            for weights, digest in forms
            # One that is damaged is exported again, and put in its place.
            if self._artifacts.has_backbone(digest)
        ]

    def counts(self) -> dict[str, int]:
        """How many models, versions, aliases and backbones in use there are."""
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT (SELECT COUNT(*) FROM models) AS models,"
                " (SELECT COUNT(*) FROM versions) AS versions,"
                " (SELECT COUNT(*) FROM aliases) AS aliases,"
                " (SELECT COUNT(DISTINCT backbone_digest) FROM versions) AS backbones"
            ).fetchone()
        return dict(row)

    def _remove(self, connection: Connection, model: str, rows: list[Any]) -> Removed:
        def unused(column: str) -> list[str]:
            query = f"SELECT 1 FROM versions WHERE {column} = ? LIMIT 1"  # nosec B608  # noqa: S608 - our words
            return [
                digest
                for digest in dict.fromkeys(row[column] for row in rows)
                if connection.execute(query, (digest,)).fetchone() is None
            ]

        left = connection.execute("SELECT 1 FROM models WHERE name = ?", (model,)).fetchone()
        backbones, artifacts = unused("backbone_digest"), unused("artifact_digest")
        removed = Removed(
            model=model,
            versions=[row["version"] for row in rows],
            is_model_gone=left is None,
            backbones=backbones,
            heads=unused("head_digest"),
            paths=[
                *map(self._artifacts.backbone_path, backbones),
                *map(self._artifacts.head_path, artifacts),
            ],
        )
        unused_backbones = sorted(set(backbones) - exports.digests(connection))
        # After the commit: a version without files is worse than files without a version.
        # Before the next one, so that nobody can publish on them in between.
        self._database.after_commit(partial(self._forget_resolved, model))
        self._database.after_commit(partial(self.on_removed, removed))
        self._database.after_commit(
            partial(self._artifacts.remove, versions=artifacts, backbones=unused_backbones)
        )
        return removed

    def _version(self, row: Any, named: dict[str, int]) -> VersionRecord:
        manifest = msgspec.json.decode(row["manifest_json"], type=Manifest)
        return VersionRecord(
            files=self._artifacts.files(row, manifest.decoding),
            create_time_s=row["create_time_s"],
            job_id=row["job_id"],
            manifest=manifest,
            answers_path=self._artifacts.answers_path(row["artifact_digest"]),
            artifact_digest=row["artifact_digest"],
            aliases=tuple(a for a, number in named.items() if number == row["version"]),
            is_candidate=bool(row["is_candidate"]),
        )

    def _forget_resolved(self, model: str) -> None:
        failpoints.reach("model.changed")
        with self._guard:
            self._generation += 1
            for asked in [asked for asked in self._resolved if asked[0] == model]:
                del self._resolved[asked]


def _model(connection: Connection, name: str) -> ModelRecord:
    row = connection.execute(f"{_MODEL} WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise suggestions.model_not_found(connection, name)
    return _model_record(connection, row)


def _model_record(connection: Connection, row: Any) -> ModelRecord:
    return ModelRecord(
        row["name"],
        row["create_time_s"],
        row["update_time_s"],
        aliases.all_of(connection, row["name"]),
        row["version_count"],
        tuple(aliases.falling_back(connection, row["name"])),
    )


def _version_row(connection: Connection, model: str, version: int) -> Any:
    row = connection.execute(
        "SELECT * FROM versions WHERE model = ? AND version = ?", (model, version)
    ).fetchone()
    if row is None:
        suggestions.check_model(connection, model)
        raise suggestions.version_not_found(connection, model, version)
    return row
