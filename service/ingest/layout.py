"""Finds the images of a dataset, their classes and their parts, among the names of its files.

`CLASS/FILE`, at any depth below the class; or folders for training, validation and test with
such class folders in each. These are taken as parts only where at least two of them stand
side by side and hold folders, so that a class may be called "train". A folder around it all
is stepped into. Pure: names in, names out. Every entry that is no image is among what was left
out, with its reason.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from service.domain import LeftOutFile, LeftOutReason, PartName
from service.errors import InvalidInput, Reason
from service.ingest.names import MAX_LABEL_CHARS, is_text, label_problem, shown, text

PARTS: dict[str, PartName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Folder names in lower case, and the part that their images belong to."""
UNLABELLED = "unlabelled"
"""The folder of a target domain's images whose class is not known."""

_SYSTEM = {
    # Synology, QNAP and other network disks; Windows; macOS; Linux; Python.
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found",
    "$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db",
    "ehthumbs_vista.db", "desktop.ini", "__macosx", "icon\r", "network trash folder",
    "temporary items", "__pycache__",
}  # fmt: skip
_FILE_SUFFIX_CHARS = 6
"""A link beside the classes with a shorter suffix than that was a file, not a class."""
_FIRST = 5

Name = tuple[str, ...]


class Kind(Enum):
    """Kinds of entries."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"
    """A device, a pipe or a socket."""
    DENIED = "denied"
    """A folder that may not be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a folder or an archive: its parts, as they came."""

    name: Name
    kind: Kind
    path: Path = Path()
    """The file that holds its bytes; for files alone."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that should be an image."""

    name: str
    """Relative to the dataset, for people."""
    label: str
    part: PartName
    path: Path
    is_nested: bool = False
    """It lies in a folder below its class's."""


@dataclass
class Arranged:
    """The files of a dataset, in the order of their names, and what is none of them."""

    files: list[ImageFile] = field(default_factory=list)
    left_out: list[LeftOutFile] = field(default_factory=list)


def arrange(
    entries: Iterable[Entry], *, is_labelled: bool, case_sensitive: bool = False
) -> Arranged:
    """Finds classes and parts, in the order of names.

    A dataset that `is_labelled` must have them; of another one, folders are taken as classes
    as far as they look like some, and no file is a stray. Raises InvalidInput
    (DATASET_UNUSABLE) for a class without files, class names that look the same, names that
    cannot be class names, and where there is no file at all; ARCHIVE_UNREADABLE for a name
    that is a file and a folder.
    """
    tree = _Tree(entries)
    base = tree.base()
    found = Arranged(left_out=tree.noise)
    classes, beside = tree.classes_at(base)
    labels = _Labels(case_sensitive=case_sensitive)
    for part, folder in classes:
        label = labels.add(folder) if is_labelled else loose_label(folder.name[-1])
        for entry in tree.leaves(folder):
            is_nested = len(entry.name) > len(folder.name) + 1
            _take(found, entry, label, part if is_labelled else "", is_nested=is_nested)
    for top in beside:
        for entry in tree.leaves(top):
            if is_labelled and entry.kind is Kind.FILE:
                found.left_out.append(_left_out(entry, "", LeftOutReason.STRAY, _STRAY_DETAIL))
            else:
                _take(found, entry, "", "", is_nested=False)
    found.files.sort(key=lambda file: (file.part, file.label, file.name))
    if is_labelled:
        labels.check()
        _check_classes(found, labels, beside, {part for part, _ in classes})
    elif not found.files:
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"no files were found: put images there, at any depth{_why_none(found.left_out)}",
        )
    return found


def check_given(label: str, *, is_labelled: bool) -> None:
    """Checks a class name that came with an image; empty is one for a set without labels.

    Raises InvalidInput (INVALID_FIELD) for one that cannot be a class name.
    """
    label = canonical(label)
    if (label or is_labelled) and (problem := label_problem(label)):
        raise InvalidInput(Reason.INVALID_FIELD, problem)


