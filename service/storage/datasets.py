"""Datasets: images that were sent, checked once and kept unchanged.

A dataset is a folder named by its id, with its images under numbers and the index that the
reader wrote, and a row. Equal images of two tenants are two datasets, and neither can
tell that the other has them. The folder gets its name when it is whole and flushed, the row
follows in the same step; what a crash leaves under no row is swept when the
store is made. The reader is handed in. `close` makes what is under way give up.

A dataset without labels keeps the names of the folders that its images came in: these
may name classes all the same, to measure by.
"""

import logging
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from service.domain import (
    JobState,
    tenant_key,
)
from service.errors import Expired, InvalidInput, Reason, Unavailable, WrongState
from service.ingest import index
from service.ingest.archives import ArchiveFormat, Limits
from service.ingest.index import IndexedImage
from service.ingest.names import shown
from service.ingest.reader import (
    IMAGES_FOLDER,
    INDEX_FILE,
    OnProgress,
    OverRoom,
    Reader,
    ReadRequest,
    untold,
)
from service.ops import failpoints
from service.ops.escaping import may_name
from service.storage import dataset_rows, durable, pages, quotas
from service.storage.database import Database
from service.storage.dataset_rows import DatasetRecord
from service.storage.uploads import Upload

__all__ = ["DatasetRecord", "DatasetStore", "Limits", "Upload"]

