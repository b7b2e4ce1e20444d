"""One dataset on its way in: the bytes of an archive, or images one by one.

Everything lies in a temporary folder of its own until `finish`, an archive as it comes, images
one after the other in one file; `abort` deletes what was not finished, and what a killed process
left is swept by its age.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

from service.domain import PartName
from service.errors import Expired, InvalidInput, Reason, bad_field, unusable_dataset
from service.ingest import labels
from service.ingest.archives import FILE_BYTES, ArchiveFormat, Limits
from service.ingest.names import file_name, shown
from service.ingest.reader import RAW_FILE, Given, ReadRequest
from service.ops import failpoints
from service.storage import fsync
from service.storage.dataset_rows import DatasetRecord

_MAX_GROUP_CHARS = 128

Store = Callable[[ReadRequest], DatasetRecord]


class Upload:
    """Takes chunks or images, never both; its methods may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        *,
        archive_format: ArchiveFormat,
        store: Store,
        is_unlabelled: bool = False,
        check_room: Callable[[int], None] | None = None,
        is_abandoned: threading.Event | None = None,
        numbered_from: int = 0,
    ) -> None:
        """Images that came before count as `numbered_from` in the names of those to come."""
        self._folder = folder
        self._check_room = check_room
        self._is_abandoned = is_abandoned or threading.Event()
        self._archive = folder / "archive"
        self._limits = limits
        self._archive_format = archive_format
        self._store = store
        self._is_unlabelled = is_unlabelled
        self._lock = threading.Lock()
        self._kind: Literal["", "archive", "images"] = ""
        self._file: IO[bytes] | None = None
        self._bytes = self._written = 0
        """What the upload counts, and what was written to its file."""
        self._given: list[Given] = []
        self._numbered_from = numbered_from

    def write(self, chunk: bytes) -> None:
        """Adds the next bytes of the archive."""
        with self._lock, fsync.full_disk_told():
            self._take("archive", len(chunk))
            self._append(self._archive, chunk)
            failpoints.reach("dataset.chunk_written")

    def add_image(
        self, label: str, content: bytes, filename: str, part: PartName, group: str = ""
    ) -> None:
        """Adds one image; whether it can be read shows at the end.

        To an unlabelled dataset, without a part; its label may be empty. Images of a group
        belong together; "" is none.
        """
        with self._lock, fsync.full_disk_told():
            if self._is_unlabelled and part:
                raise bad_field(
                    "image.split",
                    "an image without classes to learn belongs to no part: leave its split unset",
                )
            try:
                labels.check_given(label, is_labelled=not self._is_unlabelled)
            except InvalidInput as error:
                raise bad_field("image.label", error.message) from None
            if len(group) > _MAX_GROUP_CHARS or not group.isprintable():
                raise bad_field(
                    "image.group",
                    f"a group has at most {_MAX_GROUP_CHARS} characters, all of them printable: "
                    f"{shown(group)} cannot be one",
                )
            if self._given and bool(self._given[0].part) != bool(part):
                raise bad_field(
                    "image.split",
                    "some images name their split and some do not: set it for all or for none",
                )
            self._take("images", len(content) + FILE_BYTES)
            place = len(self._given) + 1
            if place > self._limits.max_files:
                raise InvalidInput(
                    Reason.ARCHIVE_TOO_LARGE,
                    f"the dataset holds more than {self._limits.max_files} images, the most "
                    "allowed: send fewer",
                )
            offset = self._append(self._folder / RAW_FILE, content)
            name = file_name(filename, self._numbered_from + place)
            self._given.append(Given(name, label, part, offset, len(content), group))
            failpoints.reach("dataset.image_written")

    def finish(self) -> DatasetRecord:
        """Checks and stores everything; the same images give the dataset that is there."""
        with self._lock:
            try:
                self._close()
                if not self._kind:
                    raise unusable_dataset("the upload brought nothing: send images")
                return self._store(
                    ReadRequest(
                        work=str(self._folder),
                        archive=str(self._archive) if self._kind == "archive" else "",
                        archive_format=self._archive_format,
                        given=self._given,
                        limits=self._limits,
                    )
                )
            finally:
                shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Has what is being finished in another thread give up soon; waits for nothing."""
        self._is_abandoned.set()

    def abort(self) -> None:
        """Throws away what is not finished. Twice, or after the finish, is harmless.

        One that is being finished in another thread gives up soon, and is waited for.
        """
        self.abandon()
        with self._lock:
            self._close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _append(self, path: Path, content: bytes) -> int:
        """Appends to the upload's file; returns the offset."""
        if self._file is None:
            self._file = path.open("wb")
        self._file.write(content)
        offset, self._written = self._written, self._written + len(content)
        return offset

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with fsync.full_disk_told():
                file.close()

    def _take(self, kind: Literal["archive", "images"], more: int) -> None:
        if self._is_abandoned.is_set():
            raise Expired(Reason.DEADLINE_EXCEEDED, "the caller has gone: nothing is stored")
        if self._kind not in ("", kind):
            raise bad_field(
                "part", "bytes of an archive and labelled images came both: send either"
            )
        self._kind = kind
        self._bytes += more
        if self._check_room is not None:
            self._check_room(self._bytes)
        if self._bytes > self._limits.max_upload_bytes:
            raise InvalidInput(
                Reason.ARCHIVE_TOO_LARGE,
                f"the upload is larger than {self._limits.max_upload_bytes} bytes, the most "
                "allowed: send fewer or smaller images",
            )
