"""Divides datasets by the parts that they name, and refuses what forbids it.

Every problem has a name: one class only, classes to test that were never learned, the same
image in two parts or under two classes, class names that look the same. Images that name no
part are all to learn from: what a network is measured on is held out of them by `held_out`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.domain import LeftOutFile, LeftOutReason, PartName
from service.errors import InvalidInput, Reason
from service.ingest import labels as class_names
from service.ingest.names import shown
from service.ingest.packs import Location
from trainer.arrays import Bools, Doubles, Ints

_PARTS: tuple[PartName, ...] = ("train", "val", "test")
_ATTRIBUTES: dict[PartName, str] = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class LabelledImage:
    """One image of a dataset."""

    location: Location
    name: str
    """For people."""
    label: str
    part: PartName
    digest: str
    """sha256 of its bytes, lower-case hex."""
    look: str = ""
    """Its perceptual hash, hex."""
    group: str = ""
    """Images that belong together; empty where nothing was said."""
    aspect: float = 1.0
    """Its longer side over the shorter."""
    age: int = 0
    """The place of its dataset among those of a job, the oldest first."""


Images = list[LabelledImage]


@dataclass
class Division:
    """The parts, and the images that are in none of them."""

    train: Images = field(default_factory=list)
    validation: Images = field(default_factory=list)
    test: Images = field(default_factory=list)
    left_out: list[LeftOutFile] = field(default_factory=list)
    """Of the last dataset, for what an earlier one holds."""


def divide(datasets: Sequence[Images], warnings: list[str]) -> Division:
    """Divides each dataset by its parts' names; images without one are to learn from.

    The datasets are in the order in which they came; none holds an image twice. A
    validation image of one is a training image of none, and a test image is neither.
    Raises InvalidInput (DATASET_UNUSABLE) for a class that nothing is left of.
    """
    found = Division()
    labels: dict[str, set[str]] = defaultdict(set)
    seen: dict[PartName, set[str]] = defaultdict(set)
    copies: Images = []
    for whole in datasets:
        for image in whole:
            labels[image.digest].add(image.label)
            if any(image.digest in seen[part] for part in ([image.part] if image.part else _PARTS)):
                copies.append(image)
                continue
            part = image.part or "train"
            getattr(found, _ATTRIBUTES[part]).append(image)
            seen[part].add(image.digest)
    contradicted = {digest for digest, known in labels.items() if len(known) > 1}
    copies = [image for image in copies if image.digest not in contradicted]
    for name in _ATTRIBUTES.values():
        part_images: Images = getattr(found, name)
        setattr(found, name, [i for i in part_images if i.digest not in contradicted])
    _leave_out_known(found, datasets, copies, labels, warnings)
    _separate(found, datasets[-1], warnings)
    _check_kept(found, datasets)
    return found


def held_out(targets: Ints, groups: Ints, sides: Doubles, fraction: float) -> Bools:
    """Marks the images [n] that a network is measured on, and does not learn from.

    Groups whose side, a number from 0 to 1, lies below `fraction`: so every job on these
    images agrees, whatever came with them. A class with no other group keeps its last one.
    """
    held: Bools = sides < fraction
    for label in np.unique(targets):
        own = np.flatnonzero(targets == label)
        if held[own].all():
            held[groups == groups[own[np.argmax(sides[own])]]] = False
    return held


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
    own = {image.age for image in newest}
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
            if image.age in own
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
    """Returns the classes, sorted; raises InvalidInput when they cannot be learned."""
    learned = Counter(image.label for image in found.train)
    measured = Counter(image.label for image in found.validation)
    tested = Counter(image.label for image in found.test)
    labels = sorted({*learned, *measured, *tested})
    if len(labels) < 2:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"images were found for {len(labels)} class ({', '.join(labels) or 'none'}), and a "
            "classifier needs 2 or more: add another class, or go on from a version that has "
            "some",
        )
    if unlearned := [label for label in labels if not learned[label]]:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the classes {listed(map(shown, unlearned))} are in val/ or test/ alone and not among "
            f"those to learn from ({listed(map(shown, sorted(learned)))}): add training images, or "
            "give a class one name in all parts",
        )
    for part, counts in (("validation", measured), ("test", tested)):
        if counts and (missing := sorted(set(learned) - set(counts))):
            warnings.append(
                f"no {part} images for {listed(missing)}: the {part} figures say nothing of them"
            )
    return tuple(sorted(learned))


def listed(names: Iterable[str], most: int = 10) -> str:
    """Returns the first names, and how many more there are."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