def check_alike(labels: Iterable[tuple[str, str]], *, case_sensitive: bool) -> None:
    """Raises InvalidInput (DATASET_UNUSABLE) for class names that people take for one.

    Each comes as it was written, with its folder or "", for the message.
    """
    by_look: dict[str, tuple[str, str]] = {}
    by_case: dict[str, tuple[str, str]] = {}
    for raw, where in labels:
        look = _look(raw)
        known, at = by_look.setdefault(look, (raw, where))
        if known != raw:
            raise InvalidInput(
                Reason.DATASET_UNUSABLE,
                f"the class names {shown(known)} and {shown(raw)} look the same{_places(at, where)}"
                ": give both classes one name, or two that differ",
            )
        known, at = by_case.setdefault(look.casefold(), (raw, where))
        if not case_sensitive and _look(known) != look:
            raise InvalidInput(
                Reason.DATASET_UNUSABLE,
                f"the class names {shown(known)} and {shown(raw)} differ in upper and lower case "
                f"alone{_places(at, where)}: give both classes one name, or set "
                "case_sensitive_labels if they are two",
            )


def canonical(label: str) -> str:
    """Returns a class name as it is kept: in NFC, without blanks around it."""
    return unicodedata.normalize("NFC", label).strip()


def _look(label: str) -> str:
    # Format characters show nothing: joiners, byte order marks, soft hyphens.
    kept = (char for char in canonical(label) if unicodedata.category(char) != "Cf")
    return " ".join("".join(kept).split())


def _places(*places: str) -> str:
    named = [shown(place) for place in places if "/" in place]
    return f" ({' and '.join(named)})" if named else ""


def loose_label(name: str) -> str:
    """Returns the class that a name may be one of, without labels; empty where it cannot be."""
    label = canonical(name) if is_text(name) else ""
    is_one = label.casefold() != UNLABELLED and not label_problem(label)
    return label if is_one else ""


_STRAY_DETAIL = "it lies beside the folders of the classes"
_NOT_PLAIN = {
    Kind.LINK: (LeftOutReason.LINK, "a link, which is not followed: put the file in its place"),
    Kind.OTHER: (LeftOutReason.LINK, "a device, a pipe or a socket"),
    Kind.DENIED: (LeftOutReason.UNREADABLE, "a folder that may not be read"),
}


def _take(found: Arranged, entry: Entry, label: str, part: PartName, *, is_nested: bool) -> None:
    if entry.kind is not Kind.FILE:
        reason, detail = _NOT_PLAIN[entry.kind]
        found.left_out.append(_left_out(entry, label, reason, detail))
    elif not all(is_text(name) for name in entry.name):
        reason = LeftOutReason.UNREADABLE
        found.left_out.append(_left_out(entry, label, reason, "its name is no UTF-8: rename it"))
    else:
        name = "/".join(entry.name)
        found.files.append(ImageFile(name, label, part, entry.path, is_nested))


def _left_out(entry: Entry, label: str, reason: LeftOutReason, detail: str) -> LeftOutFile:
    return LeftOutFile("/".join(text(name) for name in entry.name), label, reason, detail)


def _is_class(entry: Entry) -> bool:
    if entry.kind in (Kind.FOLDER, Kind.DENIED):
        return True
    # What a link leads to is not looked at; a class that is one must not be lost.
    suffix = Path(entry.name[-1]).suffix
    return entry.kind is Kind.LINK and not 2 <= len(suffix) <= _FILE_SUFFIX_CHARS


