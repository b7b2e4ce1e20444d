"""The index of a dataset: its images in order, where their bytes lie, and what was left out.

The reader writes it first; adding, removing and relabelling images, and erasing one, write
another. A file of JSON lines: the index itself, then a line for each image, so that the
largest is read and written an image at a time.
"""

import hashlib
import itertools
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from service.domain import (
    MAX_LEFT_OUT_FILES,
    ClassCount,
    LeftOut,
    LeftOutFile,
    LeftOutReason,
    PartName,
    ReadSummary,
)

_WRITE_BYTES = 2**18


class IndexedImage(msgspec.Struct, frozen=True, array_like=True):
    """One image of a dataset."""

    name: str
    """Relative to the dataset as it was sent, for people."""
    label: str
    """Its class; of a dataset without labels "" or the folder that names one."""
    part: PartName
    digest: str
    """sha256 of its file, lower-case hex."""
    path: str = ""
    """Its file, relative to the folder that was read where it lies; "" for one in a pack."""
    pack: str = ""
    """sha256 of the pack that holds its bytes; "" for one in a folder."""
    offset: int = 0
    size: int = 0
    """Bytes."""
    look: str = ""
    """Its difference hash, see `preprocess.ImageFacts`; "" where nothing was decoded."""
    group: str = ""
    """What it came with of the images that it belongs together with; "" for nothing."""
    depth: int = 0
    """Folders between its class's folder and its file."""
    aspect: float = 1.0
    """Its longer side over the shorter."""
    is_erased: bool = False
    """Only its class, part, digest and group are known any more, of which the digest of the dataset
    is made."""

    @property
    def order(self) -> tuple[str, str, str]:
        """Returns what images are sorted by: part, class and name."""
        return self.part, self.label, self.name

    def erased(self) -> "IndexedImage":
        """Returns what is kept of the image when it is erased."""
        return IndexedImage(
            "", self.label, self.part, self.digest, group=self.group, is_erased=True
        )


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset that was read."""

    is_labelled: bool
    case_sensitive: bool = False
    """Class names may differ in upper and lower case alone."""
    digest: str
    size_bytes: int
    classes: list[ClassCount]
    """Sorted by label; empty without labels."""
    summary: ReadSummary
    bit_depth: int = 0
    """The most bits of its 16-bit grey images, see `preprocess.ImageFacts`; 0 without such."""
    packs: list[str] = []
    """sha256 of each pack that holds an image, in the order of their first images; none for a
    folder that is read where it lies."""
    erased_count: int = 0
    """Images that were erased; the figures above are without them, the digest is not."""
    images: list[IndexedImage] = []
    """Sorted by part, class and name."""


_header = msgspec.json.Decoder(Index)
_row = msgspec.json.Decoder(IndexedImage)


def save(index: Index, path: Path, images: Iterable[IndexedImage] | None = None) -> str:
    """Writes an index, of `images` where its own are not in memory; returns its sha256."""
    digest = hashlib.sha256()
    buffer = bytearray(_line_of(msgspec.structs.replace(index, images=[])))
    with path.open("wb") as file:
        for image in index.images if images is None else images:
            buffer += _line_of(image)
            if len(buffer) >= _WRITE_BYTES:
                digest.update(buffer)
                file.write(buffer)
                buffer.clear()
        digest.update(buffer)
        file.write(buffer)
    return digest.hexdigest()


def load(path: Path) -> Index:
    """Reads a whole index; raises OSError or msgspec.DecodeError."""
    return msgspec.structs.replace(load_header(path), images=list(iterate(path)))


def load_header(path: Path) -> Index:
    """Reads an index without its images; raises as `load`."""
    with path.open("rb") as file:
        header: Index = _header.decode(file.readline())
    return header


def iterate(path: Path, start: int = 0) -> Iterator[IndexedImage]:
    """Yields the images of an index from a place on, one in memory at a time; raises as `load`."""
    with path.open("rb") as file:
        file.readline()
        for line in itertools.islice(file, start, None):
            yield _row.decode(line)


def mentions(path: Path, digest: str) -> bool:
    """Tells whether an index may have an image of a digest, without a look at each."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        return whole.find(f'"{digest}"'.encode()) >= 0


def _line_of(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def describe(
    images: Iterable[IndexedImage],
    *,
    is_labelled: bool,
    case_sensitive: bool,
    bit_depth: int,
    left_out: ReadSummary,
) -> Index:
    """Returns the index of images, but without them; one of them is in memory at a time.

    Its summary counts them beside what `left_out` says of others.
    """
    lines: list[bytes] = []
    counts: Counter[tuple[str, PartName]] = Counter()
    packs: dict[str, None] = {}
    size_bytes = used = nested = 0
    for image in images:
        lines.append(_line(image))
        if not image.is_erased:
            used += 1
            nested += image.depth > 0
            size_bytes += image.size
            counts[image.label, image.part] += 1
            if image.pack:
                packs[image.pack] = None
    classes = [
        ClassCount(
            label,
            counts[label, ""] + counts[label, "train"],
            counts[label, "val"],
            counts[label, "test"],
        )
        for label in sorted({label for label, _ in counts})
    ]
    return Index(
        is_labelled=is_labelled,
        case_sensitive=case_sensitive,
        digest=_digest(lines, is_labelled=is_labelled),
        size_bytes=size_bytes,
        classes=classes if is_labelled else [],
        summary=msgspec.structs.replace(
            left_out, seen=used + left_out.left_out_count, used=used, nested=nested
        ),
        bit_depth=bit_depth,
        packs=list(packs),
        erased_count=len(lines) - used,
    )


def digest_of(images: Iterable[IndexedImage], *, is_labelled: bool) -> str:
    """Returns sha256 over the sorted list of part, class, sha256 and group of every image.

    Erased ones count: a dataset keeps its digest. A group decides what is measured on what, so
    the same images in other groups are another dataset. Never the same for a dataset with labels
    and for one without.
    """
    return _digest([_line(image) for image in images], is_labelled=is_labelled)


def _digest(lines: list[bytes], *, is_labelled: bool) -> str:
    lines.sort()
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    if is_labelled:
        return digest.hexdigest()
    return hashlib.sha256(f"unlabelled\0{digest.hexdigest()}".encode()).hexdigest()


def _line(image: IndexedImage) -> bytes:
    group = f"\0{image.group}" if image.group else ""
    return f"{image.part}\0{image.label}\0{image.digest}{group}\n".encode()


def summarise(
    used: int, left_out: Sequence[LeftOutFile], warnings: Sequence[str] = ()
) -> ReadSummary:
    """Counts what was left out by reason and class."""
    counts = Counter((row.reason, row.label) for row in left_out)
    return ReadSummary(
        seen=used + len(left_out),
        used=used,
        left_out=_rows(counts),
        files=list(left_out[:MAX_LEFT_OUT_FILES]),
        warnings=list(warnings),
    )


def without(summary: ReadSummary, more: Sequence[LeftOutFile]) -> ReadSummary:
    """Returns the summary of a dataset of which some used images are left out, too."""
    if not more:
        return summary
    counts = Counter({(row.reason, row.label): row.count for row in summary.left_out})
    counts.update((row.reason, row.label) for row in more)
    return msgspec.structs.replace(
        summary,
        used=summary.used - len(more),
        left_out=_rows(counts),
        files=[*summary.files, *more][:MAX_LEFT_OUT_FILES],
    )


def _rows(counts: Counter[tuple[LeftOutReason, str]]) -> list[LeftOut]:
    return [LeftOut(reason, label, count) for (reason, label), count in sorted(counts.items())]
