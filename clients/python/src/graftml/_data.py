"""Images and sets of them, as they are given and as they are stored.

A part of `graftml.types`, which callers take these from.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any, Literal, Protocol, TypeAlias, runtime_checkable


@runtime_checkable
class PilImage(Protocol):
    """A `PIL.Image.Image`."""

    @property
    def mode(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    def convert(self, mode: str) -> Any: ...
    def save(self, fp: Any, format: str, **options: Any) -> None: ...
    def tobytes(self) -> bytes: ...


@runtime_checkable
class ArrayImage(Protocol):
    """A NumPy array, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def tobytes(self) -> bytes: ...


ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | PilImage | ArrayImage
)
"""A path, the bytes of an image file, such a file opened to be read as bytes, a PIL image, or
an array: `[height, width, 3]` of uint8 or of float32 from 0 to 1, or grey `[height, width]` of
uint16, of as many bits as the model was trained on."""


@dataclass(frozen=True)
class ServerPath:
    """Images that lie on the server's disk: a folder or an archive there."""

    path: str


Split = Literal["", "train", "val", "test"]


@dataclass(frozen=True)
class ClassCount:
    """How many images a class has; all count as `train` where no split is named."""

    label: str
    train: int
    validation: int
    test: int = 0


LeftOutReason = Literal[
    "unreadable",
    "wrong_format",
    "link",
    "hidden",
    "system",
    "stray",
    "copy",
    "contradiction",
    "erased",
    "unknown",
]
"""Why a file is not among the images of a dataset; "unknown" to a client that is too old."""


@dataclass(frozen=True)
class LeftOutFile:
    """A file that was left out, its name relative to the dataset."""

    path: str
    label: str
    """Its class; empty where it lies in none."""
    reason: LeftOutReason
    detail: str


@dataclass(frozen=True)
class LeftOut:
    """Counts the files of one class that were left out for one reason."""

    reason: LeftOutReason
    label: str
    count: int


@dataclass(frozen=True)
class ReadSummary:
    """Says what became of every file that was sent: each seen is either used or left out."""

    seen_count: int = 0
    used_count: int = 0
    left_out: tuple[LeftOut, ...] = ()
    files: tuple[LeftOutFile, ...] = ()
    """The first 100 that were left out."""
    nested_count: int = 0
    """Used images that lie in folders below their class."""
    warnings: tuple[str, ...] = ()
    """What to look at, in words, though the images are used."""

    @property
    def left_out_count(self) -> int:
        """Counts the files that were left out."""
        return self.seen_count - self.used_count

    def __str__(self) -> str:
        """Returns one line: "41 of 44 files are used; left out: 2 links, 1 hidden"."""
        counts: dict[str, int] = {}
        for row in self.left_out:
            counts[row.reason] = counts.get(row.reason, 0) + row.count
        listed = ", ".join(
            f"{count} {reason.replace('_', ' ')}" for reason, count in counts.items()
        )
        text = f"{self.used_count} of {self.seen_count} files are used"
        return f"{text}; left out: {listed}" if listed else text


@dataclass(frozen=True)
class Dataset:
    """A stored set of images; its name and its summary are of their newest upload."""

    dataset_id: str
    display_name: str
    digest: str
    create_time: datetime | None
    size_bytes: int
    classes: tuple[ClassCount, ...]
    image_count: int
    summary: ReadSummary
    is_unlabelled: bool = False
    """It has no classes: it can be the target of a domain adaptation alone."""
    case_sensitive_labels: bool = False
    """Its class names may differ in upper and lower case alone."""
    erased_image_count: int = 0
    """How many of its images were erased since; they count in the digest and nowhere else."""


@dataclass(frozen=True)
class DatasetImage:
    """One image of a dataset."""

    digest: str
    """sha256 of its file, lower-case hex."""
    name: str
    """Relative to the dataset as it was sent."""
    label: str
    """Its class; "" where it has none."""
    split: Split | Literal["unknown"]
    """ "" where the dataset names none; "unknown" to a client that is too old."""
    group: str
    """Names the images that it belongs together with; "" for none."""
    size_bytes: int
    is_erased: bool = False
    """Only its digest, class, split and group are known any more."""


@dataclass(frozen=True)
class AffectedVersion:
    """A version of a model that learned from an image, or was measured on it."""

    model: str
    version: int


@dataclass(frozen=True)
class Erasure:
    """What had an image that was erased."""

    dataset_ids: tuple[str, ...]
    versions: tuple[AffectedVersion, ...]
    """They are as they were: to be rid of what they learned, train again and delete them."""


Labelled: TypeAlias = tuple[str, ImageLike] | tuple[str, ImageLike, str | None]
"""A label and an image, and the name of the group of images that it belongs to, if any."""
Uploadable: TypeAlias = str | os.PathLike[str] | Iterable[Labelled]
"""A folder with a folder per class, a .tar, .tar.gz or .zip archive of one, or pairs of a label
and an image; a third place in a pair names the group of images that belong together."""
Unlabelled: TypeAlias = str | os.PathLike[str] | Iterable[ImageLike | Labelled]
"""A folder or an archive with images at any depth, or images; a label beside one is left
out."""
Data: TypeAlias = Uploadable | Dataset | ServerPath
"""What `fine_tune` learns from. A `str` that begins with "ds-" is the id of a dataset; write a
folder of such a name as a `Path`."""
Target: TypeAlias = Unlabelled | Dataset | ServerPath
"""The target of a `DomainAdaptation`, as `Data`; with `evaluate_on_target` it has labels too."""
