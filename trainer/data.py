"""The images of a job: found, checked and divided before anything is trained.

Keeps paths and digests, never pixels: those are decoded where they are needed.
How a dataset is divided and what stops a job stands in `trainer.division`.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from service import class_folders
from service.class_folders import Examined, ImageFile
from service.domain import DEFAULT_DECODING, ClassCount, ImageDecoding, RejectedFile
from service.errors import InvalidInput, Reason, WrongState
from service.inference import preprocess
from service.inference.preprocess import SIZE, Pixels
from trainer import division

Ints = npt.NDArray[np.int64]
UNLABELLED = "unlabelled"
"""The folder of a target domain's images whose class is not known, beside those per class."""
MIN_TARGET = 2
Examine = Callable[[Sequence[ImageFile], Path], tuple[list[Examined[None]], list[RejectedFile]]]
"""Reads and checks files below a folder; what is no image is among the rejected."""


@dataclass(frozen=True, eq=False)
class Files:
    """Image files that could be decoded when they were read, and the sha256 of each."""

    paths: tuple[Path, ...]
    digests: tuple[str, ...]
    decoding: ImageDecoding = field(default=DEFAULT_DECODING, kw_only=True)
    """How they become pixels."""

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, places: Sequence[int]) -> "Files":
        """Those at `places`, in that order."""
        return Files(
            tuple(self.paths[place] for place in places),
            tuple(self.digests[place] for place in places),
            decoding=self.decoding,
        )

    def encoded(self, place: int) -> bytes:
        """Reads one's bytes; raises as `decode`."""
        return read_again(self.paths[place], self.digests[place])

    def decode(self, places: Sequence[int] | None = None, threads: int = 0) -> Pixels:
        """Reads images as served, uint8 [n, 224, 224, 3]: all, or those at `places`, in order.

        Raises InvalidInput (DATASET_UNUSABLE) when a file is not what it was any more.
        """
        files = self if places is None else Files.at(self, places)
        pixels = np.empty((len(files), SIZE, SIZE, 3), np.uint8)

        def decode(row: int) -> None:
            image = open_again(files.paths[row], files.digests[row], files.decoding)
            pixels[row] = preprocess.fit(image)

        workers = min(threads or len(os.sched_getaffinity(0)), len(files))
        if workers <= 1:
            for row in range(len(files)):
                decode(row)
            return pixels
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            list(pool.map(decode, range(len(files))))
        return pixels


@dataclass(frozen=True, eq=False)
class Part(Files):
    """Images with their classes, int64 [n]."""

    targets: Ints

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
    rejected: tuple[RejectedFile, ...]
    digest: str
    root: Path


@dataclass(frozen=True, eq=False)
class Data:
    """What a job learns from and is measured on."""

    classes: tuple[str, ...]
    train: Part
    validation: Part
    rejected: tuple[RejectedFile, ...]
    digest: str
    warnings: tuple[str, ...]
    root: Path
    base_roots: tuple[Path, ...] = ()

    def counts(self) -> list[ClassCount]:
        """Images per class, as they are used."""
        train = np.bincount(self.train.targets, minlength=len(self.classes))
        validation = np.bincount(self.validation.targets, minlength=len(self.classes))
        return [
            ClassCount(label, int(train[i]), int(validation[i]))
            for i, label in enumerate(self.classes)
        ]

    def name(self, path: Path) -> str:
        """An image's name for people: below the job's folder, or a base's with that named."""
        if path.is_relative_to(self.root):
            return str(path.relative_to(self.root))
        return next(
            (
                str(path.relative_to(base.parent))
                for base in self.base_roots
                if path.is_relative_to(base)
            ),
            path.name,
        )


def load(
    root: Path,
    validation_fraction: float,
    seed: int,
    threads: int = 0,
    *,
    examine: Examine | None = None,
    bases: Sequence[Path] = (),
    base_digest: str = "",
    decoding: ImageDecoding = DEFAULT_DECODING,
) -> Data:
    """Reads, checks and divides a dataset, after those of `bases`, oldest first.

    Each dataset is divided by itself, as it was when it stood alone: what a base
    version was measured on is not learned from now. `examine` reads the files; left
    out, they are only checked. Raises InvalidInput (DATASET_UNUSABLE) when it cannot
    be trained on, and WrongState (BASE_DATA_GONE) when the images of `bases` do not
    give `base_digest`, where there is one.
    """
    examine = examine or _checker(threads)
    roots = [*bases, root]
    listed = [class_folders.find(each) for each in roots]
    division.check_listing([file for files in listed for file in files])
    warnings: list[str] = []
    read: list[list[Examined[None]]] = []
    rejected: list[RejectedFile] = []
    for each, files in zip(roots, listed, strict=True):
        images, refused = examine(files, each)
        division.check_rejected(refused, len(files))
        read.append(images)
        rejected += _named_below(each, refused, is_base=each is not root)
    if base_digest:
        _check_unchanged(read[:-1], base_digest)
    train, validation, contradictions = division.divide(read, validation_fraction, seed, warnings)
    classes = division.check_classes(train, validation, warnings)
    index = {label: i for i, label in enumerate(classes)}
    data = Data(
        classes=classes,
        train=_part(train, index, decoding),
        validation=_part(validation, index, decoding),
        rejected=(),
        digest=_digest(read),
        warnings=tuple(warnings),
        root=root,
        base_roots=tuple(bases),
    )
    rejected += [RejectedFile(data.name(path), detail) for path, detail in contradictions]
    return replace(data, rejected=tuple(rejected))


