"""How labelled images lie on disk, and how they are read, checked and named.

`CLASS/FILE` (at any depth below the class), or `train/CLASS/FILE` and
`val/CLASS/FILE` (`valid`, `validation` and `test` are taken for `val`). One
folder around it all is stepped into. Hidden files and links are passed over, and so
is what has become a link, or lies outside the folder by one, when it is read; the
folder itself, too, is where it was and no link. A hard link is a file like any other:
the operator's file system says who may make them. Both the dataset store and the
trainer read through here, so they agree on what a dataset is and on its digest.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, TypeVar

from service.domain import RejectedFile
from service.errors import GraftError, InvalidInput, Reason

T = TypeVar("T")
SplitName = Literal["", "train", "val"]

MAX_FILE_BYTES = 64 * 2**20

_SPLITS: dict[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "val",
}


@dataclass(frozen=True, order=True)
class ImageFile:
    """One file that should be an image; `split` is empty where the folders name none."""

    split: SplitName
    label: str
    path: Path


@dataclass(frozen=True)
class Examined(Generic[T]):
    """An image that was read: its file, the sha256 of its bytes, what decoding gave."""

    file: ImageFile
    digest: str
    decoded: T


def find(root: Path) -> list[ImageFile]:
    """Lists the files of a dataset, sorted; reads none of them.

    Raises InvalidInput (DATASET_UNUSABLE) when the folders have another shape.
    """
    base = root
    while True:
        folders = _visible_folders(base)
        splits = {folder: _SPLITS[folder.name] for folder in folders if folder.name in _SPLITS}
        is_wrapping = (
            len(folders) == 1 and not _visible_files(base) and _visible_folders(folders[0])
        )
        if "train" in splits.values() or not is_wrapping:
            break
        base = folders[0]
    if "train" in splits.values():
        stray = [folder.name for folder in folders if folder not in splits]
        if stray:
            raise InvalidInput(
                Reason.DATASET_UNUSABLE,
                f"beside train/ there are the folders {', '.join(sorted(stray)[:5])}: keep only "
                "train/ and val/, each with a folder per class",
            )
        found = [
            ImageFile(split, label.name, path)
            for folder, split in splits.items()
            for label in _visible_folders(folder)
            for path in _files_below(label)
        ]
    else:
        found = [
            ImageFile("", label.name, path) for label in folders for path in _files_below(label)
        ]
    if unnamed := next((f.label for f in found if not _is_text(f.label)), None):
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the name of the folder {_as_text(unnamed)!r} is no UTF-8: rename it",
        )
    if not found:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "no files were found: the images must lie in a folder per class, or in train/ and "
            "val/ with a folder per class in each",
        )
    return sorted(found)


def find_any(root: Path) -> list[ImageFile]:
    """Lists the files at any depth below `root`, sorted, without split and label.

    Raises InvalidInput (DATASET_UNUSABLE) when there is none.
    """
    found = [ImageFile("", "", path) for path in _files_below(root)]
    if not found:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE, "no files were found: put images there, at any depth"
        )
    return sorted(found)


def examine(
    files: Iterable[ImageFile],
    decode: Callable[[bytes], T],
    root: Path,
    run: Callable[[Callable[[ImageFile], Any], Iterable[ImageFile]], Iterable[Any]],
) -> tuple[list[Examined[T]], list[RejectedFile]]:
    """Reads and decodes every file; order is kept.

    `run` calls a function with each file and yields its results in order, as `map` does.
    `root` is a real path: what lies behind a link in it is rejected. So is, with the reason,
    a file that cannot be read, is larger than 64 MiB, or that `decode` refuses with a
    GraftError.
    """

    def read(file: ImageFile) -> Examined[T] | RejectedFile:
        try:
            data = read_bytes(file, root)
            return Examined(file, hashlib.sha256(data).hexdigest(), decode(data))
        except (GraftError, OSError) as error:
            return rejected(file, root, error)

    outcomes = list(run(read, files))
    return (
        [outcome for outcome in outcomes if isinstance(outcome, Examined)],
        [outcome for outcome in outcomes if isinstance(outcome, RejectedFile)],
    )


def read_bytes(file: ImageFile, root: Path) -> bytes:
    """The file's bytes; raises InvalidInput or OSError for one that is to be rejected."""
    if not _is_text(str(file.path.relative_to(root))):
        raise InvalidInput(Reason.IMAGE_UNREADABLE, "its name is no UTF-8")
    return read_plain(file.path, root)


def read_plain(path: Path, root: Path | None = None) -> bytes:
    """The bytes of a plain file, as `open_plain`; raises InvalidInput or OSError."""
    with open_plain(path, root) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(MAX_FILE_BYTES + 1) if size <= MAX_FILE_BYTES else b""
    if max(size, len(data)) > MAX_FILE_BYTES:
        raise InvalidInput(
            Reason.IMAGE_TOO_LARGE, f"the file is larger than {MAX_FILE_BYTES} bytes"
        )
    return data


def open_plain(path: Path, root: Path | None) -> BinaryIO:
    """Opens a plain file, below the real path `root` where one is named; follows no link to it.

    What it is shows once it is open, since it may have changed since it was listed.
    Raises InvalidInput or OSError.
    """
    # A pipe that nobody writes to would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        is_plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        # Not below the root's real path of now: it may have become a link to elsewhere.
        if not is_plain or not (root is None or by_handle(file).readlink().is_relative_to(root)):
            raise InvalidInput(Reason.IMAGE_UNREADABLE, "it is no plain file of this folder")
    except BaseException:
        file.close()
        raise
    return file


def by_handle(file: BinaryIO) -> Path:
    """A path that is this file however often it is opened, until it is closed."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def rejected(file: ImageFile, root: Path, error: GraftError | OSError) -> RejectedFile:
    """What is told of a file that could not be read or decoded."""
    detail = error.message if isinstance(error, GraftError) else error.strerror
    name = _as_text(str(file.path.relative_to(root)))
    return RejectedFile(name, detail or type(error).__name__)


def digest(images: Iterable[Examined[T]]) -> str:
    """sha256 over the sorted list of split, class and sha256 of every image."""
    lines = sorted(f"{p.file.split}\0{p.file.label}\0{p.digest}\n" for p in images)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_by_folder(images: Iterable[Examined[T]], root: Path) -> str:
    """As `digest`, of images without classes: with the folder below `root` for the class.

    Never the digest of a labelled dataset, whose folders and images may be the same.
    """
    placed = [replace(p, file=ImageFile("", _folder(p, root), p.file.path)) for p in images]
    return hashlib.sha256(f"unlabelled\0{digest(placed)}".encode()).hexdigest()


def _folder(image: Examined[T], root: Path) -> str:
    return str(image.file.path.parent.relative_to(root))


def _files_below(folder: Path) -> list[Path]:
    # Not by recursion: folders may be nested deeper than Python's stack.
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        inner = waiting.pop()
        found += _visible_files(inner)
        waiting += _visible_folders(inner)
    return sorted(found)


# Links are not followed: what they point to may lie outside the allowed folders.
def _visible_folders(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not _is_noise(p)
    )


def _visible_files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and not p.is_symlink() and not _is_noise(p)
    )


def _is_noise(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


# What the file system gives as bytes that are no UTF-8 can be kept in no JSON.
def _is_text(name: str) -> bool:
    return name.isprintable() or not any("\ud800" <= char <= "\udfff" for char in name)


def _as_text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
