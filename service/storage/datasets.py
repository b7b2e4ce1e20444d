"""Datasets: images that were sent, checked once and kept unchanged.

A dataset is a folder named by its id, in the shape that `service.class_folders`
reads, and a row. Equal images of two tenants are two datasets, and neither can
tell that the other has them. The folder gets its name when it is whole and flushed, the row
follows in the same step; what a crash leaves under no row is swept when the
store is made. Decoders are handed in. `close` makes what is under way give up.

A dataset without labels keeps its files in the folders that they came in: these
may name classes all the same, to measure by.
"""

import errno
import hashlib
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from service import class_folders, faults
from service.class_folders import Examined, ImageFile, SplitName
from service.domain import (
    DEFAULT_TENANT,
    ClassCount,
    JobState,
    RejectedFile,
    plain_name,
    tenant_key,
)
from service.errors import Expired, InvalidInput, NotFound, Reason, Unavailable, WrongState
from service.storage import archives, durable, pages, quotas
from service.storage.archives import ArchiveFormat, Limits
from service.storage.database import Connection, Database
from service.storage.decoders import Decoders
from service.storage.entry_names import label_problem, shown
from service.storage.uploads import Upload

__all__ = ["DatasetRecord", "DatasetStore", "Limits", "Upload"]

_MAX_REJECTED = 100
_NOT_AS_IT_WAS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO}
_MAX_DISPLAY_NAME_CHARS = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetRecord:
    """A stored set of images."""

    dataset_id: str
    tenant: str
    display_name: str
    digest: str
    """Of the images, whoever has them."""
    create_time_s: float
    size_bytes: int
    classes: list[ClassCount]
    image_count: int
    rejected: list[RejectedFile]
    rejected_count: int
    has_validation_split: bool
    is_unlabelled: bool
    """It can be the target of domain adaptation alone; `classes` is empty."""


