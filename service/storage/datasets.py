"""Datasets: images that were sent, checked once and kept unchanged.

Equal images of two tenants are two datasets, and neither can tell that the other has them. How
they are kept is `dataset_keeping`'s; the reader is handed in. `close` makes what is under way
give up.

A dataset without labels keeps the names of the folders that its images came in: these
may name classes all the same, to measure by.
"""

import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from service.contract import ImageSource
from service.errors import Expired, Reason, WrongState, bad_field, stopping
from service.ingest.archives import ArchiveFormat, Limits
from service.ingest.names import shown
from service.ingest.process import ReaderProcesses
from service.ingest.reader import INDEX_FILE, PACK_FILE, OnProgress, OverRoom, ReadRequest, untold
from service.ops import failpoints
from service.ops.escaping import may_name
from service.storage import dataset_rows, fsync, holds, pagination
from service.storage.database import Database, now_s
from service.storage.dataset_keeping import DatasetKeeper, Made
from service.storage.dataset_rows import DatasetRecord
from service.storage.quotas import Quotas, check_room
from service.storage.uploads import Upload

_MAX_DISPLAY_NAME_CHARS = 256


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
    base: DatasetRecord | None = None
    """The dataset that the images are added to."""


class DatasetStore:
    """All datasets."""

    def __init__(
        self,
        database: Database,
        keeper: DatasetKeeper,
        reader: ReaderProcesses,
        limits: Limits,
        quotas: Quotas,
    ) -> None:
        self._database = database
        self._keeper = keeper
        self._quotas = quotas
        self._reader = reader
        self._limits = limits
        self._closing = threading.Event()
        self._leaving_jobs = threading.Event()

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
        check_display_name(display_name)
        asked = _Asked(
            display_name,
            is_unlabelled,
            tenant,
            max_stored_bytes,
            may_be_stored,
            case_sensitive=case_sensitive,
            is_abandoned=is_abandoned or threading.Event(),
        )
        return self._begin(asked, archive_format)

    def begin_adding(
        self,
        dataset_id: str,
        display_name: str,
        archive_format: ArchiveFormat,
        *,
        tenant: str,
        max_stored_bytes: int | None = None,
    ) -> Upload:
        """Starts to take images in that make another dataset, of a dataset's and of them.

        Raises as `begin_upload`, and NotFound (DATASET_NOT_FOUND); the upload raises
        DatasetChanged when an image was erased from the dataset meanwhile.
        """
        check_display_name(display_name)
        base = self.get(dataset_id, tenant)
        asked = _Asked(
            display_name or base.display_name,
            base.is_unlabelled,
            tenant,
            max_stored_bytes,
            case_sensitive=base.case_sensitive,
            base=base,
        )
        return self._begin(asked, archive_format)

    def _begin(self, asked: _Asked, archive_format: ArchiveFormat) -> Upload:
        check_room = self._room(asked)
        self._check_open(asked.is_abandoned)
        folder = self._keeper.new_folder()
        return Upload(
            folder,
            self._limits,
            archive_format=archive_format,
            store=partial(self._read_and_keep, asked, folder),
            is_unlabelled=asked.is_unlabelled,
            check_room=check_room,
            is_abandoned=asked.is_abandoned,
            numbered_from=asked.base.image_count if asked.base else 0,
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
        self._check_open(asked.is_abandoned, is_for_job=True)
        folder = self._keeper.new_folder()
        try:
            request = ReadRequest(work=str(folder), archive=str(path), limits=self._limits)
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
    ) -> ImageSource:
        """Reads a folder of the server's for a job, where it lies; returns it with its index.

        The index goes into the folder `work`, which is made. With `most`, so many images are
        read, in turn from each class. Raises InvalidInput, and Unavailable when jobs are to stop.
        """
        work.mkdir()
        request = ReadRequest(
            tenant=tenant,
            work=str(work),
            folder=str(path),
            is_labelled=not is_unlabelled,
            case_sensitive=case_sensitive,
            most=most,
            limits=self._limits,
        )
        with fsync.full_disk_told():
            go_on = partial(self._check_open, is_abandoned or threading.Event(), is_for_job=True)
            self._reader.read(request, go_on, on_progress)
        return ImageSource(folder=str(path), index_file=str(work / INDEX_FILE))

    def get(self, dataset_id: str, tenant: str) -> DatasetRecord:
        """Returns one dataset of a tenant; raises NotFound (DATASET_NOT_FOUND)."""
        with self._database.read() as connection:
            return dataset_rows.find(connection, dataset_id, tenant)

    def source(self, dataset_id: str, tenant: str) -> ImageSource:
        """Names the files of a tenant's dataset, as a spec does; raises NotFound."""
        with self._database.read() as connection:
            record = dataset_rows.find(connection, dataset_id, tenant)
            packs = dataset_rows.packs_of(connection, dataset_id, tenant)
        return ImageSource(index=record.index_digest, packs=packs, name=dataset_id)

    def list(self, page_size: int, page_token: str, tenant: str) -> tuple[list[DatasetRecord], str]:
        """A page of a tenant's, newest first, and the token of the next ("" on the last)."""
        limit = pagination.size(page_size)
        before = pagination.key("datasets", tenant, page_token, float, str) or (float("inf"), "")
        with self._database.read() as connection:
            found = connection.execute(
                "SELECT * FROM datasets WHERE tenant = ? AND (create_time_s, dataset_id) < (?, ?)"
                " ORDER BY create_time_s DESC, dataset_id DESC LIMIT ?",
                (tenant, *before, limit + 1),
            )
            rows, more = pagination.page(found, limit, "classes_json")
        records = [dataset_rows.record_of(row) for row in rows]
        if not more:
            return records, ""
        last = records[-1]
        return records, pagination.token("datasets", tenant, last.create_time_s, last.dataset_id)

    def stored_bytes(self, tenant: str) -> int:
        """Counts what all that a tenant stores takes; see `Quotas.stored_bytes`."""
        with self._database.read() as connection:
            return self._quotas.stored_bytes(connection, tenant)

    def check_room(self, tenant: str, max_stored_bytes: int | None) -> None:
        """Raises OverQuota (stored_bytes) where a tenant is to store nothing more."""
        if max_stored_bytes is not None:
            check_room(self.stored_bytes(tenant), 0, max_stored_bytes)

    def check_usable(
        self,
        dataset_id: str,
        tenant: str,
        field: str = "dataset_id",
        *,
        is_target: bool = False,
        is_alone: bool = False,
    ) -> None:
        """Raises NotFound or InvalidInput as `dataset_rows.check_usable`."""
        with self._database.read() as connection:
            dataset_rows.check_usable(
                connection, tenant, dataset_id, field, is_target=is_target, is_alone=is_alone
            )

    def delete(self, dataset_id: str, tenant: str) -> None:
        """Deletes a tenant's dataset; what no other one names of its files is collected later.

        Raises NotFound, or WrongState (DATASET_IN_USE) while a job needs it.
        """
        with self._database.transaction(f"tenant:{tenant}") as connection:
            dataset_rows.find(connection, dataset_id, tenant)
            if users := holds.holders(connection, tenant, "dataset", dataset_id):
                raise WrongState(
                    Reason.DATASET_IN_USE,
                    f"dataset {dataset_id} is used by {', '.join(users[:3])}: wait for its jobs to "
                    "end, or cancel them",
                )
            connection.execute(
                "DELETE FROM datasets WHERE tenant = ? AND dataset_id = ?", (tenant, dataset_id)
            )
        failpoints.reach("dataset.deleted")

    def delete_unused(self, older_than_s: float) -> int:
        """Deletes older datasets that no job holds and no version was trained on; counts them."""
        deleted = 0
        while True:
            with self._database.transaction() as connection:
                count = dataset_rows.delete_unused(connection, now_s(connection) - older_than_s)
            deleted += count
            if not count:
                return deleted

    def leave_jobs(self) -> None:
        """Makes what is imported for jobs give up soon, with Unavailable; uploads go on."""
        self._leaving_jobs.set()

    def close(self) -> None:
        """Makes what unpacks or decodes give up soon, with Unavailable."""
        self._closing.set()

    def _check_open(self, is_abandoned: threading.Event, *, is_for_job: bool = False) -> None:
        if self._closing.is_set() or (is_for_job and self._leaving_jobs.is_set()):
            raise stopping("send the dataset again soon")
        if is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: nothing is stored")

    def _room(self, asked: _Asked) -> Callable[[int], None] | None:
        """Raises OverQuota for so many bytes beside what the tenant stores now."""
        if asked.max_stored_bytes is None or asked.may_be_stored:
            return None
        used = self.stored_bytes(asked.tenant)
        check_room(used, 0, asked.max_stored_bytes)
        return partial(check_room, used, bound=asked.max_stored_bytes)

    def _read_and_keep(
        self, asked: _Asked, folder: Path, request: ReadRequest, on_progress: OnProgress = untold
    ) -> DatasetRecord:
        used = 0
        if asked.max_stored_bytes is not None:
            used = self.stored_bytes(asked.tenant)
            if not asked.may_be_stored:
                check_room(used, 0, asked.max_stored_bytes)
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
            with ExitStack() as kept, fsync.full_disk_told():
                if asked.base is not None:
                    index_file = kept.enter_context(self._keeper.index_file(asked.base))
                    request = msgspec.structs.replace(request, base=str(index_file))
                go_on = partial(self._check_open, asked.is_abandoned, is_for_job=asked.is_for_job)
                read = self._reader.read(request, go_on, on_progress)
        except OverRoom as error:
            assert asked.max_stored_bytes is not None, "no other upload has a room"
            check_room(used, error.size_bytes, asked.max_stored_bytes)
            raise AssertionError("what is over the room is refused") from error
        failpoints.reach("dataset.read")
        made = Made(
            read.index,
            folder / INDEX_FILE,
            read.index_digest,
            {read.pack_digest: folder / PACK_FILE} if read.pack_digest else {},
        )
        return self._keeper.keep(
            made,
            asked.tenant,
            asked.display_name,
            base=asked.base,
            max_stored_bytes=asked.max_stored_bytes,
        )


def check_display_name(display_name: str, field: str = "header.display_name") -> None:
    """Raises InvalidInput (INVALID_FIELD) for what cannot be the name of a dataset for people."""
    if len(display_name) > _MAX_DISPLAY_NAME_CHARS:
        raise bad_field(field, f"display_name has more than {_MAX_DISPLAY_NAME_CHARS} characters")
    if not may_name(display_name):
        raise bad_field(
            field,
            "display_name holds no control characters, nor any that turn the text around: "
            f"{shown(display_name)} cannot be one",
        )
