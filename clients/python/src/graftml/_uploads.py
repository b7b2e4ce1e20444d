"""Makes the messages of UploadDataset from images on this machine, labelled or not.

A folder travels as a tar archive that is made while it is sent: no copy on
disk, and never more than a chunk of it in memory. Which files of a folder are
images, and why the others are not, is the service's to say: it gets every name,
though of links, hidden files and files of systems nothing but that.
"""

import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Final, TypeAlias

from graftml_stubs.v1 import dataset_pb2 as pb

from graftml import types
from graftml._data import (
    ArrayImage,
    Data,
    ImageLike,
    Labelled,
    PilImage,
    Target,
    Unlabelled,
    Uploadable,
)
from graftml._encoding import encodable, encoding
from graftml._files import is_open_file, opening, plain
from graftml._images import to_file
from graftml.errors import InvalidArgument, invalid

CHUNK_BYTES: Final = 256 * 2**10

OnProgress: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes that were sent so far, and with all there are (None: not known)."""


@dataclass(frozen=True)
class Upload:
    """Something to upload."""

    messages: Callable[[], Iterator[Any]]
    """Starts from the beginning; errors of the disk come out of the iteration."""
    is_repeatable: bool
    is_addition: bool = False
    """To a dataset that is there."""


def stored(
    data: Data | Target,
    on_progress: OnProgress | None,
    *,
    is_unlabelled: bool = False,
    keeps_labels: bool = False,
    case_sensitive_labels: bool = False,
) -> str | types.ServerPath | Upload:
    """Returns the id or the path of what the server has already, else the upload of it."""
    if isinstance(data, types.Dataset):
        return data.dataset_id
    if isinstance(data, types.ServerPath):
        return data
    if isinstance(data, str) and data.startswith("ds-") and os.sep not in data:
        return data
    return prepare(
        data,
        "",
        on_progress,
        is_unlabelled=is_unlabelled,
        keeps_labels=keeps_labels,
        case_sensitive_labels=case_sensitive_labels,
    )


def stored_target(
    method: types.Method, on_progress: OnProgress | None
) -> str | types.ServerPath | Upload:
    """Does as `stored` for the target's images; returns "" where the method has no target."""
    if not isinstance(method, types.DomainAdaptation):
        return ""
    # Labels to measure with, too, are those of an unlabelled dataset: it may have one class
    # alone, and images without one.
    return stored(
        method.target, on_progress, is_unlabelled=True, keeps_labels=method.evaluate_on_target
    )


def there(source: str | types.ServerPath | Upload) -> str | types.ServerPath:
    """Returns where the images are on the server now; "" for those that are uploaded later."""
    return "" if isinstance(source, Upload) else source


def id_of(dataset: types.Dataset | str) -> str:
    """Returns a dataset's id; raises InvalidArgument for what is neither one nor a dataset."""
    if isinstance(dataset, types.Dataset):
        return dataset.dataset_id
    if isinstance(dataset, str):
        return dataset
    raise invalid(f"dataset is {_a(dataset)}: give a Dataset, or its id", "dataset")


def more(
    dataset: types.Dataset | str,
    data: Uploadable | Unlabelled,
    display_name: str,
    on_progress: OnProgress | None,
    *,
    is_unlabelled: bool,
) -> Upload:
    """Prepares what adds images to a dataset, of which only its id may be known."""
    dataset_id = id_of(dataset)
    if isinstance(dataset, types.Dataset):
        is_unlabelled = dataset.is_unlabelled
    upload = prepare(data, display_name, on_progress, is_unlabelled=is_unlabelled)

    def messages() -> Iterator[pb.AddImagesRequest]:
        for message in upload.messages():
            match message.WhichOneof("part"):
                case "header":
                    header = pb.AddImagesHeader(
                        dataset_id=dataset_id,
                        display_name=display_name,
                        format=message.header.format,
                    )
                    yield pb.AddImagesRequest(header=header)
                case "archive_chunk":
                    yield pb.AddImagesRequest(archive_chunk=message.archive_chunk)
                case "image":
                    yield pb.AddImagesRequest(image=message.image)
                case "end":
                    yield pb.AddImagesRequest(end=message.end)

    return Upload(messages, upload.is_repeatable, is_addition=True)


