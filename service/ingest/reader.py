"""Reads and checks the files of a dataset, and says what became of each.

The one reader: `read` for whatever comes in. It leaves an index, and a pack of the images that are
used, unless they lie in a folder of the server's. Blocks; decodes on threads of its own.
"""

import errno
import hashlib
import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from service.domain import LeftOutFile, LeftOutReason, PartName
from service.engine import preprocess
from service.engine.formats import FOR_CALLERS, WrongFormat
from service.engine.preprocess import ImageFacts
from service.errors import GraftError, InvalidInput, Reason, unusable_dataset
from service.ingest import archives, labels, layout
from service.ingest import index as indexes
from service.ingest.archives import ArchiveFormat, Limits
from service.ingest.folder import open_plain, read_plain, walk
from service.ingest.index import Index, IndexedImage
from service.ingest.layout import Arranged, ImageFile
from service.ingest.names import shown
from service.ingest.packs import Location, PackWriter
from service.ops.cpus import available_cores

RAW_FILE = "raw"
"""What was given or unpacked, one image after the other; gone when its pack is written."""
PACK_FILE = "pack.tar"
INDEX_FILE = "index.jsonl"
MAX_BAD_PART = 0.2
MIN_BAD = 5
"""Files that should be images and are none refuse a dataset when they are at least so many and
more than that part."""

_NOT_AS_IT_WAS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO}
"""Of the path of an archive; any other error is the system's."""
_NO_FAULT_OF_THE_FILE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC}
_LISTED = 10
_EXAMPLES = 2
_NAMED = 3
"""Classes that are named where one image is in several: it is said of each of its files."""
_PRIORITY: dict[PartName, int] = {"test": 0, "val": 1, "train": 2, "": 3}
"""Of copies in several parts the first stays: an image is measured on, rather than learned from."""
_BAD = {LeftOutReason.UNREADABLE, LeftOutReason.WRONG_FORMAT, LeftOutReason.LINK}
_BLOCK = 4096
"""Files handed to the threads at once."""

Inspect = Callable[[bytes, str], ImageFacts]
"""Decodes an image of a name; raises a GraftError for what is none."""


OnProgress = Callable[[int, int], None]
"""Called with how many of how many files are read."""


def untold(_done: int, _total: int) -> None:
    """Reports no progress."""


class Given(msgspec.Struct, frozen=True, array_like=True):
    """An image that came with its class."""

    name: str
    label: str
    part: PartName
    offset: int
    """Of its bytes in RAW_FILE."""
    size: int
    group: str = ""
    """Names the images that it belongs together with; "" for none."""


class ReadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset to read: an archive, a folder of the server's, or images that were given."""

    tenant: str = ""
    """Shares the readers with the other tenants."""
    work: str
    """A folder of its own: the index and the pack go there, and given images lie there."""
    archive: str = ""
    archive_format: ArchiveFormat = ""
    folder: str = ""
    """Read where it lies."""
    given: list[Given] = []
    base: str = ""
    """The index of a dataset that the images are added to; "" makes one of them alone."""
    is_labelled: bool = True
    case_sensitive: bool = False
    most: int = 0
    """Reads so many images only, in turn from each class; 0 means all."""
    limits: Limits
    max_new_bytes: int | None = None
    """Bytes that there is room for; None means no bound but `limits`."""


