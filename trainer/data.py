"""The images of a job: read, checked and divided before anything is trained.

Keeps locations and digests, never pixels: those are decoded where they are needed. The reader
of `service.ingest` says which images there are; `trainer.division` divides them, and says
what stops a job.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from PIL import Image

from service.contract import Grouping, ImageSource
from service.domain import DEFAULT_DECODING, WHITE, ClassCount, Framing, ImageDecoding, ReadSummary
from service.engine import preprocess
from service.engine.preprocess import Pixels
from service.errors import InvalidInput, Reason, WrongState
from service.ingest import index as indexes
from service.ingest import reader
from service.ingest.folder import read_plain
from service.ingest.grouping import NamedGroups
from service.ingest.index import Index, IndexedImage
from service.ingest.names import shown
from service.ingest.packs import Location
from service.ops.cpus import available_cores
from trainer import division
from trainer.arrays import Bools, Ints
from trainer.division import Images, LabelledImage

MIN_TARGET = 2
_UNNAMED = NamedGroups()


@dataclass(frozen=True, eq=False)
class Files:
    """Images that could be decoded when they were read: where they lie, and the sha256 of each."""

    locations: tuple[Location, ...]
    digests: tuple[str, ...]
    decoding: ImageDecoding = field(default=DEFAULT_DECODING, kw_only=True)
    """How they become pixels."""
    names: tuple[str, ...] = field(default=(), kw_only=True)
    """What people know them by: relative to the datasets that they came in."""
    looks: tuple[str, ...] = field(default=(), kw_only=True)
    """Their perceptual hashes, hex; empty where none was computed."""
    given_groups: tuple[str, ...] = field(default=(), kw_only=True)
    """Names of the groups that they came in; empty names, or none, where nothing was said."""
    aspects: tuple[float, ...] = field(default=(), kw_only=True)
    """Of each the longer side over the shorter."""

    def __len__(self) -> int:
        return len(self.locations)

    def at(self, places: Sequence[int] | Ints | Bools) -> Self:
        """Returns those at `places`, in that order, or where a mask is true."""
        kept = np.arange(len(self))[places if isinstance(places, np.ndarray) else list(places)]

        def some(column: Any) -> Any:
            if isinstance(column, np.ndarray):
                return column[kept] if len(column) else column
            return (
                tuple(column[i] for i in kept) if isinstance(column, tuple) and column else column
            )

        return replace(self, **{each.name: some(getattr(self, each.name)) for each in fields(self)})

    @staticmethod
    def joined(parts: "Sequence[Files]") -> "Files":
        """Returns the images of all parts, which are decoded alike."""
        return Files(
            tuple(location for part in parts for location in part.locations),
            tuple(digest for part in parts for digest in part.digests),
            decoding=parts[0].decoding,
        )

    def encoded(self, place: int) -> bytes:
        """Reads one's bytes; raises as `decode`."""
        return read_again(self.locations[place], self.digests[place])

    def decode(self, places: Sequence[int] | None = None, threads: int = 0) -> Pixels:
        """Reads images as served, uint8 [n, s, s, 3]: all, or those at `places`, in order.

        Raises InvalidInput (DATASET_UNUSABLE) when a file is not what it was any more.
        """
        files = self if places is None else self.at(places)
        size = files.decoding.size
        pixels = np.empty((len(files), size, size, 3), np.uint8)

        def decode(row: int) -> None:
            image = open_again(files.locations[row], files.digests[row], files.decoding)
            pixels[row] = preprocess.fit(image, files.decoding)

        workers = min(threads or available_cores(), len(files))
        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
            list(pool.map(decode, range(len(files))))
        return pixels


