"""Files that are to be backbones on their way in: how each is described, and its bytes.

What came lies in a folder of its own until its end; `abort` or the next start of the
service deletes what was not finished. Knows no database.
"""

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.backbones import ONNX
from service.domain import check_name
from service.errors import Internal, InvalidInput, Reason
from service.ingest.backbone_process import Asked
from service.ingest.names import shown
from service.storage import durable
from service.storage.backbone_rows import RegisteredBackbone

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
            raise bad(
                "size",
                f"size is {self.size}: it is the side of the images in pixels, {_SIZES[0]} to "
                f"{_SIZES[-1]}",
            )
        mean = _colour("mean", self.mean, 0.0, 1.0)
        std = _colour("std", self.std, 0.001, 10.0)
        for field, text in (("output", self.output), ("licence", self.licence)):
            if len(text) > _MAX_CHARS or not (text.isprintable() or field == "output"):
                raise bad(field, f"{field} has at most {_MAX_CHARS} characters, on one line")
        if self.sha256 and not _DIGEST.fullmatch(self.sha256):
            raise bad("sha256", f"sha256 {shown(self.sha256)} is none: it has 64 hex digits")
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
        self._has_ended = False
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, chunk: bytes) -> None:
        """Adds the next bytes of the file; raises InvalidInput for one that is too large."""
        with self._lock, durable.full_disk_told():
            self._check_open()
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
            self._check_open()
            self._has_ended = True
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
            self._has_ended = True
            shutil.rmtree(self._folder, ignore_errors=True)

    def _check_open(self) -> None:
        if self._has_ended:
            raise Internal(Reason.INTERNAL, "the upload has ended: begin another")


def _colour(
    field: str, given: Sequence[float], low: float, high: float
) -> tuple[float, float, float]:
    if len(given) != 3 or not all(low <= value <= high for value in given):
        told = ", ".join(f"{value:g}" for value in given[:4]) or "empty"
        raise bad(
            field,
            f"{field} is {told}: three numbers are needed, of red, green and blue, each {low:g} "
            f"to {high:g}; they are of values from 0 to 1, so divide those of bytes by 255",
        )
    red, green, blue = given
    return red, green, blue


def bad(field: str, message: str) -> InvalidInput:
    """Returns the refusal of a field of the description."""
    return InvalidInput(Reason.INVALID_FIELD, message, field=f"description.{field}")
