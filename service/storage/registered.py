"""Backbones that tenants registered, and their files on the way in.

Owns the table registered_backbones. What came lies in a folder of its own until its end; `abort`
or the next start of the service deletes what was not finished. The file that serves becomes a
blob before its row is written; a row is known again by its file and description. The checker is
handed in. `close` makes what is being checked give up.
"""

import hashlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from service.backbones import ONNX
from service.contract import PretrainedBackbone
from service.domain import check_name
from service.errors import Expired, InvalidInput, Reason, WrongState, bad_field, stopping
from service.ingest.backbone_process import Asked, BackboneChecks
from service.ingest.names import shown
from service.ops import failpoints
from service.storage import backbone_rows, fsync
from service.storage.backbone_rows import RegisteredBackbone
from service.storage.blobs import Blob, Blobs
from service.storage.database import Database
from service.storage.quotas import Quotas, check_room

_SIZES = range(32, 1025)
"""Pixels, as `ImageDecoding.size`."""
_MAX_CHARS = 200
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is said of a file before it comes."""

    name: str
    """With or without "onnx/"."""
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    is_channels_last: bool = False
    output: str = ""
    licence: str = ""
    sha256: str = ""
    """Of the file, hex; "" where none is expected."""

    def checked(self) -> tuple[str, Asked]:
        """Returns the whole name, and how the file is to be used.

        Raises InvalidInput for the first field that is not allowed.
        """
        name = ONNX + check_name(self.name.removeprefix(ONNX), "description.name")
        if self.size not in _SIZES:
            raise _bad(
                "size",
                f"size is {self.size}: it is the side of the images in pixels, {_SIZES[0]} to "
                f"{_SIZES[-1]}",
            )
        mean = _colour("mean", self.mean, 0.0, 1.0)
        std = _colour("std", self.std, 0.001, 10.0)
        for field, text in (("output", self.output), ("licence", self.licence)):
            if len(text) > _MAX_CHARS or not (text.isprintable() or field == "output"):
                raise _bad(field, f"{field} has at most {_MAX_CHARS} characters, on one line")
        if self.sha256 and not _DIGEST.fullmatch(self.sha256):
            raise _bad("sha256", f"sha256 {shown(self.sha256)} is none: it has 64 hex digits")
        return name, Asked(
            size=self.size,
            mean=mean,
            std=std,
            layout="nhwc" if self.is_channels_last else "nchw",
            output=self.output,
        )


@dataclass(frozen=True)
class Came:
    """A file that is here whole."""

    file: Path
    digest: str
    is_abandoned: threading.Event


class BackboneUpload:
    """Takes one file in; its methods may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        check_room: Callable[[int], None],
        finish: Callable[[Came], RegisteredBackbone],
    ) -> None:
        self._folder = folder
        self._file = folder / "given.onnx"
        self._max_bytes = max_bytes
        self._check_room = check_room
        self._finish = finish
        self._lock = threading.Lock()
        self._is_abandoned = threading.Event()
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, chunk: bytes) -> None:
        """Adds the next bytes of the file; raises InvalidInput for one that is too large."""
        with self._lock, fsync.full_disk_told():
            self._bytes += len(chunk)
            self._check_room(self._bytes)
            if self._bytes > self._max_bytes:
                raise InvalidInput(
                    Reason.BACKBONE_UNUSABLE,
                    f"the file is larger than {self._max_bytes // _MIB} MiB, the most taken: "
                    "choose a smaller network, or ask the server's operator (--max-backbone-mb)",
                )
            self._digest.update(chunk)
            with self._file.open("ab") as file:
                file.write(chunk)

    def finish(self) -> RegisteredBackbone:
        """Checks and stores the file; the same one again gives the backbone that is there."""
        with self._lock:
            try:
                # An upload without a byte has no file.
                self._file.touch()
                came = Came(self._file, self._digest.hexdigest(), self._is_abandoned)
                return self._finish(came)
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Has what is being finished in another thread give up soon; waits for nothing."""
        self._is_abandoned.set()

    def abort(self) -> None:
        """Throws away what is not finished. Twice, or after the finish, is harmless."""
        self.abandon()
        with self._lock:
            shutil.rmtree(self._folder, ignore_errors=True)


class BackboneStore:
    """All registered backbones."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        quotas: Quotas,
        checker: BackboneChecks,
        *,
        work: Path,
        max_bytes: int,
    ) -> None:
        """`work` is a folder for files on their way in, which the next start empties."""
        self._database = database
        self._blobs = blobs
        self._quotas = quotas
        self._checker = checker
        self._work = work
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
                used = self._quotas.stored_bytes(connection, tenant)
        with fsync.full_disk_told():
            folder = self._work / f"backbone-{secrets.token_hex(8)}"
            folder.mkdir(parents=True)
        return BackboneUpload(
            folder,
            self._max_bytes,
            partial(check_room, used, bound=max_stored_bytes),
            partial(self._finished, description, name, asked, tenant, max_stored_bytes),
        )

    def exported_digest(self, backbone: str, weights: str, tenant: str) -> str:
        """Returns the digest of the file that computes a backbone; "" where none is exported."""
        with self._database.read() as connection:
            forms = backbone_rows.forms(connection, backbone, tenant)
        return next((form.digest for form in forms if form.weights == weights), "")

    def pretrained(self, tenant: str) -> list[PretrainedBackbone]:
        """Returns all of a tenant's, by name, as jobs start from them."""
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT * FROM registered_backbones WHERE tenant = ? ORDER BY name", (tenant,)
            ).fetchall()
            found = [
                (backbone_rows.record_of(row), backbone_rows.forms(connection, row["name"], tenant))
                for row in rows
            ]
        return [
            PretrainedBackbone(backbone=record.name, weights=record.weights, exported=forms)
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

    def delete(self, name: str, tenant: str) -> None:
        """Deletes a tenant's backbone.

        Raises NotFound, or WrongState (BACKBONE_IN_USE) while versions are on it, or jobs that
        have not ended hold it.
        """
        with self._database.transaction(f"tenant:{tenant}") as connection:
            record = backbone_rows.find(connection, name, tenant)
            backbone_rows.check_unused(connection, record)
            connection.execute(
                "DELETE FROM registered_backbones WHERE tenant = ? AND name = ?",
                (tenant, record.name),
            )
            backbone_rows.forget(connection, record.name, tenant)

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
            raise _bad(
                "sha256",
                f"the file's sha256 is {came.digest}, and another was expected: it was damaged on "
                "its way, or it is another file",
            )
        with self._database.read() as connection:
            row = backbone_rows.row_of(connection, name, tenant)
        known = None if row is None else backbone_rows.record_of(row)
        if known is not None:
            if (known.source_digest, known.asked) != (came.digest, asked):
                raise _taken(name)
            if self._blobs.are_there([known.digest]):
                return self._renewed(known, description.licence)
        rewritten = came.file.with_name("backbone.onnx")
        with fsync.full_disk_told():
            checked = self._checker.check(
                came.file, rewritten, asked, partial(self._check_open, came)
            )
            blob = self._blobs.put(rewritten)
            failpoints.reach("backbone.stored")
        record = RegisteredBackbone(
            tenant=tenant,
            name=name,
            digest=blob.digest,
            source_digest=came.digest,
            asked=asked,
            width=checked.width,
            licence=description.licence,
            size_bytes=blob.size_bytes,
            create_time_s=time.time(),
        )
        return self._inserted(record, blob, max_stored_bytes)

    def _renewed(self, known: RegisteredBackbone, licence: str) -> RegisteredBackbone:
        now = replace(known, licence=licence or known.licence)
        with self._database.transaction(f"tenant:{now.tenant}") as connection:
            connection.execute(
                "UPDATE registered_backbones SET licence = ? WHERE tenant = ? AND name = ?",
                (now.licence, now.tenant, now.name),
            )
        return now

    def _inserted(
        self, record: RegisteredBackbone, blob: Blob, max_stored_bytes: int | None
    ) -> RegisteredBackbone:
        with self._database.transaction(f"tenant:{record.tenant}") as connection:
            row = backbone_rows.row_of(connection, record.name, record.tenant)
            if row is not None:
                known = backbone_rows.record_of(row)
                if (known.source_digest, known.asked) != (record.source_digest, record.asked):
                    raise _taken(record.name)
                if known.digest == record.digest:
                    return known
            self._blobs.reference(connection, [blob])
            if max_stored_bytes is not None:
                used = self._quotas.stored_bytes(connection, record.tenant)
                check_room(used, record.size_bytes, max_stored_bytes)
            connection.execute(
                "INSERT INTO registered_backbones (tenant, name, digest, source_digest,"
                " asked_json, width, licence, size_bytes, create_time_s)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
                # Another Graft had rewritten it otherwise, and its file is missing.
                " ON CONFLICT (tenant, name) DO UPDATE SET digest = excluded.digest,"
                " width = excluded.width, size_bytes = excluded.size_bytes",
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

    def _check_open(self, came: Came) -> None:
        if self._closing.is_set():
            raise stopping("send the file again soon")
        if came.is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: nothing is stored")


def _taken(name: str) -> WrongState:
    return WrongState(
        Reason.BACKBONE_IN_USE,
        f"{name} is registered already, from another file or with another description: choose "
        "another name, or delete it first",
        field="description.name",
    )


def _colour(
    field: str, given: Sequence[float], low: float, high: float
) -> tuple[float, float, float]:
    if len(given) != 3 or not all(low <= value <= high for value in given):
        told = ", ".join(f"{value:g}" for value in given[:4]) or "empty"
        raise _bad(
            field,
            f"{field} is {told}: three numbers are needed, of red, green and blue, each {low:g} "
            f"to {high:g}; they are of values from 0 to 1, so divide those of bytes by 255",
        )
    red, green, blue = given
    return red, green, blue


def _bad(field: str, message: str) -> InvalidInput:
    """Returns the refusal of a field of the description."""
    return bad_field(f"description.{field}", message)