def prepare(
    data: Uploadable | Unlabelled,
    display_name: str,
    on_progress: OnProgress | None,
    *,
    is_unlabelled: bool = False,
    keeps_labels: bool = False,
    case_sensitive_labels: bool = False,
) -> Upload:
    """Finds out what `data` is; reads no image yet.

    An unlabelled dataset gets no labels, unless it `keeps_labels`, some of which may
    be missing.
    """
    header = partial(_header, is_unlabelled, case_sensitive_labels)
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        with opening(data, "data"):
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        if is_folder:
            names = _names(path)
            total = sum(size for *_, size in names)
            if not any(kind == tarfile.REGTYPE for _, kind, _ in names):
                where = "there, at any depth" if is_unlabelled else "into a folder per class"
                raise invalid(f"{path} holds no files: put the images {where}")
            first = header(display_name or plain(path.resolve().name), pb.ARCHIVE_FORMAT_TAR)
            return Upload(
                lambda: _archive(first, _tar(path, names), total, on_progress), is_repeatable=True
            )
        size = path.stat().st_size
        first = header(display_name or plain(path.name), pb.ARCHIVE_FORMAT_UNSPECIFIED)
        return Upload(lambda: _archive(first, _read(path), size, on_progress), is_repeatable=True)
    _refuse_single(data)
    if isinstance(data, Mapping):
        how = (
            "its images: [image for images in d.values() for image in images]"
            if is_unlabelled
            else "pairs: [(label, image) for label, images in d.items() for image in images]"
        )
        raise invalid(f"data is {_a(data)}: give {how}", "data")
    if not isinstance(data, Iterable):
        raise invalid(
            f"a {type(data).__name__} is not data: give a folder, an archive, a dataset, a "
            "ServerPath, or pairs of a label and an image"
        )
    first = header(display_name, pb.ARCHIVE_FORMAT_UNSPECIFIED)
    return Upload(
        lambda: _images(first, data, on_progress, is_unlabelled, keeps_labels),
        is_repeatable=iter(data) is not data,
    )