class OverRoom(Exception):  # noqa: N818 - named for what happened
    """Raised where more is unpacked than there is room for."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.size_bytes = size_bytes


class Read(msgspec.Struct, frozen=True, tag="read"):
    """A dataset that was read, and the files that this left in the folder of the request."""

    index: Index
    """Without its images."""
    index_digest: str
    """sha256 of INDEX_FILE."""
    pack_digest: str = ""
    """sha256 of PACK_FILE; "" where the images stay in a folder of the server's, or are all in the
    dataset that they were to be added to."""


def read(
    request: ReadRequest,
    inspect: Inspect,
    threads: int,
    go_on: Callable[[], None] = lambda: None,
    on_progress: OnProgress = untold,
) -> Read:
    """Reads a dataset in this process, and writes its index and its pack; blocks.

    `go_on` is asked often and may raise to stop; `on_progress` is told how many of how many files
    are read. Raises GraftError for what cannot be used, OverRoom.
    """
    work = Path(request.work)
    raw = work / RAW_FILE
    root = Path(request.folder) if request.folder else work
    if request.given:
        arranged = _arrange_given(request, raw)
    else:
        entries = _entries(request, raw, go_on)
        arranged = layout.arrange(
            entries, is_labelled=request.is_labelled, case_sensitive=request.case_sensitive
        )
    index = examine(
        arranged, root, inspect, threads,
        is_labelled=request.is_labelled, case_sensitive=request.case_sensitive,
        most=request.most, go_on=go_on, on_progress=on_progress,
    )  # fmt: skip
    pack, images, left_out = "", index.images, index.summary
    if request.base:
        images, known = _beyond(index, Path(request.base))
        left_out = indexes.without(left_out, known)
    if not request.folder:
        pack, images = _packed(images, raw, work / PACK_FILE, go_on)
        raw.unlink()
    base = indexes.load_header(Path(request.base)) if request.base else None
    if base is not None and base.is_labelled:
        classes = dict.fromkeys(count.label for count in (*base.classes, *index.classes))
        labels.check_alike(
            ((label, "") for label in classes), case_sensitive=request.case_sensitive
        )

    def all_images() -> Iterable[IndexedImage]:
        if base is None:
            return images
        kept = indexes.iterate(Path(request.base))
        return heapq.merge(kept, images, key=lambda image: image.order)

    header = indexes.describe(
        all_images(),
        is_labelled=index.is_labelled,
        case_sensitive=index.case_sensitive,
        bit_depth=max(index.bit_depth, base.bit_depth if base else 0),
        left_out=left_out,
    )
    digest = indexes.save(header, work / INDEX_FILE, all_images())
    return Read(header, digest, pack)


def _beyond(index: Index, base: Path) -> tuple[list[IndexedImage], list[LeftOutFile]]:
    """Returns the images that a dataset does not have, and why it gets none of the others."""
    wanted = {image.digest: image for image in index.images}
    out = []
    for known in indexes.iterate(base):
        if (image := wanted.pop(known.digest, None)) is None:
            continue
        if known.is_erased:
            reason, detail = LeftOutReason.ERASED, "the image was erased from the dataset"
        elif known.label != image.label and index.is_labelled:
            reason = LeftOutReason.CONTRADICTION
            detail = (
                f"the dataset has the same image in the class {shown(known.label)}: relabel "
                "that one to move it"
            )
        else:
            reason, detail = LeftOutReason.COPY, f"a copy of {shown(known.name)} of the dataset"
        out.append(LeftOutFile(image.name, image.label, reason, detail))
    kept = [image for image in index.images if image.digest in wanted]
    return kept, sorted(out, key=lambda row: row.path)


def _packed(
    images: Sequence[IndexedImage], raw: Path, pack: Path, go_on: Callable[[], None]
) -> tuple[str, list[IndexedImage]]:
    """Writes the pack of images; returns its sha256, and them as they lie in it."""
    if not images:
        return "", []
    offsets = []
    with raw.open("rb") as file, PackWriter(pack) as writer:
        for image in images:
            go_on()
            data = os.pread(file.fileno(), image.size, image.offset)
            offsets.append(writer.add(image.digest, data))
        digest = writer.finish()
    return digest, [
        msgspec.structs.replace(image, path="", pack=digest, offset=offset)
        for image, offset in zip(images, offsets, strict=True)
    ]


def _arrange_given(request: ReadRequest, raw: Path) -> Arranged:
    label_of = labels.canonical if request.is_labelled else labels.loose_label
    if request.is_labelled:
        given = dict.fromkeys(image.label for image in request.given)
        labels.check_alike(((label, "") for label in given), case_sensitive=request.case_sensitive)
    return Arranged(
        files=[
            ImageFile(
                image.name,
                label_of(image.label),
                image.part,
                Location(raw, image.offset, image.size),
                group=image.group,
            )
            for image in request.given
        ]
    )


def inspect_here(data: bytes, _name: str) -> ImageFacts:
    """Decodes an image in this process; see `preprocess.inspect`."""
    return preprocess.inspect(data)


def read_folder(
    root: Path,
    threads: int = 0,
    *,
    inspect: Inspect = inspect_here,
    is_labelled: bool = True,
    case_sensitive: bool = False,
    most: int = 0,
) -> Index:
    """Reads a folder where it lies, in this process; writes nothing. Errors as `read`."""
    root = root.resolve()
    arranged = layout.arrange(walk(root), is_labelled=is_labelled, case_sensitive=case_sensitive)
    return examine(
        arranged, root, inspect, threads or available_cores(),
        is_labelled=is_labelled, case_sensitive=case_sensitive, most=most,
    )  # fmt: skip


def _entries(request: ReadRequest, raw: Path, go_on: Callable[[], None]) -> Iterable[layout.Entry]:
    if request.folder:
        return walk(Path(request.folder), request.limits.max_files)

    def check_room(size_bytes: int) -> None:
        if request.max_new_bytes is not None and size_bytes > request.max_new_bytes:
            raise OverRoom(size_bytes)

    path = Path(request.archive)
    try:
        archive = open_plain(path, path.parent)
    except (InvalidInput, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_AS_IT_WAS:
            raise
        raise InvalidInput(
            Reason.ARCHIVE_UNREADABLE,
            "the archive has gone, cannot be read, or has become a link since it was looked at: "
            "put it back",
        ) from error
    with archive:
        return archives.unpack(
            archive, raw, request.archive_format, request.limits, go_on, check_room
        )


def examine(
    arranged: Arranged,
    root: Path,
    inspect: Inspect,
    threads: int,
    *,
    is_labelled: bool,
    case_sensitive: bool = False,
    most: int = 0,
    go_on: Callable[[], None] = lambda: None,
    on_progress: OnProgress = untold,
) -> Index:
    """Reads and decodes every file; `root` is a real path, below which they lie.

    Raises InvalidInput (DATASET_UNUSABLE) when too many are not images, or a class is left
    without any.
    """
    files = _sampled(arranged.files, most) if most else arranged.files
    is_whole = len(files) == len(arranged.files)

    def look(file: ImageFile) -> tuple[IndexedImage, int] | LeftOutFile:
        try:
            data = read_plain(file.location, root)
            facts = inspect(data, file.name)
        except (GraftError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _NO_FAULT_OF_THE_FILE:
                raise
            return _bad(file, error)
        image = IndexedImage(
            name=file.name,
            label=file.label,
            part=file.part,
            digest=hashlib.sha256(data).hexdigest(),
            path=str(file.location.path.relative_to(root)),
            offset=file.location.offset,
            size=len(data),
            look=facts.look,
            group=file.group,
            depth=file.depth,
            aspect=round(facts.aspect, 3),
        )
        return image, facts.bits

    outcomes: list[Any] = []
    on_progress(0, len(files))
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        for start in range(0, len(files), _BLOCK):
            for outcome in pool.map(look, files[start : start + _BLOCK]):
                go_on()
                outcomes.append(outcome)
                on_progress(len(outcomes), len(files))
    read_ones = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    bad = [outcome for outcome in outcomes if isinstance(outcome, LeftOutFile)]
    # Beside a sample, those of the whole dataset would weigh too much.
    listed = [row for row in arranged.left_out if row.reason in _BAD] if is_whole else []
    _check_bad([*bad, *listed], len(read_ones), is_labelled=is_labelled)
    images, copies = _without_copies([image for image, _ in read_ones], is_labelled=is_labelled)
    left_out = [*arranged.left_out, *bad, *copies]
    if is_labelled and is_whole:
        _check_left(files, images, left_out)
    if not images:
        raise unusable_dataset(f"no image is left to use: {_listed([*bad, *copies])}")
    header = indexes.describe(
        images,
        is_labelled=is_labelled,
        case_sensitive=case_sensitive,
        bit_depth=max((bits for _, bits in read_ones), default=0),
        left_out=indexes.summarise(0, left_out, arranged.warnings),
    )
    return msgspec.structs.replace(header, images=images)


def _sampled(files: Sequence[ImageFile], most: int) -> list[ImageFile]:
    """Returns so many to learn from, in turn from each class, in the order of their names' hash."""
    learned = [file for file in files if file.part in ("", "train")]
    by_hash = sorted(learned, key=lambda file: hashlib.sha256(file.name.encode()).digest())
    turns: Counter[str] = Counter()
    keyed = []
    for file in by_hash:
        turns[file.label] += 1
        keyed.append((turns[file.label], file))
    kept = [file for _, file in sorted(keyed, key=lambda pair: pair[0])[:most]]
    return sorted(kept, key=lambda file: (file.part, file.label, file.name))


