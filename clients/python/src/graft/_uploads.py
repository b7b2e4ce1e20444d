"""From images on this machine, labelled or not, to the messages of UploadDataset.

A folder travels as a tar archive that is made while it is sent: no copy on
disk, and never more than a chunk of it in memory. Which files of a folder are
images is the service's to say; hidden files and links are passed over, as it
would.
"""

import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from graft import _answers, types
from graft._images import ImageLike, to_file
from graft.errors import invalid
from graft.v1 import dataset_pb2 as pb

CHUNK_BYTES: Final = 256 * 2**10

Labelled: TypeAlias = tuple[str, ImageLike]
Uploadable: TypeAlias = str | os.PathLike[str] | Iterable[Labelled]
"""A folder with a folder per class, a .tar, .tar.gz or .zip archive of one, or pairs of a label
and an image."""
Unlabelled: TypeAlias = str | os.PathLike[str] | Iterable[ImageLike | Labelled]
"""A folder or an archive with images at any depth, or images; a label beside one is left
out."""
Data: TypeAlias = Uploadable | types.Dataset | types.ServerPath
"""What `fine_tune` learns from. A `str` that begins with "ds-" is the id of a dataset; write a
folder of such a name as a `Path`."""
Target: TypeAlias = Unlabelled | types.Dataset | types.ServerPath
"""The target of a `DomainAdaptation`, as `Data`; with `evaluate_on_target` it has labels too."""

OnProgress: TypeAlias = Callable[[int, int | None], None]
"""Told the bytes that were handed to the connection, and all there are (None: not known)."""


@dataclass(frozen=True)
class Upload:
    """Something to upload."""

    messages: Callable[[], Iterator[pb.UploadDatasetRequest]]
    """Starts from the beginning; errors of the disk come out of the iteration."""
    is_repeatable: bool


def stored(
    data: Data | Target,
    on_progress: OnProgress | None,
    *,
    is_unlabelled: bool = False,
    keeps_labels: bool = False,
) -> str | types.ServerPath | Upload:
    """What the service has already: a dataset's id or a path of its own; else the upload."""
    if isinstance(data, types.Dataset):
        return data.dataset_id
    if isinstance(data, types.ServerPath):
        return data
    if isinstance(data, str) and data.startswith("ds-") and os.sep not in data:
        return data
    return prepare(data, "", on_progress, is_unlabelled=is_unlabelled, keeps_labels=keeps_labels)


def stored_target(
    method: types.Method, on_progress: OnProgress | None
) -> str | types.ServerPath | Upload:
    """As `stored`, of the target's images; "" where the method has no target."""
    if not isinstance(method, types.DomainAdaptation):
        return ""
    # Labels to measure with, too, are those of an unlabelled dataset: it may have one class
    # alone, and images without one.
    return stored(
        method.target, on_progress, is_unlabelled=True, keeps_labels=method.evaluate_on_target
    )


def there(source: str | types.ServerPath | Upload) -> str | types.ServerPath:
    """Where the images are on the server by now; "" for those that are uploaded later."""
    return "" if isinstance(source, Upload) else source


def stored_as(answer: pb.UploadDatasetResponse) -> types.Dataset:
    """What an upload became."""
    return _answers.dataset(answer.dataset)