@encoding
def _header(
    is_unlabelled: bool,
    case_sensitive_labels: bool,
    display_name: str,
    format_: pb.ArchiveFormat,
) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(
        header=pb.UploadDatasetHeader(
            display_name=display_name,
            format=format_,
            is_unlabelled=is_unlabelled,
            case_sensitive_labels=case_sensitive_labels,
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
        label, image, group = _unlabelled(item, index) if is_unlabelled else _labelled(item, index)
        if is_unlabelled and not keeps_labels:
            label = ""
        content = to_file(image, f"data[{index}]")
        name = plain(Path(image).name) if isinstance(image, str | os.PathLike) else ""
        with encodable(f"data[{index}]"):
            message = pb.UploadDatasetRequest(
                image=pb.LabelledImage(label=label, content=content, filename=name, group=group)
            )
        yield message
        sent += len(content)
        count += 1
        if on_progress:
            on_progress(sent, None)
    yield _end(count)


def _refuse_single(data: object) -> None:
    """Raises InvalidArgument for what can be iterated, or read, and is not a list of images."""
    kind = type(data).__name__
    if isinstance(data, tarfile.TarFile | zipfile.ZipFile):
        raise invalid(f"data is an open archive ({kind}): close it, and give its path", "data")
    if is_open_file(data):
        raise invalid(
            f"data is an open file ({kind}): give its path, or write what is in it to a file and "
            "give that one's path",
            "data",
        )
    if isinstance(data, bytes | bytearray | memoryview):
        what = "an archive" if bytes(data[:2]) in (b"PK", b"\x1f\x8b") else "a file"
        raise invalid(
            f"data is the bytes of {what}: write it to a file and give its path, or give pairs of "
            "a label and an image",
            "data",
        )
    # An array of four dimensions is a batch.
    if isinstance(data, PilImage) or (isinstance(data, ArrayImage) and len(data.shape) != 4):
        raise invalid(
            f"data is a single image ({kind}): give pairs of a label and an image", "data"
        )


def _labelled(item: Any, index: int) -> tuple[str, ImageLike, str]:
    if not _is_pair(item):
        raise _no_pair(item, f"data[{index}]")
    return item[0], item[1], (item[2] or "") if len(item) == 3 else ""


def _unlabelled(item: Any, index: int) -> tuple[str, ImageLike, str]:
    return _labelled(item, index) if isinstance(item, tuple | list) else ("", item, "")


def _is_pair(item: Any) -> bool:
    """Tells whether something is a label and an image, with or without a group."""
    if not (isinstance(item, tuple | list) and 2 <= len(item) <= 3 and isinstance(item[0], str)):
        return False
    return len(item) == 2 or isinstance(item[2], str | None)


def _no_pair(item: Any, where: str) -> InvalidArgument:
    """Says what came in the place of a label and an image, and what to give."""
    kind, wanted = _a(item), 'a label (text) and an image, as ("ants", "a.jpg")'
    if not isinstance(item, tuple | list):
        return invalid(f"{where} is {kind}, no pair: give {wanted}", where)
    if len(item) == 3:
        came = f"{where} is {kind} of {', '.join(map(_a, item))}"
        return invalid(f"{came}: give {wanted}, and the name of its group, if any", where)
    if len(item) != 2:
        came = f"{where} is {kind} of {len(item)}"
        return invalid(f"{came}: give {wanted}, and the name of its group, if any", where)
    first, second = item
    came = f"{where} is {kind} of {_a(first)} and {_a(second)}"
    if isinstance(first, Integral):
        return invalid(f"{came}: labels are text: give str({first}), {wanted}", where)
    if isinstance(second, str) and first is not None:
        return invalid(f"{came}: the label comes first: give {wanted}", where)
    return invalid(f"{came}: give {wanted}", where)


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


SYSTEM_NAMES: Final = frozenset({
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found",
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db",
    "ehthumbs_vista.db", "desktop.ini", "__macosx", "icon\r", "network trash folder",
    "temporary items", "__pycache__",
})  # fmt: skip
"""Files and folders of systems, in lower case; the service's list."""


def is_noise(name: str) -> bool:
    """Tells whether a file or a folder is hidden or a system's: its name is sent and no more."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


_Named = tuple[Path, bytes, int]
"""A name in a folder, the kind of its entry in a tar archive, and the bytes that it sends."""


def _names(root: Path) -> list[_Named]:
    """Lists all below a folder, sorted; what is in hidden and systems' folders is not.

    Raises InvalidArgument for what may not be read: it is found before a byte is sent.
    """
    found: list[_Named] = []

    def refuse(error: OSError) -> None:
        raise _not_readable(Path(error.filename or root), error)

    for folder, folders, names in os.walk(root, onerror=refuse):
        for name in sorted(folders):
            path = Path(folder) / name
            kind = tarfile.SYMTYPE if path.is_symlink() else tarfile.DIRTYPE
            found.append((path, kind, 0))
        folders[:] = sorted(name for name in folders if not is_noise(name))
        for name in sorted(names):
            path = Path(folder) / name
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                found.append((path, tarfile.SYMTYPE, 0))
            elif not stat.S_ISREG(status.st_mode):
                found.append((path, tarfile.FIFOTYPE, 0))
            elif is_noise(name):
                found.append((path, tarfile.REGTYPE, 0))
            elif os.access(path, os.R_OK):
                found.append((path, tarfile.REGTYPE, status.st_size))
            else:
                raise _not_readable(path, None)
    return found


def _not_readable(path: Path, error: OSError | None) -> InvalidArgument:
    why = f" ({error.strerror})" if error is not None and error.strerror else ""
    return invalid(f"{path} may not be read{why}: allow it, or move it elsewhere")


def _tar(root: Path, names: list[_Named]) -> Iterator[bytes]:
    """Yields the archive piece by piece; `TarInfo` makes the headers, the rest is contents."""
    for path, kind, size in names:
        info = tarfile.TarInfo(path.relative_to(root).as_posix())
        info.type = kind
        if not size:
            yield info.tobuf(tarfile.PAX_FORMAT)
            continue
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
