"""The pictures of a job: found, checked and divided before anything is trained.

Every problem has a name: unreadable files, one class only, classes with too few
pictures, the same picture in train and validation or under two classes.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service import class_folders
from service.class_folders import Examined
from service.domain import ClassCount, RejectedFile
from service.errors import InvalidInput, Reason
from service.inference import preprocess
from service.inference.preprocess import Pixels

MIN_TRAIN = 2
"""Pictures to learn from that each class needs."""
MAX_BAD_PART = 0.2
MIN_BAD = 5
"""Rejected files stop a job when they are at least so many and more than that part."""

_LISTED = 10


@dataclass(frozen=True, eq=False)
class Part:
    """Pictures with their classes: uint8 [n, 224, 224, 3] as served, int64 [n]."""

    paths: tuple[Path, ...]
    pixels: Pixels
    targets: "np.ndarray[tuple[int], np.dtype[np.int64]]"

    def __len__(self) -> int:
        return len(self.paths)


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

    def counts(self) -> list[ClassCount]:
        """Pictures per class, as they are used."""
        train = np.bincount(self.train.targets, minlength=len(self.classes))
        validation = np.bincount(self.validation.targets, minlength=len(self.classes))
        return [
            ClassCount(label, int(train[i]), int(validation[i]))
            for i, label in enumerate(self.classes)
        ]


def load(root: Path, validation_fraction: float, seed: int, threads: int = 0) -> Data:
    """Reads, checks and divides a dataset.

    Raises InvalidInput (DATASET_UNUSABLE) when it cannot be trained on.
    """
    workers = threads or len(os.sched_getaffinity(0))
    files = class_folders.find(root)
    read, rejected = class_folders.examine(files, preprocess.decode, root, workers)
    _check_rejected(rejected, len(files))
    digest = class_folders.digest(read)
    warnings: list[str] = []
    kept, twice = _without_contradictions(read, root)
    rejected += twice
    named = any(picture.file.split for picture in kept)
    if named:
        train, validation = _as_named(kept, warnings)
    else:
        kept = _without_copies(kept, warnings)
        train, validation = _divide(kept, validation_fraction, seed)
    classes = _check_classes(train, validation, warnings)
    index = {label: i for i, label in enumerate(classes)}
    return Data(
        classes=classes,
        train=_part(train, index),
        validation=_part(validation, index),
        rejected=tuple(rejected),
        digest=digest,
        warnings=tuple(warnings),
        root=root,
    )


def _part(pictures: Sequence[Examined[Pixels]], index: dict[str, int]) -> Part:
    return Part(
        paths=tuple(p.file.path for p in pictures),
        pixels=np.stack([p.decoded for p in pictures]),
        targets=np.array([index[p.file.label] for p in pictures], dtype=np.int64),
    )


def _check_rejected(rejected: Sequence[RejectedFile], total: int) -> None:
    if len(rejected) < MIN_BAD or len(rejected) <= MAX_BAD_PART * total:
        return
    raise InvalidInput(
        Reason.DATASET_UNUSABLE,
        f"{len(rejected)} of {total} files are no readable pictures; mend or remove them: "
        + _listed(f"{file.path} ({file.detail})" for file in rejected),
    )


def _without_contradictions(
    pictures: Sequence[Examined[Pixels]], root: Path
) -> tuple[list[Examined[Pixels]], list[RejectedFile]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        labels[picture.digest].add(picture.file.label)
    kept, rejected = [], []
    for picture in pictures:
        claimed = labels[picture.digest]
        if len(claimed) == 1:
            kept.append(picture)
            continue
        rejected.append(
            RejectedFile(
                str(picture.file.path.relative_to(root)),
                f"the same picture is in the classes {', '.join(sorted(claimed))}",
            )
        )
    return kept, rejected


def _as_named(
    pictures: Sequence[Examined[Pixels]], warnings: list[str]
) -> tuple[list[Examined[Pixels]], list[Examined[Pixels]]]:
    validation = [p for p in pictures if p.file.split == "val"]
    held_out = {p.digest for p in validation}
    train = [p for p in pictures if p.file.split == "train" and p.digest not in held_out]
    leaked = [p for p in pictures if p.file.split == "train" and p.digest in held_out]
    if leaked:
        warnings.append(
            f"{len(leaked)} training pictures are in the validation part too and were left out of "
            "training, or accuracy would be overstated: "
            + _listed(p.file.path.name for p in leaked)
        )
    return train, validation


def _without_copies(
    pictures: Sequence[Examined[Pixels]], warnings: list[str]
) -> list[Examined[Pixels]]:
    first: dict[str, Examined[Pixels]] = {}
    for picture in pictures:
        first.setdefault(picture.digest, picture)
    if copies := len(pictures) - len(first):
        warnings.append(
            f"{copies} files are copies of others and were used once, so that no picture is both "
            "learned from and measured on"
        )
    return list(first.values())


def _divide(
    pictures: Sequence[Examined[Pixels]], fraction: float, seed: int
) -> tuple[list[Examined[Pixels]], list[Examined[Pixels]]]:
    """Stratified: each class gives its share, at least one, and keeps what it needs."""
    rng = np.random.default_rng([seed % 2**64, 0x5911])
    by_label: dict[str, list[Examined[Pixels]]] = defaultdict(list)
    for picture in pictures:
        by_label[picture.file.label].append(picture)
    train, validation = [], []
    for label in sorted(by_label):
        # By content, so that names and places of files do not matter.
        own = sorted(by_label[label], key=lambda p: p.digest)
        order = rng.permutation(len(own))
        held = max(1, min(round(fraction * len(own)), len(own) - MIN_TRAIN))
        validation += [own[i] for i in order[:held]]
        train += [own[i] for i in order[held:]]
    return train, validation


def _check_classes(
    train: Sequence[Examined[Pixels]],
    validation: Sequence[Examined[Pixels]],
    warnings: list[str],
) -> tuple[str, ...]:
    learned = Counter(p.file.label for p in train)
    measured = Counter(p.file.label for p in validation)
    if len(learned | measured) < 2:
        only = next(iter(learned | measured), "none")
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"readable pictures were found for one class only ({only}): a classifier needs at "
            "least 2",
        )
    few = [
        f"{label} ({learned[label]})"
        for label in sorted(learned | measured)
        if learned[label] < MIN_TRAIN
    ]
    if few:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"classes with fewer than {MIN_TRAIN} pictures to learn from, beside those held out: "
            f"{_listed(few)}: add pictures or leave the classes out",
        )
    if not measured:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "val/ holds no readable picture: add some, or leave train/ and val/ away to have a "
            "part held out",
        )
    if unmeasured := sorted(set(learned) - set(measured)):
        warnings.append(
            "no validation pictures for "
            + _listed(unmeasured)
            + ": nothing is known of how well they are told"
        )
    return tuple(sorted(learned))


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more