def prepare(
    data: Uploadable | Unlabelled,
    display_name: str,
    on_progress: OnProgress | None,
    *,
    is_unlabelled: bool = False,
    keeps_labels: bool = False,
) -> Upload:
    """Finds out what `data` is; reads no image yet.

    An unlabelled dataset gets no labels, unless it `keeps_labels`, some of which may
    be missing.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if path.is_dir():
            files = _files(path)
            if not files:
                where = "there, at any depth" if is_unlabelled else "into a folder per class"
                raise invalid(f"{path} holds no files: put the images {where}")
            total = sum(entry.stat().st_size for entry in files)
            header = _header(
                display_name or path.resolve().name, pb.ARCHIVE_FORMAT_TAR, is_unlabelled
            )
            return Upload(
                lambda: _archive(header, _tar(path, files), total, on_progress), is_repeatable=True
            )
        size = path.stat().st_size
        header = _header(display_name or path.name, pb.ARCHIVE_FORMAT_UNSPECIFIED, is_unlabelled)
        return Upload(lambda: _archive(header, _read(path), size, on_progress), is_repeatable=True)
    if not isinstance(data, Iterable):
        raise invalid(
            f"a {type(data).__name__} is no data: give a folder, an archive, a dataset, a "
            "ServerPath, or pairs of a label and an image"
        )
    header = _header(display_name, pb.ARCHIVE_FORMAT_UNSPECIFIED, is_unlabelled)
    return Upload(
        lambda: _images(header, data, on_progress, is_unlabelled, keeps_labels),
        is_repeatable=iter(data) is not data,
    )


def _header(
    display_name: str, format_: pb.ArchiveFormat, is_unlabelled: bool
) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(
        header=pb.UploadDatasetHeader(
            display_name=display_name, format=format_, is_unlabelled=is_unlabelled
        )
    )


def _end(count: int) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(end=pb.UploadDatasetEnd(message_count=count))


def _archive(
    header: pb.UploadDatasetRequest,
    pieces: Iterator[bytes],
    total: int,
    on_progress: OnProgress | None,
) -> Iterator[pb.UploadDatasetRequest]:
    yield header
    sent = count = 0
    for chunk in _chunks(pieces):
        yield pb.UploadDatasetRequest(archive_chunk=chunk)
        sent += len(chunk)
        count += 1
        if on_progress:
            # A tar archive is a little larger than its files.
            on_progress(min(sent, total), total)
    yield _end(count)


def _images(
    header: pb.UploadDatasetRequest,
    items: Iterable[ImageLike | Labelled],
    on_progress: OnProgress | None,
    is_unlabelled: bool,
    keeps_labels: bool,
) -> Iterator[pb.UploadDatasetRequest]:
    yield header
    sent = count = 0
    for index, item in enumerate(items):
        label, image = _unlabelled(item) if is_unlabelled else _labelled(item, index)
        if is_unlabelled and not keeps_labels:
            label = ""
        content = to_file(image, f"data[{index}]")
        name = Path(image).name if isinstance(image, str | os.PathLike) else ""
        yield pb.UploadDatasetRequest(
            image=pb.LabelledImage(label=label, content=content, filename=name)
        )
        sent += len(content)
        count += 1
        if on_progress:
            on_progress(sent, None)
    yield _end(count)


def _labelled(item: Any, index: int) -> Labelled:
    if not _is_pair(item):
        raise invalid(f"data[{index}] is no pair of a label and an image")
    label, image = item
    return label, image


def _unlabelled(item: Any) -> Labelled:
    return (item[0], item[1]) if _is_pair(item) else ("", item)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def _files(root: Path) -> list[Path]:
    """All files below, sorted, without hidden ones and links."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if not _is_noise(name) and not (Path(folder) / name).is_symlink()
        )
        paths = (Path(folder) / name for name in sorted(names) if not _is_noise(name))
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return found


def _is_noise(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _tar(root: Path, files: list[Path]) -> Iterator[bytes]:
    """The archive piece by piece; `TarInfo` makes the headers, the rest is their contents."""
    for path in files:
        info = tarfile.TarInfo(path.relative_to(root).as_posix())
        with path.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            yield info.tobuf(tarfile.PAX_FORMAT)
            left = info.size
            while left:
                piece = file.read(min(CHUNK_BYTES, left))
                if not piece:
                    raise invalid(f"{path} became shorter while it was read: send it again")
                yield piece
                left -= len(piece)
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def _chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of CHUNK_BYTES; the last may be shorter."""
    waiting = bytearray()
    for piece in pieces:
        waiting += piece
        while len(waiting) >= CHUNK_BYTES:
            yield bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]
    if waiting:
        yield bytes(waiting)