def _bad(file: ImageFile, error: GraftError | OSError) -> LeftOutFile:
    if not isinstance(error, GraftError):
        detail = error.strerror or type(error).__name__
        return LeftOutFile(file.name, file.label, LeftOutReason.UNREADABLE, detail)
    is_other = isinstance(error, WrongFormat)
    reason = LeftOutReason.WRONG_FORMAT if is_other else LeftOutReason.UNREADABLE
    # What callers may have sent in place of an image is none of a file's reasons.
    detail = error.message.removesuffix(FOR_CALLERS)
    return LeftOutFile(file.name, file.label, reason, detail)


def _check_bad(bad: Sequence[LeftOutFile], good: int, *, is_labelled: bool) -> None:
    total = good + len(bad)
    if not good and (bad or not is_labelled):
        raise unusable_dataset(f"no image was found among {total} files: {_listed(bad)}")
    if len(bad) < MIN_BAD or len(bad) <= MAX_BAD_PART * total:
        return
    raise unusable_dataset(
        f"{len(bad)} of {total} files are not readable images, too many to leave out; fix or "
        f"remove them: {_listed(bad)}"
    )


def _check_left(
    files: Sequence[ImageFile], images: Sequence[IndexedImage], left_out: Sequence[LeftOutFile]
) -> None:
    """Raises InvalidInput for a part or a class of which every file is left out."""
    why = {row.path: row for row in left_out}
    for part in sorted({file.part for file in files} - {image.part for image in images} - {""}):
        rows = [why[file.name] for file in files if file.part == part]
        raise _all_left_out(f"the part {part}/", rows, "the folder")
    for label in sorted({file.label for file in files} - {image.label for image in images}):
        rows = [why[file.name] for file in files if file.label == label]
        raise _all_left_out(f"the class {shown(label)}", rows, "the class")