@dataclass(frozen=True)
class _Asked:
    """What is known of a dataset before its images are."""

    display_name: str
    is_unlabelled: bool
    tenant: str
    max_stored_bytes: int | None = None
    may_be_stored: bool = False
    is_for_job: bool = False
    is_abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when the caller has left."""


class DatasetStore:
    """All datasets."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        decoders: Decoders,
        limits: Limits,
    ) -> None:
        self._database = database
        # Images are read below real paths alone; the operator may keep the folder elsewhere.
        self._folder = folder.resolve()
        self._temporary = self._folder / "tmp"
        self._decoders = decoders
        self._limits = limits
        self._closing = threading.Event()
        self._leaving_jobs = threading.Event()
        durable.make_folder(self._temporary)
        self._sweep()

    def begin_upload(
        self,
        display_name: str,
        archive_format: ArchiveFormat,
        *,
        tenant: str,
        is_unlabelled: bool = False,
        max_stored_bytes: int | None = None,
        may_be_stored: bool = False,
        is_abandoned: threading.Event | None = None,
    ) -> Upload:
        """Starts to take one dataset in; it counts when the upload is finished.

        It gives up soon once `is_abandoned` is set.

        Raises OverQuota (stored_bytes) where the tenant stores `max_stored_bytes`
        already, and the upload does as soon as it brings more than there is room for;
        of images that may be stored already, only when they turn out not to be.
        """
        if len(display_name) > _MAX_DISPLAY_NAME_CHARS:
            raise InvalidInput(
                Reason.INVALID_FIELD,
                f"display_name has more than {_MAX_DISPLAY_NAME_CHARS} characters",
                field="header.display_name",
            )
        asked = _Asked(
            display_name,
            is_unlabelled,
            tenant,
            max_stored_bytes,
            may_be_stored,
            is_abandoned=is_abandoned or threading.Event(),
        )
        check_room = self._room(asked)
        folder = self._new_folder(asked)
        return Upload(
            folder,
            self._limits,
            from_archive=partial(self._from_archive, asked, folder, archive_format),
            from_tree=partial(self._from_tree, asked),
            is_unlabelled=is_unlabelled,
            check_room=check_room,
            is_abandoned=asked.is_abandoned,
        )

    def import_archive(
        self,
        path: Path,
        *,
        tenant: str,
        is_unlabelled: bool = False,
        max_stored_bytes: int | None = None,
    ) -> DatasetRecord:
        """Stores the images of an archive on the server's disk; raises OverQuota too.

        `path` is a real path, without links; raises InvalidInput when it has become one.
        """
        asked = _Asked(path.name, is_unlabelled, tenant, max_stored_bytes, is_for_job=True)
        folder = self._new_folder(asked)
        try:
            with _opened(path) as archive:
                return self._from_archive(asked, folder, "", class_folders.by_handle(archive))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def get(self, dataset_id: str, tenant: str) -> DatasetRecord:
        """One dataset of a tenant; raises NotFound (DATASET_NOT_FOUND)."""
        with self._database.read() as connection:
            return _record(_row(connection, dataset_id, tenant))

    def list(self, page_size: int, page_token: str, tenant: str) -> tuple[list[DatasetRecord], str]:
        """A page of a tenant's, newest first, and the token of the next ("" on the last)."""
        limit = pages.size(page_size)
        kind = tenant_key(tenant, "datasets")
        before = pages.key(kind, page_token, float, str) or (float("inf"), "")
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT * FROM datasets WHERE tenant = ? AND (create_time_s, dataset_id) < (?, ?)"
                " ORDER BY create_time_s DESC, dataset_id DESC LIMIT ?",
                (tenant, *before, limit + 1),
            ).fetchall()
        records = [_record(row) for row in rows[:limit]]
        if len(rows) <= limit:
            return records, ""
        last = records[-1]
        return records, pages.token(kind, last.create_time_s, last.dataset_id)

    def stored_bytes(self, tenant: str) -> int:
        """What a tenant's datasets and versions take, together."""
        with self._database.read() as connection:
            return quotas.stored_bytes(connection, tenant)

    def check_room(self, tenant: str, max_stored_bytes: int | None) -> None:
        """Raises OverQuota (stored_bytes) where a tenant is to store nothing more."""
        if max_stored_bytes is not None:
            quotas.check_room(self.stored_bytes(tenant), 0, max_stored_bytes)

    def delete(self, dataset_id: str, tenant: str) -> None:
        """Deletes a tenant's dataset.

        Raises NotFound, or WrongState (DATASET_IN_USE) while a job needs it.
        """
        doomed = self._temporary / secrets.token_hex(8)
        with self._database.transaction() as connection:
            _row(connection, dataset_id, tenant)
            users = connection.execute(
                "SELECT job_id FROM jobs WHERE state IN (?, ?) AND (dataset_id = ? OR job_id IN"
                " (SELECT job_id FROM job_datasets WHERE dataset_id = ?))"
                " ORDER BY job_id LIMIT 3",
                (JobState.QUEUED, JobState.RUNNING, dataset_id, dataset_id),
            ).fetchall()
            if users:
                raise WrongState(
                    Reason.DATASET_IN_USE,
                    f"dataset {dataset_id} is used by {', '.join(u['job_id'] for u in users)}: "
                    "wait for its jobs to end, or cancel them",
                )
            connection.execute("DELETE FROM datasets WHERE dataset_id = ?", (dataset_id,))
            # Out of the way before the same images can be stored again.
            self._database.after_commit(partial(_move_if_there, self.path(dataset_id), doomed))
        faults.reach("dataset.moved_away")
        shutil.rmtree(doomed, ignore_errors=True)

    def path(self, dataset_id: str) -> Path:
        """Where a dataset's files lie: in a folder per class, but for one without labels."""
        return self._folder / dataset_id

    def leave_jobs(self) -> None:
        """Makes what is imported for jobs give up soon, with Unavailable; uploads go on."""
        self._leaving_jobs.set()

    def close(self) -> None:
        """Makes what unpacks or decodes give up soon, with Unavailable."""
        self._closing.set()

    def _check_open(self, asked: _Asked) -> None:
        if self._closing.is_set() or (asked.is_for_job and self._leaving_jobs.is_set()):
            raise Unavailable(
                Reason.SHUTTING_DOWN,
                "the service is stopping: send the dataset again soon",
                retry_after_s=5.0,
            )
        if asked.is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: nothing is stored")

    def _new_folder(self, asked: _Asked) -> Path:
        self._check_open(asked)
        folder = self._temporary / secrets.token_hex(8)
        with durable.full_disk_told():
            folder.mkdir()
        return folder

    def _from_archive(
        self, asked: _Asked, folder: Path, archive_format: ArchiveFormat, archive: Path
    ) -> DatasetRecord:
        tree = folder / "unpacked"
        tree.mkdir()
        check_open = partial(self._check_open, asked)
        archives.unpack(archive, tree, archive_format, self._limits, check_open, self._room(asked))
        faults.reach("dataset.unpacked")
        return self._from_tree(asked, tree)

    def _room(self, asked: _Asked) -> Callable[[int], None] | None:
        """Raises OverQuota for so many bytes beside what the tenant stores now."""
        if asked.max_stored_bytes is None or asked.may_be_stored:
            return None
        used = self.stored_bytes(asked.tenant)
        quotas.check_room(used, 0, asked.max_stored_bytes)
        return partial(quotas.check_room, used, bound=asked.max_stored_bytes)

    def _from_tree(self, asked: _Asked, tree: Path) -> DatasetRecord:
        is_unlabelled = asked.is_unlabelled
        files = class_folders.find_any(tree) if is_unlabelled else _labelled(tree)
        run = partial(self._decoders.map, go_on=partial(self._check_open, asked))
        images, rejected = class_folders.examine(files, self._size, tree, run)
        _check_usable(images, files, rejected, is_unlabelled)
        for refused in rejected:
            (tree / refused.path).unlink(missing_ok=True)
        digest = (
            class_folders.digest_by_folder(images, tree)
            if is_unlabelled
            else class_folders.digest(images)
        )
        record = DatasetRecord(
            dataset_id=_id(asked.tenant, digest),
            tenant=asked.tenant,
            display_name=asked.display_name,
            digest=digest,
            create_time_s=time.time(),
            size_bytes=sum(image.decoded for image in images),
            classes=[] if is_unlabelled else _counts(images),
            image_count=len(images),
            rejected=rejected[:_MAX_REJECTED],
            rejected_count=len(rejected),
            has_validation_split=any(image.file.split == "val" for image in images),
            is_unlabelled=is_unlabelled,
        )
        with durable.full_disk_told():
            durable.sync_tree(tree)
            return self._keep(record, tree, asked.max_stored_bytes)

    def _size(self, data: bytes) -> int:
        # The pixels are not kept: a dataset of them would not fit into memory.
        self._decoders.check(data)
        return len(data)

    def _keep(
        self, record: DatasetRecord, tree: Path, max_stored_bytes: int | None
    ) -> DatasetRecord:
        # Unique among those of all tenants.
        digest = tenant_key(record.tenant, record.digest)
        with self._database.transaction() as connection:
            known = connection.execute(
                "SELECT * FROM datasets WHERE digest = ?", (digest,)
            ).fetchone()
            if known is not None:
                return _record(known)
            if max_stored_bytes is not None:
                used = quotas.stored_bytes(connection, record.tenant)
                quotas.check_room(used, record.size_bytes, max_stored_bytes)
            # Without a row its name must be free: the same images may come again.
            kept = self.path(record.dataset_id)
            if kept.exists():
                # What a step after an earlier transaction could not move away.
                kept.rename(tree.with_name(secrets.token_hex(8)))
            self._database.after_rollback(partial(_move_back, kept, tree))
            tree.rename(kept)
            durable.sync_folder(self._folder)
            faults.reach("dataset.renamed")
            connection.execute(
                "INSERT INTO datasets (dataset_id, display_name, digest, create_time_s,"
                " size_bytes, classes_json, image_count, rejected_json, rejected_count,"
                " has_validation_split, is_unlabelled, tenant)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    record.dataset_id,
                    record.display_name,
                    digest,
                    record.create_time_s,
                    record.size_bytes,
                    msgspec.json.encode(record.classes).decode(),
                    record.image_count,
                    msgspec.json.encode(record.rejected).decode(),
                    record.rejected_count,
                    int(record.has_validation_split),
                    int(record.is_unlabelled),
                    record.tenant,
                ),
            )
        faults.reach("dataset.kept")
        return record

    def _sweep(self) -> None:
        with self._database.read() as connection:
            live = {
                row["dataset_id"] for row in connection.execute("SELECT dataset_id FROM datasets")
            }
        unknown = [p for p in self._folder.iterdir() if p.name not in live and p != self._temporary]
        for path in [*unknown, *self._temporary.iterdir()]:
            shutil.rmtree(path, ignore_errors=True)
        if unknown:
            log.warning("swept %d datasets that were never finished", len(unknown))


