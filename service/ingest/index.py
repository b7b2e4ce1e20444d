"""The index of a dataset: its images, and what became of all files that it came with.

Written once, by the reader; the store, the trainer and the checks read it, so that none of
them looks at folders again.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
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


class IndexedImage(msgspec.Struct, frozen=True, array_like=True):
    """One image of a dataset."""

    name: str
    """Relative to the dataset as it was sent, for people."""
    label: str
    """Its class; of a dataset without labels "" or the folder that names one."""
    part: PartName
    digest: str
    """sha256 of its file, lower-case hex."""
    path: str
    """Its file, relative to the folder of the images."""
    look: str = ""
    """Its difference hash, see `preprocess.ImageFacts`; "" where nothing was decoded."""
    group: str = ""
    """What it came with of the images that it belongs together with; "" for nothing."""
    depth: int = 0
    """Folders between its class's folder and its file."""
    aspect: float = 1.0
    """Its longer side over the shorter."""


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
    images: list[IndexedImage] = []
    """Sorted by part, class and name."""


_decoder = msgspec.json.Decoder(Index)


def save(index: Index, path: Path) -> None:
    """Writes an index to a file."""
    path.write_bytes(msgspec.json.encode(index))


def load(path: Path) -> Index:
    """Reads an index; raises OSError or msgspec.DecodeError."""
    index: Index = _decoder.decode(path.read_bytes())
    return index


def digest_of(images: Iterable[IndexedImage], *, is_labelled: bool) -> str:
    """Returns sha256 over the sorted list of part, class, sha256 and group of every image.

    A group decides what is measured on what, so the same images in other groups are another
    dataset. Never the same for a dataset with labels and for one without.
    """
    lines = sorted(map(_line, images))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return digest if is_labelled else hashlib.sha256(f"unlabelled\0{digest}".encode()).hexdigest()


def _line(image: IndexedImage) -> str:
    group = f"\0{image.group}" if image.group else ""
    return f"{image.part}\0{image.label}\0{image.digest}{group}\n"


def count_classes(images: Sequence[IndexedImage]) -> list[ClassCount]:
    """Counts the images of each class and part, sorted by label."""
    counts: dict[str, dict[str, int]] = {}
    for image in images:
        parts = counts.setdefault(image.label, {})
        parts[image.part or "train"] = parts.get(image.part or "train", 0) + 1
    return [
        ClassCount(label, parts.get("train", 0), parts.get("val", 0), parts.get("test", 0))
        for label, parts in sorted(counts.items())
    ]


def summarise(
    used: int,
    left_out: Sequence[LeftOutFile],
    nested: int = 0,
    warnings: Sequence[str] = (),
) -> ReadSummary:
    """Counts what was left out by reason and class."""
    counts = Counter((row.reason, row.label) for row in left_out)
    return ReadSummary(
        seen=used + len(left_out),
        used=used,
        left_out=_rows(counts),
        files=list(left_out[:MAX_LEFT_OUT_FILES]),
        nested=nested,
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
