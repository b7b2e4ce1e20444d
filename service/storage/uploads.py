"""One dataset on its way in: the bytes of an archive, or images one by one.

Everything lies in a temporary folder of its own until `finish`; `abort` or the
next start of the service deletes what was not finished.
"""

import shutil
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from service import faults
from service.class_folders import SplitName
from service.errors import InvalidInput, Reason, WrongState
from service.storage import durable
from service.storage.archives import Limits
from service.storage.entry_names import file_name, label_problem

if TYPE_CHECKING:
    from service.storage.datasets import DatasetRecord

UNLABELLED_FOLDER = "unlabelled"
"""Where the images without a label lie, beside the folders of those with one."""

Store = Callable[[Path], "DatasetRecord"]


class Upload:
    """Takes chunks or images, never both; its methods may be called from any thread."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        *,
        from_archive: Store,
        from_tree: Store,
        is_unlabelled: bool = False,
        check_room: Callable[[int], None] | None = None,
        is_abandoned: threading.Event | None = None,
    ) -> None:
        self._folder = folder
        self._check_room = check_room
        self._is_abandoned = is_abandoned or threading.Event()
        self._archive = folder / "archive"
        self._tree = folder / "images"
        self._limits = limits
        self._from_archive = from_archive
        self._from_tree = from_tree
        self._is_unlabelled = is_unlabelled
        self._lock = threading.Lock()
        self._kind: Literal["", "archive", "images", "ended"] = ""
        self._file: IO[bytes] | None = None
        self._bytes = 0
        self._images = 0
        self._has_split: bool | None = None
        self._learned: set[str] = set()

    def write(self, chunk: bytes) -> None:
        """Adds the next bytes of the archive."""
        with self._lock, durable.full_disk_told():
            self._take("archive", len(chunk))
            if self._file is None:
                self._file = self._archive.open("wb")
            self._file.write(chunk)
            faults.reach("dataset.chunk_written")

    def add_image(self, label: str, content: bytes, filename: str, split: SplitName) -> None:
        """Adds one image; whether it can be read shows at the end.

        To an unlabelled dataset, without a split; its label may be empty.
        """
        with self._lock, durable.full_disk_told():
            label = unicodedata.normalize("NFC", label)
            if self._is_unlabelled:
                label = label or UNLABELLED_FOLDER
                if split:
                    raise _bad(
                        "an image without classes to learn has no split: leave it unset",
                        "image.split",
                    )
            if problem := label_problem(label):
                raise _bad(problem, "image.label")
            if label == "train" and not split:
                raise _bad(
                    "a class called train cannot be told from the folder of training images: "
                    "name it otherwise, or set the split of every image",
                    "image.label",
                )
            if self._has_split is not None and self._has_split != bool(split):
                raise _bad(
                    "some images name their split and some do not: set it for all or for none",
                    "image.split",
                )
            self._take("images", len(content))
            self._has_split = bool(split)
            if split != "val":
                self._learned.add(label)
            self._images += 1
            if self._images > self._limits.max_files:
                raise InvalidInput(
                    Reason.ARCHIVE_TOO_LARGE,
                    f"the dataset holds more than {self._limits.max_files} images, the most "
                    "allowed: send fewer",
                )
            folder = self._tree / split / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file_name(filename, self._images)).write_bytes(content)
            faults.reach("dataset.image_written")

    def finish(self) -> "DatasetRecord":
        """Checks and stores everything; the same images give the dataset that is there."""
        with self._lock:
            kind = self._kind
            self._end()
            try:
                if kind == "archive":
                    return self._from_archive(self._archive)
                if kind == "images":
                    self._check_classes()
                    return self._from_tree(self._tree)
                if kind == "":
                    raise InvalidInput(
                        Reason.DATASET_UNUSABLE, "the upload brought nothing: send images"
                    )
                raise _ended()
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
            self._end()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _check_classes(self) -> None:
        if self._is_unlabelled:
            return
        # Here, since folders of one class, or of `val` alone, look like something else.
        if len(self._learned) < 2:
            raise InvalidInput(
                Reason.DATASET_UNUSABLE,
                f"the images to learn from are of {len(self._learned)} classes, and 2 are needed",
            )

    def _end(self) -> None:
        self._kind = "ended"
        if self._file is not None:
            file, self._file = self._file, None
            with durable.full_disk_told():
                file.close()

    def _take(self, kind: Literal["archive", "images"], more: int) -> None:
        if self._kind == "ended":
            raise _ended()
        if self._kind not in ("", kind):
            raise _bad("bytes of an archive and labelled images came both: send either", "part")
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


def _bad(what: str, field: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_FIELD, what, field=field)


def _ended() -> WrongState:
    return WrongState(Reason.INTERNAL, "the upload has ended: begin another")
