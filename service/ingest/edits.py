"""Indexes made of others: images removed, in other classes, or erased; no image is read.

Each reads an index and writes another file, one image in memory at a time.
"""

import heapq
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service.domain import ReadSummary
from service.errors import InvalidInput, NotFound, Reason, unusable_dataset
from service.ingest import index as indexes
from service.ingest import labels as class_names
from service.ingest.index import Index, IndexedImage
from service.ingest.names import shown

_LISTED = 3


@dataclass(frozen=True)
class Edited:
    """An index that was written."""

    index: Index
    """Without its images."""
    digest: str
    """sha256 of its file."""


@dataclass(frozen=True)
class Repacked:
    """A pack that was written again without some images; see `packs.without`."""

    digest: str
    offsets: Mapping[str, int]
    """Of the images that are left, by their digests."""


def removed(base: Path, target: Path, digests: Collection[str]) -> Edited:
    """Leaves images out.

    Raises NotFound (IMAGE_NOT_FOUND), or InvalidInput (DATASET_UNUSABLE) where none is left to
    learn from.
    """
    gone = set(digests)
    _check_known(gone, base)

    def kept() -> Iterator[IndexedImage]:
        return (image for image in indexes.iterate(base) if image.digest not in gone)

    made = _written(base, target, kept)
    left = made.index
    if not left.summary.used or (left.is_labelled and not any(c.train for c in left.classes)):
        raise unusable_dataset(
            "no image would be left to learn from: leave some in, or delete the dataset"
        )
    return made


def relabelled(base: Path, target: Path, labels: Mapping[str, str]) -> Edited:
    """Puts images into other classes, by their digests.

    Raises NotFound (IMAGE_NOT_FOUND), or InvalidInput: INVALID_FIELD for what cannot be the name
    of a class, DATASET_UNUSABLE for two names that look the same.
    """
    header = indexes.load_header(base)
    wanted = {}
    for digest, label in labels.items():
        try:
            class_names.check_given(label, is_labelled=header.is_labelled)
        except InvalidInput as error:
            raise InvalidInput(error.reason, error.message, field="labels") from None
        wanted[digest] = class_names.canonical(label)
    _check_known(wanted, base)
    moved = sorted(
        (
            msgspec.structs.replace(image, label=wanted[image.digest])
            for image in indexes.iterate(base)
            if image.digest in wanted
        ),
        key=lambda image: image.order,
    )

    def images() -> Iterator[IndexedImage]:
        others = (image for image in indexes.iterate(base) if image.digest not in wanted)
        return heapq.merge(others, moved, key=lambda image: image.order)

    made = _written(base, target, images)
    class_names.check_alike(
        ((count.label, "") for count in made.index.classes), case_sensitive=header.case_sensitive
    )
    return made


def erased(
    base: Path,
    target: Path,
    gone: Container[str],
    repacked: Mapping[str, Repacked],
    left_out: ReadSummary | None = None,
) -> Edited:
    """Erases images, and finds the others in packs that were written again.

    `gone` has the digests, `repacked` the new packs by the sha256 of the old ones. Of the images
    their class, part, digest and group are kept, each in its place. `left_out` is the summary,
    where it is to be another one.
    """
    summary = left_out or indexes.load_header(base).summary
    names = {shown(image.name) for image in indexes.iterate(base) if image.digest in gone}

    def images() -> Iterator[IndexedImage]:
        for image in indexes.iterate(base):
            if image.digest in gone:
                yield image.erased()
            elif (pack := repacked.get(image.pack)) is not None:
                offset = pack.offsets[image.digest]
                yield msgspec.structs.replace(image, pack=pack.digest, offset=offset)
            else:
                yield image

    return _written(base, target, images, _without_names(summary, names))


def _written(
    base: Path,
    target: Path,
    images: Callable[[], Iterable[IndexedImage]],
    left_out: ReadSummary | None = None,
) -> Edited:
    """Writes the index of images, which are made twice: to count them, and to write them."""
    header = indexes.load_header(base)
    made = indexes.describe(
        images(),
        is_labelled=header.is_labelled,
        case_sensitive=header.case_sensitive,
        bit_depth=header.bit_depth,
        left_out=left_out or ReadSummary(),
    )
    return Edited(made, indexes.save(made, target, images()))


def _without_names(summary: ReadSummary, names: Collection[str]) -> ReadSummary:
    """Returns a summary that names no erased image, nor a copy of one; its counts stay."""
    return msgspec.structs.replace(
        summary,
        files=[
            row
            for row in summary.files
            if shown(row.path) not in names and not any(name in row.detail for name in names)
        ],
    )


def _check_known(digests: Collection[str], base: Path) -> None:
    """Raises NotFound (IMAGE_NOT_FOUND) for digests of which an index has no image."""
    unknown = set(digests)
    for image in indexes.iterate(base):
        if not image.is_erased:
            unknown.discard(image.digest)
    if not unknown:
        return
    first = sorted(unknown)[:_LISTED]
    more = f" and {len(unknown) - len(first)} more" if len(unknown) > len(first) else ""
    raise NotFound(
        Reason.IMAGE_NOT_FOUND,
        f"the dataset has no image of the digest {', '.join(map(shown, first))}{more}: name "
        "images that it has, as their list shows them",
    )