@dataclass(frozen=True, eq=False)
class Part(Files):
    """Images with their classes, int64 [n]."""

    targets: Ints
    ages: Ints = field(default_factory=lambda: np.empty(0, np.int64), kw_only=True)
    """Places of the datasets that they came in, the oldest first."""

    take = Files.at

    def framed(self, framing: Framing) -> "Part":
        """Returns the same images, of which a backbone sees something else."""
        return replace(self, decoding=msgspec.structs.replace(self.decoding, framing=framing))

    def none(self) -> "Part":
        """Returns a part without images."""
        return self.take(np.zeros(len(self), np.bool_))

    def spread(self, at_most: int) -> list[int]:
        """Places of the first images, in turn from each class."""
        turn: dict[int, int] = {}
        keyed = []
        for place, target in enumerate(self.targets.tolist()):
            turn[target] = turn.get(target, 0) + 1
            keyed.append((turn[target], target, place))
        return [place for *_, place in sorted(keyed)[:at_most]]


@dataclass(frozen=True, eq=False)
class Unlabelled(Files):
    """Images whose classes are not to be learned from."""

    targets: Ints | None
    """int64 [n], for evaluation alone, -1 where a class is not known; None where all are not."""
    summary: ReadSummary
    digest: str
    erased_count: int
    """How many more the dataset had when it was stored."""


@dataclass(frozen=True, eq=False)
class Data:
    """What a job learns from and is measured on."""

    classes: tuple[str, ...]
    train: Part
    """All to learn from; nothing is held out of it yet."""
    validation: Part
    """Came as such: measured on, never learned from or chosen by; may be empty."""
    test: Part
    """The same."""
    summary: ReadSummary
    """Of the job's own files, without those of its bases."""
    digest: str
    warnings: tuple[str, ...]

    def decoded(self, decoding: ImageDecoding) -> "Data":
        """Returns the same images, which become pixels in another way."""
        parts = {name: getattr(self, name) for name in ("train", "validation", "test")}
        return replace(self, **{k: replace(part, decoding=decoding) for k, part in parts.items()})

    def counts(self) -> list[ClassCount]:
        """Counts the images of each class, as they are used."""
        train, validation, test = (
            np.bincount(part.targets, minlength=len(self.classes)).tolist()
            for part in (self.train, self.validation, self.test)
        )
        return [
            ClassCount(label, train[i], validation[i], test[i])
            for i, label in enumerate(self.classes)
        ]


@dataclass(frozen=True)
class Source:
    """A dataset: a folder that is read where it lies, or an index and the packs it names."""

    folder: Path | None = None
    """A real path where there is an index."""
    index_file: Path | None = None
    """None where the folder is read now."""
    packs: Mapping[str, Path] = field(default_factory=dict)
    """The packs' files by their sha256."""
    name: str = ""
    """Prefix of the names of its images beside those of other datasets; empty for none."""

    @classmethod
    def of(cls, named: ImageSource, files: Mapping[str, str]) -> "Source":
        """Returns what a spec names, with the stored files of this machine by their sha256."""
        if named.index:
            packs = {digest: Path(files[digest]) for digest in named.packs}
            return cls(None, Path(files[named.index]), packs, named.name)
        index_file = Path(named.index_file) if named.index_file else None
        return cls(Path(named.folder), index_file, name=named.name)

    def read(
        self, threads: int = 0, *, is_labelled: bool = True, case_sensitive: bool = False
    ) -> Index:
        """Loads the index, or reads the folder; errors as `Reader.read`."""
        if self.index_file is not None:
            try:
                return indexes.load(self.index_file)
            except (OSError, msgspec.DecodeError) as error:
                raise InvalidInput(
                    Reason.DATASET_UNUSABLE,
                    "the index of the dataset is gone or damaged: upload the same images again, "
                    "which makes it anew",
                ) from error
        assert self.folder is not None, "it has an index, or is a folder"
        return reader.read_folder(
            self.folder, threads, is_labelled=is_labelled, case_sensitive=case_sensitive
        )

    def images(
        self, index: Index, named: NamedGroups = _UNNAMED, age: int = 0, *, is_alone: bool = True
    ) -> Images:
        """Returns its images that are not erased, with the groups that their names tell.

        Names are as they came where the dataset `is_alone`, so that people find the files again.
        """
        prefix = f"{self.name}/" if self.name and not is_alone else ""
        folder = self.folder
        if folder is not None and self.index_file is None:
            folder = folder.resolve()
        return [
            LabelledImage(
                location=self._location(folder, image),
                name=prefix + image.name,
                label=image.label,
                part=image.part,
                digest=image.digest,
                look=image.look,
                group=named.of(image),
                aspect=image.aspect,
                age=age,
            )
            for image in index.images
            if not image.is_erased
        ]

    def _location(self, folder: Path | None, image: IndexedImage) -> Location:
        if folder is not None:
            return Location(folder / image.path)
        return Location(self.packs[image.pack], image.offset, image.size)