def _opened(archive: Path) -> BinaryIO:
    try:
        return class_folders.open_plain(archive, archive.parent)
    except (InvalidInput, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_AS_IT_WAS:
            raise
        raise InvalidInput(
            Reason.ARCHIVE_UNREADABLE,
            "the archive has gone, cannot be read, or has become a link since it was looked at: "
            "put it back",
        ) from error


def _labelled(tree: Path) -> list[ImageFile]:
    files = class_folders.find(tree)
    for label in sorted({file.label for file in files}):
        if problem := label_problem(label):
            raise InvalidInput(
                Reason.DATASET_UNUSABLE, f"{problem}: rename the folder {shown(label)}"
            )
    return files


def _check_usable(
    images: Sequence[Examined[int]],
    files: Collection[ImageFile],
    rejected: Sequence[RejectedFile],
    is_unlabelled: bool,
) -> None:
    why = f"of {len(files)} files {len(rejected)} are no readable images"
    first = f", such as {shown(rejected[0].path)} ({rejected[0].detail})" if rejected else ""
    if is_unlabelled:
        if not images:
            raise InvalidInput(Reason.DATASET_UNUSABLE, f"no image was found: {why}{first}")
        return
    trained = {image.file.label for image in images if image.file.split != "val"}
    if len(trained) >= 2:
        unknown = {image.file.label for image in images} - trained
        if not unknown:
            return
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"{shown(min(unknown))} has validation images and none to learn from: add some, or "
            "leave the class out",
        )
    raise InvalidInput(
        Reason.DATASET_UNUSABLE,
        f"images to learn from were found for {_classes(len(trained))}, and 2 are needed: {why}"
        f"{first}",
    )