_MAX_DISPLAY_NAME_CHARS = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """What is known of a dataset before its images are."""

    display_name: str
    is_unlabelled: bool
    tenant: str
    max_stored_bytes: int | None = None
    may_be_stored: bool = False
    is_for_job: bool = False
    case_sensitive: bool = False
    is_abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when the caller has left."""


class DatasetStore:
    """All datasets."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        reader: Reader,
        limits: Limits,
    ) -> None:
        self._database = database
        # Images are read below real paths alone; the operator may keep the folder elsewhere.
        self._folder = folder.resolve()
        self._temporary = self._folder / "tmp"
        self._reader = reader
        self._limits = limits
        self._closing = threading.Event()
        self._leaving_jobs = threading.Event()
        self._used: Counter[str] = Counter()
        """Ids of the datasets that rankings work on."""
        self._using = threading.Lock()
        durable.make_folder(self._temporary)
        self._sweep()

    def begin_upload(
        self,
        display_name: str,
        archive_format: ArchiveFormat,
        *,
        tenant: str,
        is_unlabelled: bool = False,
        case_sensitive: bool = False,
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
        if not may_name(display_name):
            raise InvalidInput(
                Reason.INVALID_FIELD,
                "display_name holds no control characters, nor any that turn the text around: "
                f"{shown(display_name)} cannot be one",
                field="header.display_name",
            )
        asked = _Asked(
            display_name,
            is_unlabelled,
            tenant,
            max_stored_bytes,
            may_be_stored,
            case_sensitive=case_sensitive,
            is_abandoned=is_abandoned or threading.Event(),
        )
        check_room = self._room(asked)
        folder = self._new_folder(asked)
        return Upload(
            folder,
            self._limits,
            archive_format=archive_format,
            store=partial(self._read_and_keep, asked, folder),
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
        case_sensitive: bool = False,
        max_stored_bytes: int | None = None,
        on_progress: OnProgress = untold,
        is_abandoned: threading.Event | None = None,
    ) -> DatasetRecord:
        """Stores the images of an archive on the server's disk; raises OverQuota too.

        `path` is a real path, without links; raises InvalidInput when it has become one.
        """
        asked = _Asked(
            path.name,
            is_unlabelled,
            tenant,
            max_stored_bytes,
            is_for_job=True,
            case_sensitive=case_sensitive,
            is_abandoned=is_abandoned or threading.Event(),
        )
        folder = self._new_folder(asked)
        try:
            request = self.request(folder, archive=str(path))
            return self._read_and_keep(asked, folder, request, on_progress)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def read_folder(
        self,
        path: Path,
        work: Path,
        *,
        tenant: str,
        is_unlabelled: bool = False,
        case_sensitive: bool = False,
        most: int = 0,
        on_progress: OnProgress = untold,
        is_abandoned: threading.Event | None = None,
    ) -> Path:
        """Reads a folder of the server's for a job, where it lies; returns its index's file.

        The index goes into the folder `work`, which is made. With `most`, so many images are
        read, in turn from each class. Raises InvalidInput, and Unavailable when jobs are to stop.
        """
        asked = _Asked(
            "",
            is_unlabelled,
            tenant,
            is_for_job=True,
            is_abandoned=is_abandoned or threading.Event(),
        )
        work.mkdir()
        request = msgspec.structs.replace(
            self.request(work),
            tenant=tenant,
            folder=str(path),
            is_labelled=not is_unlabelled,
            case_sensitive=case_sensitive,
            most=most,
        )
        with durable.full_disk_told():
            self._reader.read(request, partial(self._check_open, asked), on_progress)
        return work / INDEX_FILE

    def request(self, work: Path, *, archive: str = "") -> ReadRequest:
        """Makes what the reader is asked, within the limits of this store."""
        return ReadRequest(work=str(work), archive=archive, limits=self._limits)

    def get(self, dataset_id: str, tenant: str) -> DatasetRecord:
        """One dataset of a tenant; raises NotFound (DATASET_NOT_FOUND)."""
        with self._database.read() as connection:
            return dataset_rows.record_of(dataset_rows.find(connection, dataset_id, tenant))

    def list(self, page_size: int, page_token: str, tenant: str) -> tuple[list[DatasetRecord], str]:
        """A page of a tenant's, newest first, and the token of the next ("" on the last)."""
        limit = pages.size(page_size)
        kind = tenant_key(tenant, "datasets")
        before = pages.key(kind, page_token, float, str) or (float("inf"), "")
        with self._database.read() as connection:
            found = connection.execute(
                "SELECT * FROM datasets WHERE tenant = ? AND (create_time_s, dataset_id) < (?, ?)"
                " ORDER BY create_time_s DESC, dataset_id DESC LIMIT ?",
                (tenant, *before, limit + 1),
            )
            rows, more = pages.page(found, limit, "classes_json")
        records = [dataset_rows.record_of(row) for row in rows]
        if not more:
            return records, ""
        last = records[-1]
        return records, pages.token(kind, last.create_time_s, last.dataset_id)

    def stored_bytes(self, tenant: str) -> int:
        """Counts what all that a tenant stores takes; see `quotas.stored_bytes`."""
        with self._database.read() as connection:
            return quotas.stored_bytes(connection, tenant)

    def check_room(self, tenant: str, max_stored_bytes: int | None) -> None:
        """Raises OverQuota (stored_bytes) where a tenant is to store nothing more."""
        if max_stored_bytes is not None:
            quotas.check_room(self.stored_bytes(tenant), 0, max_stored_bytes)

    @contextmanager
    def in_use(self, dataset_id: str, tenant: str) -> Iterator[Path]:
        """Keeps a tenant's dataset from being deleted; yields its folder.

        Entering may block, leaving does not. Raises NotFound (DATASET_NOT_FOUND).
        """
        with self._using:
            self._used[dataset_id] += 1
        try:
            # One that writes, so that it sees the end of a deletion that began before.
            with self._database.transaction() as connection:
                dataset_rows.find(connection, dataset_id, tenant)
            yield self.path(dataset_id)
        finally:
            with self._using:
                self._used -= Counter([dataset_id])

    def delete(self, dataset_id: str, tenant: str) -> None:
        """Deletes a tenant's dataset.

        Raises NotFound, or WrongState (DATASET_IN_USE) while a job or a ranking needs it.
        """
        doomed = self._temporary / secrets.token_hex(8)
        with self._database.transaction() as connection:
            dataset_rows.find(connection, dataset_id, tenant)
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
            if self._used[dataset_id]:
                raise WrongState(
                    Reason.DATASET_IN_USE,
                    f"dataset {dataset_id} is used by RankBackbones: wait for the call to end, or "
                    "cancel it",
                )
            connection.execute("DELETE FROM datasets WHERE dataset_id = ?", (dataset_id,))
            # Out of the way before the same images can be stored again.
            self._database.after_commit(partial(_move_if_there, self.path(dataset_id), doomed))
        failpoints.reach("dataset.moved_away")
        shutil.rmtree(doomed, ignore_errors=True)

    def path(self, dataset_id: str) -> Path:
        """Returns the folder of a dataset: its index, and its images in a folder below."""
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

    def _room(self, asked: _Asked) -> Callable[[int], None] | None:
        """Raises OverQuota for so many bytes beside what the tenant stores now."""
        if asked.max_stored_bytes is None or asked.may_be_stored:
            return None
        used = self.stored_bytes(asked.tenant)
        quotas.check_room(used, 0, asked.max_stored_bytes)
        return partial(quotas.check_room, used, bound=asked.max_stored_bytes)

    def _read_and_keep(
        self,
        asked: _Asked,
        folder: Path,
        request: ReadRequest,
        on_progress: OnProgress = untold,
    ) -> DatasetRecord:
        used = 0
        if asked.max_stored_bytes is not None:
            used = self.stored_bytes(asked.tenant)
            if not asked.may_be_stored:
                quotas.check_room(used, 0, asked.max_stored_bytes)
                request = msgspec.structs.replace(
                    request, max_new_bytes=asked.max_stored_bytes - used
                )
        request = msgspec.structs.replace(
            request,
            tenant=asked.tenant,
            is_labelled=not asked.is_unlabelled,
            case_sensitive=asked.case_sensitive,
        )
        try:
            with durable.full_disk_told():
                read = self._reader.read(request, partial(self._check_open, asked), on_progress)
        except OverRoom as error:
            assert asked.max_stored_bytes is not None, "no other upload has a room"
            quotas.check_room(used, error.size_bytes, asked.max_stored_bytes)
            raise AssertionError("what is over the room is refused") from error
        failpoints.reach("dataset.read")
        record = DatasetRecord(
            dataset_id=dataset_rows.id_of(asked.tenant, read.digest),
            tenant=asked.tenant,
            display_name=asked.display_name,
            digest=read.digest,
            create_time_s=time.time(),
            size_bytes=read.size_bytes,
            classes=read.classes,
            image_count=read.summary.used,
            summary=read.summary,
            is_unlabelled=asked.is_unlabelled,
            case_sensitive=asked.case_sensitive,
        )
        tree = folder / "dataset"
        with durable.full_disk_told():
            tree.mkdir()
            for name in (IMAGES_FOLDER, INDEX_FILE):
                (folder / name).rename(tree / name)
            durable.sync_tree(tree)
            return self._keep(record, tree, asked.max_stored_bytes)

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
                now = dataset_rows.renew(connection, dataset_rows.record_of(known), record)
                self._renew_index(now, tree)
                return now
            if max_stored_bytes is not None:
                used = quotas.stored_bytes(connection, record.tenant)
                quotas.check_room(used, record.disk_bytes, max_stored_bytes)
            # Without a row its name must be free: the same images may come again.
            kept = self.path(record.dataset_id)
            if kept.exists():
                # What a step after an earlier transaction could not move away.
                kept.rename(tree.with_name(secrets.token_hex(8)))
            self._database.after_rollback(partial(_move_back, kept, tree))
            tree.rename(kept)
            durable.sync_folder(self._folder)
            failpoints.reach("dataset.renamed")
            dataset_rows.insert(connection, record, digest)
        failpoints.reach("dataset.kept")
        return record

    def _renew_index(self, record: DatasetRecord, tree: Path) -> None:
        """Gives a stored dataset the names and the summary of the upload in `tree`.

        What was lost of its files comes back with them.
        """
        kept = self.path(record.dataset_id)
        new = index.load(tree / INDEX_FILE)
        try:
            stored = index.load(kept / INDEX_FILE)
        except (OSError, msgspec.DecodeError):
            log.warning("dataset %s had lost its index: it is stored anew", record.dataset_id)
            if kept.exists():
                kept.rename(tree.with_name(secrets.token_hex(8)))
            tree.rename(kept)
            durable.sync_folder(self._folder)
            return
        by_digest = {image.digest: image for image in new.images}

        def renew(image: IndexedImage) -> IndexedImage:
            now = by_digest.get(image.digest, image)
            return msgspec.structs.replace(image, name=now.name, depth=now.depth)

        renewed = msgspec.structs.replace(
            stored,
            summary=new.summary,
            case_sensitive=record.case_sensitive,
            images=[renew(image) for image in stored.images],
        )
        written = tree / "renewed.json"
        index.save(renewed, written)
        durable.sync_tree(tree)
        written.replace(kept / INDEX_FILE)

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


def _move_back(kept: Path, tree: Path) -> None:
    if not tree.exists():
        kept.rename(tree)


def _move_if_there(source: Path, target: Path) -> None:
    failpoints.reach("dataset.deleted")
    if source.exists():
        source.rename(target)