def load_unlabelled(
    root: Path,
    threads: int = 0,
    *,
    classes: Sequence[str] | None = None,
    examine: Examine | None = None,
    decoding: ImageDecoding = DEFAULT_DECODING,
) -> Unlabelled:
    """Reads images at any depth below `root`; bad ones are left out as in `load`.

    With `classes`, the source's, there must be a folder per class: they are noted for
    evaluation; images of no known class lie beside them, or in a folder `unlabelled`.
    Raises InvalidInput (DATASET_UNUSABLE) for a class that the source lacks, and when
    there are fewer than 2 readable images.
    """
    examine = examine or _checker(threads)
    files = class_folders.find_any(root)
    if classes is not None:
        labelled = {file.path: file for file in class_folders.find(root)}
        files = [labelled.get(file.path, file) for file in files]
    known = {*(classes or ()), UNLABELLED, ""}
    if classes is not None and (strange := sorted({f.label for f in files} - known)):
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "the target has folders that are no class of the source: "
            f"{division.listed(strange)}; the source's are {division.listed(classes)}: rename the "
            "folders or leave them out",
        )
    read, rejected = examine(files, root)
    division.check_rejected(rejected, len(files))
    if len(read) < MIN_TARGET:
        bad = division.listed(f"{file.path} ({file.detail})" for file in rejected)
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"{len(read)} of the target's {len(files)} files are readable images, and "
            f"{MIN_TARGET} or more are needed{f': {bad}' if bad else ''}",
        )
    targets = None
    if classes is not None:
        index = {label: i for i, label in enumerate(classes)}
        targets = np.array([index.get(p.file.label, -1) for p in read], dtype=np.int64)
    return Unlabelled(
        paths=tuple(p.file.path for p in read),
        digests=tuple(p.digest for p in read),
        targets=targets,
        rejected=tuple(rejected),
        digest=class_folders.digest_by_folder(read, root),
        root=root,
        decoding=decoding,
    )


def open_again(path: Path, digest: str, decoding: ImageDecoding) -> Image.Image:
    """Decodes a file as `read_again` reads it."""
    return preprocess.open_image(read_again(path, digest), decoding)


def read_again(path: Path, digest: str) -> bytes:
    """Reads a file that was read before, when its sha256 was `digest`.

    Raises InvalidInput (DATASET_UNUSABLE) when it is gone, or holds anything else now.
    """
    try:
        data = class_folders.read_plain(path)
    except OSError as error:
        raise _changed(path, error.strerror or str(error)) from error
    except InvalidInput as error:
        raise _changed(path, error.message) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise _changed(path, "its content is another")
    return data


def _changed(path: Path, why: str) -> InvalidInput:
    return InvalidInput(
        Reason.DATASET_UNUSABLE,
        f"{path.name} is not the image any more that it was when the job began ({why}): leave "
        "the files alone while a job runs",
    )


def _checker(threads: int) -> Examine:
    workers = threads or len(os.sched_getaffinity(0))

    def check(data: bytes) -> None:
        preprocess.inspect(data)

    def examine(
        files: Sequence[ImageFile], root: Path
    ) -> tuple[list[Examined[None]], list[RejectedFile]]:
        with ThreadPoolExecutor(workers) as pool:
            return class_folders.examine(files, check, root, pool.map)

    return examine


def _digest(datasets: Sequence[Sequence[Examined[None]]]) -> str:
    return class_folders.digest(image for images in datasets for image in images)


def _check_unchanged(bases: Sequence[Sequence[Examined[None]]], digest: str) -> None:
    if _digest(bases) == digest:
        return
    raise WrongState(
        Reason.BASE_DATA_GONE,
        "the images that the base was trained on are not as they were: some were added, changed, "
        "moved or removed since; put them back, or leave out the base and send all images",
        field="base",
    )


def _named_below(
    root: Path, rejected: Sequence[RejectedFile], *, is_base: bool
) -> list[RejectedFile]:
    if not is_base:
        return list(rejected)
    return [RejectedFile(f"{root.name}/{file.path}", file.detail) for file in rejected]


def _part(images: Sequence[Examined[None]], index: dict[str, int], decoding: ImageDecoding) -> Part:
    return Part(
        paths=tuple(p.file.path for p in images),
        digests=tuple(p.digest for p in images),
        targets=np.array([index[p.file.label] for p in images], dtype=np.int64),
        decoding=decoding,
    )