class _Tree:
    """Entries by their folder, without hidden and system ones."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.children: dict[Name, list[Entry]] = defaultdict(list)
        self.noise: list[LeftOutFile] = []
        """Hidden and system files; of a folder of such, the folder alone."""
        known: dict[Name, Entry] = {}
        noise: set[Name] = set()
        for entry in sorted(entries, key=lambda entry: entry.name):
            if (cut := _noise(entry.name)) is not None:
                if cut not in noise:
                    noise.add(cut)
                    is_file = cut == entry.name and entry.kind is Kind.FILE
                    self.noise.append(_noise_row(cut, is_file=is_file))
                    self._add_above(known, cut)
                continue
            self._add(known, entry)

    def _add_above(self, known: dict[Name, Entry], name: Name) -> None:
        # Archives may name files and not their folders.
        for depth in range(1, len(name)):
            above = name[:depth]
            if above not in known:
                known[above] = Entry(above, Kind.FOLDER)
                self.children[above[:-1]].append(known[above])
            elif known[above].kind is not Kind.FOLDER:
                raise _two_kinds(above)

    def _add(self, known: dict[Name, Entry], entry: Entry) -> None:
        self._add_above(known, entry.name)
        if (before := known.get(entry.name)) is None:
            known[entry.name] = entry
            self.children[entry.name[:-1]].append(entry)
        elif before.kind is not entry.kind:
            raise _two_kinds(entry.name)

    def base(self) -> Name:
        """Finds the folder that holds the classes or the parts."""
        base: Name = ()
        while not self.parts_at(base):
            folders = [entry for entry in self.children[base] if _is_class(entry)]
            if len(folders) != 1 or folders[0].kind is not Kind.FOLDER:
                break
            inside = self.children[folders[0].name]
            has_images = any(
                entry.kind is Kind.FILE and _looks_like_image(entry.name[-1]) for entry in inside
            )
            if has_images or not any(_is_class(entry) for entry in inside):
                break
            base = folders[0].name
        return base

    def parts_at(self, base: Name) -> dict[Entry, PartName]:
        """Finds the folders of parts at `base`; empty unless there are two parts at least."""
        found: dict[Entry, PartName] = {
            entry: part
            for entry in self.children[base]
            if entry.kind is Kind.FOLDER
            and is_text(entry.name[-1])
            and (part := PARTS.get(canonical(entry.name[-1]).lower()))
            and any(inner.kind is Kind.FOLDER for inner in self.children[entry.name])
        }
        return found if len(set(found.values())) > 1 else {}

    def classes_at(self, base: Name) -> tuple[list[tuple[PartName, Entry]], list[Entry]]:
        """Returns the folders of classes with their parts, and all that lies beside them."""
        parts = self.parts_at(base)
        groups: list[tuple[PartName, Name]] = [("", base)]
        beside: list[Entry] = []
        if parts:
            groups = [(part, folder.name) for folder, part in parts.items()]
            beside = [entry for entry in self.children[base] if entry not in parts]
        classes: list[tuple[PartName, Entry]] = []
        for part, above in groups:
            for entry in self.children[above]:
                if _is_class(entry):
                    classes.append((part, entry))
                else:
                    beside.append(entry)
        for depth, inner in enumerate(base):
            beside += [entry for entry in self.children[base[:depth]] if entry.name[-1] != inner]
        return classes, beside

    def leaves(self, top: Entry) -> Iterator[Entry]:
        """Yields all that is no folder at or below an entry."""
        waiting = [top]
        while waiting:
            entry = waiting.pop()
            if entry.kind is Kind.FOLDER:
                waiting += reversed(self.children[entry.name])
            else:
                yield entry


def _two_kinds(name: Name) -> InvalidInput:
    return InvalidInput(
        Reason.ARCHIVE_UNREADABLE,
        f"{shown('/'.join(name))} is a file and a folder at once, or lies below a file: pack the "
        "images again",
    )


def _noise(name: Name) -> Name | None:
    """Returns the name up to its first hidden or system part, where it has one."""
    for depth, part in enumerate(name, 1):
        if part.startswith(".") or part.lower() in _SYSTEM:
            return name[:depth]
    return None


def is_noise(name: Name) -> bool:
    """Tells whether a name is hidden or a system's, so that its bytes are not read."""
    return _noise(name) is not None


def _noise_row(name: Name, *, is_file: bool) -> LeftOutFile:
    is_system = name[-1].lower() in _SYSTEM
    reason = LeftOutReason.SYSTEM if is_system else LeftOutReason.HIDDEN
    path = "/".join(text(part) for part in name)
    if is_file:
        return LeftOutFile(path, "", reason, "a system's file" if is_system else "a hidden file")
    kind = "a system's folder" if is_system else "a hidden folder"
    return LeftOutFile(f"{path}/", "", reason, f"{kind}, with all in it")


_IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".hif",
}  # fmt: skip


def _looks_like_image(name: str) -> bool:
    return Path(name).suffix.lower() in _IMAGE_SUFFIXES


class _Labels:
    """The class names of a dataset, and the folders that they came from."""

    def __init__(self, *, case_sensitive: bool) -> None:
        self._case_sensitive = case_sensitive
        self._folders: dict[str, Entry] = {}
        self._raw: dict[str, str] = {}

    def add(self, folder: Entry) -> str:
        """Returns the class of a folder; raises InvalidInput for a name that cannot be one."""
        raw = folder.name[-1]
        if not is_text(raw):
            raise InvalidInput(
                Reason.DATASET_UNUSABLE,
                f"the name of the folder {text(raw)!r} is no UTF-8: rename it",
            )
        label = canonical(raw)
        if problem := label_problem(label):
            raise InvalidInput(
                Reason.DATASET_UNUSABLE, f"{problem}: rename the folder {shown(raw)}"
            )
        self._folders.setdefault(label, folder)
        self._raw.setdefault(raw, "/".join(folder.name))
        return label

    def check(self) -> None:
        """Raises InvalidInput for names that look the same."""
        check_alike(self._raw.items(), case_sensitive=self._case_sensitive)

    def items(self) -> Sequence[tuple[str, Entry]]:
        """Classes and a folder of each."""
        return list(self._folders.items())


def _check_classes(
    found: Arranged, labels: _Labels, beside: Sequence[Entry], parts: set[PartName]
) -> None:
    if not labels.items():
        what = "no files were found"
        if beside:
            first = ", ".join(shown("/".join(entry.name)) for entry in beside[:_FIRST])
            what = f"there is no folder of a class beside {first}"
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"{what}: the images must lie in a folder per class, or in train/, val/ and test/ "
            f"with a folder per class in each{_why_none(found.left_out)}",
        )
    if parts.isdisjoint(("", "train")):
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"there are the parts {' and '.join(f'{part}/' for part in sorted(parts))} and none to "
            "learn from: add train/ with a folder per class, or rename the folders if they are "
            "classes",
        )
    for part in sorted(parts - {file.part for file in found.files}):
        raise InvalidInput(
            Reason.DATASET_UNUSABLE,
            f"the part {part}/ holds no images: put some into its folders of classes, or remove it",
        )
    filled = {file.label for file in found.files}
    for label, folder in labels.items():
        if label not in filled:
            raise InvalidInput(
                Reason.DATASET_UNUSABLE,
                f"the class {shown(label)} has no images: {_why_empty(found, folder, label)}",
            )


def _why_empty(found: Arranged, folder: Entry, label: str) -> str:
    where = shown("/".join(text(name) for name in folder.name))
    if folder.kind is Kind.LINK:
        return f"{where} is a link, which is not followed: put the folder itself in its place"
    if folder.kind is Kind.DENIED:
        return f"the folder {where} may not be read: allow it, or leave the class out"
    below = [row for row in found.left_out if row.label == label or _is_below(row, folder)]
    if not below:
        return f"the folder {where} is empty: put images there, or remove it"
    first = below[0]
    return (
        f"all that the folder {where} holds is left out, such as {shown(first.path)} "
        f"({first.detail}): put images there, or remove the folder"
    )


def _is_below(row: LeftOutFile, folder: Entry) -> bool:
    return row.path.startswith("/".join(text(name) for name in folder.name) + "/")


def _why_none(left_out: Sequence[LeftOutFile]) -> str:
    if not left_out:
        return ""
    first = left_out[0]
    return f"; {len(left_out)} were left out, such as {shown(first.path)} ({first.detail})"


__all__ = [
    "MAX_LABEL_CHARS", "PARTS", "UNLABELLED", "Arranged", "Entry", "ImageFile", "Kind", "Name",
    "arrange", "canonical", "check_alike", "check_given", "is_noise", "loose_label",
]  # fmt: skip
