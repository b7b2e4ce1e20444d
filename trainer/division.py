"""Divides datasets into training, validation and test parts, and refuses what forbids it.

Every problem has a name: one class only, classes with too few images, the same image in two
parts or under two classes, class names that look the same.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from service.domain import LeftOutFile, LeftOutReason, PartName
from service.errors import InvalidInput, Reason
from service.ingest import labels as class_names
from service.ingest.names import shown

MIN_TRAIN = 2
"""Images to learn from that each class needs."""

_LISTED = 10
_PARTS: tuple[PartName, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class LabelledImage:
    """One image of a dataset."""

    path: Path
    name: str
    """For people."""
    label: str
    part: PartName
    digest: str
    """sha256 of its file, lower-case hex."""


Images = list[LabelledImage]


@dataclass
class Division:
    """The parts, and the images that are in none of them."""

    train: Images = field(default_factory=list)
    validation: Images = field(default_factory=list)
    test: Images = field(default_factory=list)
    left_out: list[LeftOutFile] = field(default_factory=list)
    """Of the last dataset, for what an earlier one holds."""


def divide(datasets: Sequence[Images], fraction: float, seed: int, warnings: list[str]) -> Division:
    """Divides each dataset by itself: by its parts' names, else by `fraction`, stratified.

    The datasets are in the order in which they came; none holds an image twice. A
    validation image of one is a training image of none, and a test image is neither. What
    comes later moves nothing of what came before but out of training, or from validation to
    the test part. Raises InvalidInput (DATASET_UNUSABLE) for a class that nothing is left of.
    """
    found = Division()
    labels: dict[str, set[str]] = defaultdict(set)
    seen: dict[PartName, set[str]] = defaultdict(set)
    copies: Images = []
    for whole in datasets:
        for image in whole:
            labels[image.digest].add(image.label)
        # Against those so far: what a later one contradicts must not shift the division of this.
        images = [image for image in whole if len(labels[image.digest]) == 1]
        copies = [
            image
            for image in images
            if any(image.digest in seen[part] for part in ([image.part] if image.part else _PARTS))
        ]
        again = {image.digest for image in copies}
        fresh = [image for image in images if image.digest not in again]
        found.test += [image for image in fresh if image.part == "test"]
        found.validation += [image for image in fresh if image.part == "val"]
        learned = [image for image in fresh if image.part in ("", "train")]
        if not any(image.part == "val" for image in images):
            measured = {image.label for image in found.validation}
            learned, held = _divide(learned, fraction, seed, measured)
            found.validation += held
        found.train += learned
        seen["test"] |= {image.digest for image in found.test}
        seen["val"] |= {image.digest for image in found.validation}
        seen["train"] |= {image.digest for image in found.train}
    contradicted = {digest for digest, known in labels.items() if len(known) > 1}
    for name in ("train", "validation", "test"):
        part: Images = getattr(found, name)
        setattr(found, name, [image for image in part if image.digest not in contradicted])
    _leave_out_known(found, datasets, copies, labels, warnings)
    _separate(found, datasets[-1], warnings)
    _check_kept(found, datasets)
    return found


def _check_kept(found: Division, datasets: Sequence[Images]) -> None:
    """Raises InvalidInput for a class that no image is left of."""
    kept = {image.label for part in (found.train, found.validation, found.test) for image in part}
    lost = sorted({image.label for images in datasets for image in images} - kept)
    if lost:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"no image is left of the classes {listed(map(shown, lost))}: those that were sent are "
            "in another class too, and such images are not used; correct the classes, and to move "
            "images from one class to another send all images without a base",
        )


def _leave_out_known(
    found: Division,
    datasets: Sequence[Images],
    copies: Images,
    labels: dict[str, set[str]],
    warnings: list[str],
) -> None:
    newest = datasets[-1]
    for image in copies:
        found.left_out.append(
            LeftOutFile(image.name, image.label, LeftOutReason.COPY, "an image that the base holds")
        )
    for image in newest:
        if len(known := labels[image.digest]) > 1:
            detail = f"the same image is in the classes {', '.join(sorted(known))}"
            found.left_out.append(
                LeftOutFile(image.name, image.label, LeftOutReason.CONTRADICTION, detail)
            )

    bases = [image for images in datasets[:-1] for image in images]
    if lost := [image.name for image in bases if len(labels[image.digest]) > 1]:
        warnings.append(
            f"{len(lost)} images of the base are in another class now and are used in none: "
            + listed(lost)
        )


def _separate(found: Division, newest: Images, warnings: list[str]) -> None:
    """Takes out of training what is measured on, and out of validation what is tested on."""
    own = {image.path for image in newest}
    tested = {image.digest for image in found.test}
    held_out = tested | {image.digest for image in found.validation}
    for name, taken, parts in (
        ("validation", tested, "test"),
        ("train", held_out, "validation or test"),
    ):
        images: Images = getattr(found, name)
        if not (twice := [image for image in images if image.digest in taken]):
            continue
        setattr(found, name, [image for image in images if image.digest not in taken])
        called = "training" if name == "train" else name
        found.left_out += [
            LeftOutFile(
                image.name, image.label, LeftOutReason.COPY, f"it is in the {parts} part too"
            )
            for image in twice
            if image.path in own
        ]
        warnings.append(
            f"{len(twice)} {called} images are in the {parts} part too and were left out of "
            f"{called}, or accuracy would be overstated: " + listed(image.name for image in twice)
        )


def check_labels(datasets: Sequence[Images], *, case_sensitive: bool) -> None:
    """Raises InvalidInput for class names, of whichever dataset, that people take for one."""
    labels = dict.fromkeys(image.label for images in datasets for image in images)
    class_names.check_alike(((label, "") for label in labels), case_sensitive=case_sensitive)


def check_classes(found: Division, warnings: list[str]) -> tuple[str, ...]:
    """Returns the classes, sorted; raises InvalidInput when they cannot be learned or measured."""
    learned = Counter(image.label for image in found.train)
    measured = Counter(image.label for image in found.validation)
    tested = Counter(image.label for image in found.test)
    labels = sorted({*learned, *measured, *tested})
    if len(labels) < 2:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"images were found for {len(labels)} class ({', '.join(labels) or 'none'}), and a "
            "classifier needs 2 or more: add another class, or grow a version that has some with "
            "`base`",
        )
    held = {
        image.label for part in (found.validation, found.test) for image in part if not image.part
    }
    if unlearned := [label for label in labels if not learned[label] and label not in held]:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the classes {listed(map(shown, unlearned))} are in val/ or test/ alone and not among "
            f"those to learn from ({listed(map(shown, sorted(learned)))}): add training images, or "
            "give a class one name in all parts",
        )
    few = [f"{label} ({learned[label]})" for label in labels if learned[label] < MIN_TRAIN]
    if few:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"classes with fewer than {MIN_TRAIN} images to learn from, beside those held out: "
            f"{listed(few)}: a class needs {MIN_TRAIN + 1} images, or {MIN_TRAIN} in train/ where "
            "val/ is given; add images or leave the classes out",
        )
    if not measured:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            "val/ holds no readable image: add some, or leave train/ and val/ away to have a "
            "part held out",
        )
    if unmeasured := sorted(set(learned) - set(measured)):
        warnings.append(
            "no validation images for "
            + listed(unmeasured)
            + ": nothing is known of how well they are told"
        )
    return tuple(sorted(learned))


def listed(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


def _divide(
    images: Images, fraction: float, seed: int, measured: set[str]
) -> tuple[Images, Images]:
    """Stratified: each class gives its share, at least one, and keeps what it needs.

    A class that others measure already need not give one.
    """
    rng = np.random.default_rng([seed % 2**64, 0x5911])
    by_label: dict[str, Images] = defaultdict(list)
    for image in images:
        by_label[image.label].append(image)
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
