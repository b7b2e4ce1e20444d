"""How a dataset is divided into training and validation parts, and what forbids it.

Every problem has a name: unreadable files, one class only, classes with too few
images, the same image in train and validation or under two classes. What the
list of files alone tells is told before any of them is read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from service.class_folders import Examined, ImageFile
from service.domain import RejectedFile
from service.errors import InvalidInput, Reason

MIN_TRAIN = 2
"""Images to learn from that each class needs."""
MAX_BAD_PART = 0.2
MIN_BAD = 5
"""Rejected files stop a job when they are at least so many and more than that part."""

_LISTED = 10

Images = list[Examined[None]]


def check_listing(files: Sequence[ImageFile]) -> None:
    """Raises InvalidInput for what no reading of the files could mend."""
    # Of files that no folder divides, each class gives one or more to be held out.
    learned: Counter[str] = Counter()
    for label, count in Counter(f.label for f in files if f.split == "train").items():
        learned[label] += count
    for label, count in Counter(f.label for f in files if not f.split).items():
        learned[label] += count - 1
    measured = Counter(f.label for f in files if f.split != "train")
    _refuse(learned, measured)


def check_rejected(rejected: Sequence[RejectedFile], total: int) -> None:
    """Raises InvalidInput when so many files are bad that something else must be wrong."""
    if len(rejected) < MIN_BAD or len(rejected) <= MAX_BAD_PART * total:
        return
    raise InvalidInput(
        Reason.DATASET_UNUSABLE,
        f"{len(rejected)} of {total} files are no readable images; mend or remove them: "
        + listed(f"{file.path} ({file.detail})" for file in rejected),
    )


def divide(
    datasets: Sequence[Images], fraction: float, seed: int, warnings: list[str]
) -> tuple[Images, Images, list[tuple[Path, str]]]:
    """Training and validation images, and those in two classes, with what to say of them.

    Each dataset by itself: by its folders' names, else by `fraction`, stratified. A
    validation image of one is a training image of none. What comes later moves
    nothing of what came before to the other part.
    """
    train: Images = []
    validation: Images = []
    labels: dict[str, set[str]] = defaultdict(set)
    seen: set[str] = set()
    copies = 0
    for whole in datasets:
        for image in whole:
            labels[image.digest].add(image.file.label)
        # Against those so far: what a later one contradicts must not shift the division of this.
        images = [p for p in whole if len(labels[p.digest]) == 1]
        if any(image.file.split for image in images):
            for part, name in ((train, "train"), (validation, "val")):
                once = {p.digest: p for p in images if p.file.split == name}
                for known in part:
                    once.pop(known.digest, None)
                copies += sum(p.file.split == name for p in images) - len(once)
                part.extend(once.values())
        else:
            first = {p.digest: p for p in reversed(images) if p.digest not in seen}
            copies += len(images) - len(first)
            # In the files' order, each image where it was met first.
            kept = [p for p in images if first.get(p.digest) is p]
            measured = {p.file.label for p in validation}
            learned, held = _divide(kept, fraction, seed, measured)
            train += learned
            validation += held
        seen |= {p.digest for p in images}
    train = [p for p in train if len(labels[p.digest]) == 1]
    validation = [p for p in validation if len(labels[p.digest]) == 1]
    if copies:
        warnings.append(
            f"{copies} files are copies of others and were used once, so that no image counts "
            "twice, or is both learned from and measured on"
        )
    held_out = {p.digest for p in validation}
    if leaked := [p for p in train if p.digest in held_out]:
        train = [p for p in train if p.digest not in held_out]
        warnings.append(
            f"{len(leaked)} training images are in the validation part too and were left out of "
            "training, or accuracy would be overstated: " + listed(p.file.path.name for p in leaked)
        )
    return train, validation, _contradictions(datasets, labels)


def check_classes(
    train: Sequence[Examined[None]], validation: Sequence[Examined[None]], warnings: list[str]
) -> tuple[str, ...]:
    """The classes, sorted; raises InvalidInput when they cannot be learned or measured."""
    learned = Counter(p.file.label for p in train)
    measured = Counter(p.file.label for p in validation)
    _refuse(learned, measured)
    if unmeasured := sorted(set(learned) - set(measured)):
        warnings.append(
            "no validation images for "
            + listed(unmeasured)
            + ": nothing is known of how well they are told"
        )
    return tuple(sorted(learned))


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


def _refuse(learned: Counter[str], measured: Counter[str]) -> None:
    if len(labels := sorted({*learned, *measured})) < 2:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"readable images were found for one class only ({', '.join(labels) or 'none'}): a "
            "classifier needs at least 2",
        )
    few = [f"{label} ({learned[label]})" for label in labels if learned[label] < MIN_TRAIN]
    if few:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"classes with fewer than {MIN_TRAIN} images to learn from, beside those held out: "
            f"{listed(few)}: add images or leave the classes out",
        )
    if not measured:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "val/ holds no readable image: add some, or leave train/ and val/ away to have a "
            "part held out",
        )


def _contradictions(
    datasets: Sequence[Images], labels: Mapping[str, set[str]]
) -> list[tuple[Path, str]]:
    return [
        (
            p.file.path,
            f"the same image is in the classes {', '.join(sorted(labels[p.digest]))}",
        )
        for images in datasets
        for p in images
        if len(labels[p.digest]) > 1
    ]


def _divide(
    images: Images, fraction: float, seed: int, measured: set[str]
) -> tuple[Images, Images]:
    """Stratified: each class gives its share, at least one, and keeps what it needs.

    A class that others measure already need not give one.
    """
    rng = np.random.default_rng([seed % 2**64, 0x5911])
    by_label: dict[str, Images] = defaultdict(list)
    for image in images:
        by_label[image.file.label].append(image)
    train: Images = []
    validation: Images = []
    for label in sorted(by_label):
        # By content, so that names and places of files do not matter.
        own = sorted(by_label[label], key=lambda p: p.digest)
        order = rng.permutation(len(own))
        share = round(fraction * len(own))
        held = share if label in measured else max(1, min(share, len(own) - MIN_TRAIN))
        validation += [own[i] for i in order[:held]]
        train += [own[i] for i in order[held:]]
    return train, validation