def load(
    source: Source | Path,
    threads: int = 0,
    *,
    bases: Sequence[Source] = (),
    base_digest: str = "",
    case_sensitive: bool = False,
    background: str = WHITE,
    target_bit_depth: int = 0,
    grouping: Grouping | None = None,
) -> Data:
    """Reads, checks and divides a dataset, after those of `bases`, oldest first.

    Raises InvalidInput (DATASET_UNUSABLE)
    when it cannot be trained on, and WrongState (BASE_DATA_GONE) when the images of `bases`
    do not give `base_digest`, where there is one.

    16-bit grey is scaled by the most bits that any of the images has, a target's
    `target_bit_depth` included.
    """
    own = Source(source) if isinstance(source, Path) else source
    sources = [*bases, own]
    read = [each.read(threads, case_sensitive=case_sensitive) for each in sources]
    if base_digest and _digest(read[:-1]) != base_digest:
        raise WrongState(
            Reason.BASE_DATA_GONE,
            "the images that the base was trained on are not as they were: some were added, "
            "changed, moved or removed since; put them back, or leave out the base and send all "
            "images",
            field="base",
        )
    named = _named(grouping)
    datasets = [
        each.images(index, named, age, is_alone=not bases)
        for age, (each, index) in enumerate(zip(sources, read, strict=True))
    ]
    division.check_labels(
        datasets, case_sensitive=case_sensitive or any(index.case_sensitive for index in read)
    )
    warnings: list[str] = []
    if count := sum(image.is_erased for index in read for image in index.images):
        warnings.append(erased_note(count))
    warnings += _of_groups([image for images in datasets for image in images])
    if grouping is not None and (
        lone := sum(not image.group for images in datasets for image in images)
    ):
        warnings.append(
            f"the names of {lone} images tell no group: each is a group of its own unless it looks "
            "like another"
        )
    divided = division.divide(datasets, warnings)
    classes = division.check_classes(divided, warnings)
    places = {label: i for i, label in enumerate(classes)}
    # One for all, so that what is darker in one image than in another stays so.
    bits = max(target_bit_depth, *(index.bit_depth for index in read))
    decoding = ImageDecoding(background, bits or DEFAULT_DECODING.bit_depth)
    return Data(
        classes=classes,
        train=_part(divided.train, places, decoding),
        validation=_part(divided.validation, places, decoding),
        test=_part(divided.test, places, decoding),
        summary=indexes.without(read[-1].summary, divided.left_out),
        digest=_digest(read),
        warnings=tuple(warnings),
    )


def load_unlabelled(
    source: Source | Path,
    threads: int = 0,
    *,
    classes: Sequence[str] | None = None,
    decoding: ImageDecoding = DEFAULT_DECODING,
    grouping: Grouping | None = None,
) -> Unlabelled:
    """Reads images at any depth; bad ones are left out as in `load`.

    With `classes`, the source's, folders must be named by them: they are noted for
    evaluation; images of no known class lie beside them, or in a folder `unlabelled`.
    Raises InvalidInput (DATASET_UNUSABLE) for a class that the source lacks, and when
    there are fewer than 2 images.
    """
    source = Source(source) if isinstance(source, Path) else source
    read = source.read(threads, is_labelled=False)
    images = source.images(read, _named(grouping))
    known = {*(classes or ()), ""}
    if classes is not None and (strange := sorted({i.label for i in images} - known)):
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "the target has folders that are not a class of the source: "
            f"{division.listed(strange)}; the source's are {division.listed(classes)}: rename the "
            "folders or leave them out",
        )
    if len(images) < MIN_TARGET:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the target has {len(images)} image, and {MIN_TARGET} or more are needed",
        )
    if classes is not None and not any(image.label for image in images):
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "evaluate_on_target is set and no image of the target has a class: put them into a "
            "folder per class, or leave evaluate_on_target out",
        )
    targets = None
    if classes is not None:
        places = {label: i for i, label in enumerate(classes)}
        targets = np.array([places.get(image.label, -1) for image in images], dtype=np.int64)
    return Unlabelled(
        locations=tuple(image.location for image in images),
        digests=tuple(image.digest for image in images),
        targets=targets,
        summary=read.summary,
        digest=read.digest,
        erased_count=len(read.images) - len(images),
        decoding=decoding,
        names=tuple(image.name for image in images),
        looks=tuple(image.look for image in images),
        given_groups=tuple(image.group for image in images),
    )