def _all_left_out(what: str, rows: Sequence[LeftOutFile], remove: str) -> InvalidInput:
    return unusable_dataset(
        f"{what} is left without images, since all its files ({len(rows)}) are left out: "
        f"{_listed(rows, _EXAMPLES)}; fix them, or remove {remove}"
    )


def _listed(rows: Sequence[LeftOutFile], most: int = _LISTED) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(f"{shown(row.path)} ({row.detail})" for row in rows[:most]) + more


def _without_copies(
    images: Sequence[IndexedImage], *, is_labelled: bool
) -> tuple[list[IndexedImage], list[LeftOutFile]]:
    """Keeps one of equal images; none where their classes differ, and of a target without label."""
    same: dict[str, list[IndexedImage]] = {}
    for image in images:
        same.setdefault(image.digest, []).append(image)
    kept: list[IndexedImage] = []
    out: list[LeftOutFile] = []
    for group in same.values():
        labels = sorted({image.label for image in group})
        first = min(group, key=lambda image: (_PRIORITY[image.part], image.name))
        if len(labels) > 1 and is_labelled:
            more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
            names = ", ".join(map(shown, labels[:_NAMED]))
            detail = f"the same image is in the classes {names}{more}"
            out += [
                LeftOutFile(image.name, image.label, LeftOutReason.CONTRADICTION, detail)
                for image in group
            ]
            continue
        kept.append(first if len(labels) == 1 else msgspec.structs.replace(first, label=""))
        out += [
            LeftOutFile(
                image.name, image.label, LeftOutReason.COPY, f"a copy of {shown(first.name)}"
            )
            for image in group
            if image is not first
        ]
    kept.sort(key=lambda image: image.order)
    return kept, sorted(out, key=lambda row: row.path)