def _counts(images: Sequence[Examined[int]]) -> list[ClassCount]:
    train: dict[str, int] = {}
    validation: dict[str, int] = {}
    for image in images:
        split: SplitName = image.file.split
        counts = validation if split == "val" else train
        counts[image.file.label] = counts.get(image.file.label, 0) + 1
    return [ClassCount(label, train[label], validation.get(label, 0)) for label in sorted(train)]


def _id(tenant: str, digest: str) -> str:
    # From which nobody can tell what another tenant's dataset of the same images is called.
    if tenant != DEFAULT_TENANT:
        digest = hashlib.sha256(f"{tenant}\0{digest}".encode()).hexdigest()
    return f"ds-{digest[:20]}"


def _row(connection: Connection, dataset_id: str, tenant: str) -> Any:
    row = connection.execute(
        "SELECT * FROM datasets WHERE dataset_id = ? AND tenant = ?", (dataset_id, tenant)
    ).fetchone()
    if row is None:
        raise NotFound(
            Reason.DATASET_NOT_FOUND,
            f"no dataset has the id {shown(dataset_id)}: upload it, or see ListDatasets",
        )
    return row


def _record(row: Any) -> DatasetRecord:
    return DatasetRecord(
        dataset_id=row["dataset_id"],
        tenant=row["tenant"],
        display_name=row["display_name"],
        digest=plain_name(row["digest"]),
        create_time_s=row["create_time_s"],
        size_bytes=row["size_bytes"],
        classes=msgspec.json.decode(row["classes_json"], type=list[ClassCount]),
        image_count=row["image_count"],
        rejected=msgspec.json.decode(row["rejected_json"], type=list[RejectedFile]),
        rejected_count=row["rejected_count"],
        has_validation_split=bool(row["has_validation_split"]),
        is_unlabelled=bool(row["is_unlabelled"]),
    )


def _move_back(kept: Path, tree: Path) -> None:
    if not tree.exists():
        kept.rename(tree)


def _move_if_there(source: Path, target: Path) -> None:
    faults.reach("dataset.deleted")
    if source.exists():
        source.rename(target)


def _classes(count: int) -> str:
    return f"{count or 'no'} class" if count < 2 else f"{count} classes"