def erased_note(count: int) -> str:
    """Says for people that so many images of a dataset cannot be learned from any more."""
    images = f"{count} images were" if count > 1 else "1 image was"
    return f"{images} erased since the dataset was stored, and cannot be learned from"


def _of_groups(images: Images) -> list[str]:
    """Says for people what named groups look as if they were not meant."""
    labels: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.group:
            labels[image.group].add(image.label)
    named = sum(bool(image.group) for image in images)
    told = []
    if named > 1 and len(labels) == named:
        told.append(
            f"each of {named} images that have a group is the only one of it: the names of groups "
            "keep no images together"
        )
    if across := sorted(group for group, of in labels.items() if len(of) > 1):
        told.append(
            f"{len(across)} groups have images of several classes; all images of a group are taken "
            f"to belong together: {division.listed(map(shown, across))}"
        )
    return told


def _named(grouping: Grouping | None) -> NamedGroups:
    if grouping is None:
        return _UNNAMED
    return NamedGroups(grouping.folder_level, grouping.name_pattern)


def open_again(at: Location, digest: str, decoding: ImageDecoding) -> Image.Image:
    """Decodes an image as `read_again` reads it."""
    return preprocess.open_image(read_again(at, digest), decoding)


def read_again(at: Location, digest: str) -> bytes:
    """Reads an image that was read before, when its sha256 was `digest`.

    Raises InvalidInput (DATASET_UNUSABLE) when it is gone, or another lies there now.
    """
    try:
        data = read_plain(at) if at.size < 0 else os.pread(_opened(at.path), at.size, at.offset)
    except OSError as error:
        raise _changed(at, digest, error.strerror or str(error)) from error
    except InvalidInput as error:
        raise _changed(at, digest, error.message) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise _changed(at, digest, "its content is another")
    return data


@cache
def _opened(pack: Path) -> int:
    """Opens a pack for as long as the process lives, which reads on though it is deleted."""
    return os.open(pack, os.O_RDONLY | os.O_CLOEXEC)


def _changed(at: Location, digest: str, why: str) -> InvalidInput:
    if at.size < 0:
        return InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"{at.path.name} is not the image any more that it was when the job began ({why}): "
            "leave the files alone while a job runs",
        )
    return InvalidInput(
        Reason.DATASET_UNUSABLE,
        f"the image {digest} cannot be read from where it is stored ({why}): upload the images of "
        "its dataset again",
    )


def _digest(datasets: Sequence[Index]) -> str:
    images: list[IndexedImage] = [image for index in datasets for image in index.images]
    return indexes.digest_of(images, is_labelled=True)


def _part(images: Images, places: dict[str, int], decoding: ImageDecoding) -> Part:
    return Part(
        locations=tuple(image.location for image in images),
        digests=tuple(image.digest for image in images),
        targets=np.array([places[image.label] for image in images], dtype=np.int64),
        decoding=decoding,
        names=tuple(image.name for image in images),
        looks=tuple(image.look for image in images),
        given_groups=tuple(image.group for image in images),
        aspects=tuple(image.aspect for image in images),
        ages=np.array([image.age for image in images], dtype=np.int64),
    )
