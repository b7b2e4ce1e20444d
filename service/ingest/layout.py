"""Finds the images of a dataset, their classes and their parts, among the names of its files.

`CLASS/FILE`, at any depth below the class; or folders for training, validation and test with
such class folders in each. These are taken as parts only where at least two of them stand
side by side and hold folders, so that a class may be called "train". A folder around it all
is stepped into. Pure: names in, names out. Every entry that is not an image is among what was left
out, with its reason.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from service.domain import LeftOutFile, LeftOutReason, PartName
from service.engine import formats
from service.errors import InvalidInput, Reason, unusable_dataset
from service.ingest.labels import canonical, check_alike, loose_label
from service.ingest.names import is_text, label_problem, shown, text
from service.ingest.packs import Location

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

_SYSTEM = {
    # Synology, QNAP and other network disks; Windows; macOS; Linux; Python.
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found",
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db",
    "ehthumbs_vista.db", "desktop.ini", "__macosx", "icon\r", "network trash folder",
    "temporary items", "__pycache__",
}  # fmt: skip
_FIRST = 5

Name = tuple[str, ...]


class Kind(Enum):
    """Kinds of entries."""

    FILE = "file"
    FOLDER = "folder"
    LINK = "link"
    OTHER = "other"
    """A device, a pipe or a socket."""
    REPLACED = "replaced"
    """An entry of an archive that has another of the same name further on."""
    DENIED = "denied"
    """A folder that may not be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a folder or an archive: its parts, as they came."""

    name: Name
    kind: Kind
    location: Location | None = None
    """Where its bytes lie; None where they are not to be read."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that should be an image."""

    name: str
    """Relative to the dataset, for people."""
    label: str
    part: PartName
    location: Location
    depth: int = 0
    """Folders between its class's and itself."""
    group: str = ""
    """What it came with of the images that it belongs together with."""


@dataclass
class Arranged:
    """The files of a dataset, in the order of their names, and what is none of them."""

    files: list[ImageFile] = field(default_factory=list)
    left_out: list[LeftOutFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What looks as if it was meant otherwise, for people."""


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
    folder_of: dict[str, Entry] = {}
    """A folder of each class."""
    for part, folder in classes:
        label = _label_of(folder) if is_labelled else loose_label(folder.name[-1])
        folder_of.setdefault(label, folder)
        for entry in tree.leaves(folder):
            depth = len(entry.name) - len(folder.name) - 1
            _take(found, entry, label, part if is_labelled else "", max(depth, 0))
    for top in beside:
        for entry in tree.leaves(top):
            if is_labelled and entry.kind is Kind.FILE:
                found.left_out.append(_left_out(entry, "", LeftOutReason.STRAY, _STRAY_DETAIL))
            else:
                _take(found, entry, "", "")
    found.files.sort(key=lambda file: (file.part, file.label, file.name))
    if is_labelled:
        tree.check_parts(base)
        places: dict[str, str] = {}
        for _, folder in classes:
            places.setdefault(folder.name[-1], "/".join(folder.name))
        check_alike(places.items(), case_sensitive=case_sensitive)
        found.warnings += tree.warnings(base, [folder for _, folder in classes])
        _check_classes(found, folder_of, beside, {part for part, _ in classes})
    elif not found.files:
        raise unusable_dataset(
            f"no files were found: put images there, at any depth{_why_none(found.left_out)}"
        )
    return found


_REPLACED_DETAIL = "the archive has this name again: the last one counts"
_STRAY_DETAIL = "it lies beside the folders of the classes"
_NOT_PLAIN = {
    Kind.LINK: (LeftOutReason.LINK, "a link, which is not followed: put the file in its place"),
    Kind.OTHER: (LeftOutReason.LINK, "a device, a pipe or a socket"),
    Kind.DENIED: (LeftOutReason.UNREADABLE, "a folder that may not be read"),
}


def _take(found: Arranged, entry: Entry, label: str, part: PartName, depth: int = 0) -> None:
    if entry.kind is not Kind.FILE:
        reason, detail = _NOT_PLAIN[entry.kind]
        found.left_out.append(_left_out(entry, label, reason, detail))
    elif not all(is_text(name) for name in entry.name):
        reason = LeftOutReason.UNREADABLE
        found.left_out.append(_left_out(entry, label, reason, "its name is not UTF-8: rename it"))
    else:
        assert entry.location is not None, "only noise is not read"
        name = "/".join(entry.name)
        found.files.append(ImageFile(name, label, part, entry.location, depth))


def _left_out(entry: Entry, label: str, reason: LeftOutReason, detail: str) -> LeftOutFile:
    return LeftOutFile("/".join(text(name) for name in entry.name), label, reason, detail)


def _is_class(entry: Entry) -> bool:
    if entry.kind in (Kind.FOLDER, Kind.DENIED):
        return True
    # What a link leads to is not looked at; a class that is one must not be lost.
    suffix = Path(entry.name[-1]).suffix.lower()
    return entry.kind is Kind.LINK and suffix not in formats.SUFFIXES | _OTHER_SUFFIXES


class _Tree:
    """Entries by their folder, without hidden and system ones."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.children: dict[Name, list[Entry]] = defaultdict(list)
        self.noise: list[LeftOutFile] = []
        """Hidden and system files; of a folder of such, the folder alone."""
        known: dict[Name, Entry] = {}
        noise: set[Name] = set()
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.kind is Kind.REPLACED:
                self.noise.append(_left_out(entry, "", LeftOutReason.COPY, _REPLACED_DETAIL))
            elif (cut := _noise(entry.name)) is not None:
                if cut not in noise:
                    noise.add(cut)
                    is_file = cut == entry.name and entry.kind is Kind.FILE
                    self.noise.append(_noise_row(cut, is_file=is_file))
                    self._add_above(known, cut)
            else:
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
                entry.kind is Kind.FILE and Path(entry.name[-1]).suffix.lower() in formats.SUFFIXES
                for entry in inside
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

    def check_parts(self, base: Name) -> None:
        """Raises InvalidInput for folders of parts of which only some hold folders of classes."""
        named = {
            entry: PARTS[name]
            for entry in self.children[base]
            if entry.kind is Kind.FOLDER
            and (name := canonical(text(entry.name[-1])).lower()) in PARTS
        }
        flat = [
            entry
            for entry in named
            if not any(inner.kind is Kind.FOLDER for inner in self.children[entry.name])
        ]
        if len(set(named.values())) > 1 and 0 < len(flat) < len(named):
            deep = next(entry for entry in named if entry not in flat)
            raise unusable_dataset(
                f"{shown(deep.name[-1])} holds folders and {shown(flat[0].name[-1])} beside it "
                "holds none: give each a folder per class, take out what has no classes, or rename "
                "them if they are classes"
            )

    def warnings(self, base: Name, classes: Sequence[Entry]) -> list[str]:
        """Returns what looks as if another level of folders was meant."""
        found = []
        if base:
            names = ", ".join(shown(folder.name[-1]) for folder in classes[:_FIRST])
            found.append(
                f"the folder {shown('/'.join(base))} was stepped into: the classes are those "
                f"inside, {names}"
            )
        below: dict[str, int] = defaultdict(int)
        for folder in classes:
            inside = self.children[folder.name]
            if any(entry.kind is Kind.FILE for entry in inside):
                return found
            for name in {entry.name[-1] for entry in inside if entry.kind is Kind.FOLDER}:
                below[name] += 1
        if repeated := sorted(name for name, count in below.items() if count > 1):
            found.append(
                f"the classes hold no images but folders of the same names "
                f"({', '.join(map(shown, repeated[:_FIRST]))}): if these are the classes, send "
                "their folders; if they are parts of the data, name them train, val and test and "
                "put the classes into them"
            )
        return found

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
        """Yields all that is not a folder at or below an entry."""
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


_OTHER_SUFFIXES = {
    ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".pdf",
    ".zip", ".tar", ".gz", ".log", ".db", ".py", ".sh",
}  # fmt: skip


def _label_of(folder: Entry) -> str:
    """Returns the class of a folder; raises InvalidInput for a name that cannot be one."""
    raw = folder.name[-1]
    if not is_text(raw):
        raise unusable_dataset(f"the name of the folder {text(raw)!r} is not UTF-8: rename it")
    label = canonical(raw)
    if problem := label_problem(label):
        raise unusable_dataset(f"{problem}: rename the folder {shown(raw)}")
    return label


def _check_classes(
    found: Arranged, folder_of: Mapping[str, Entry], beside: Sequence[Entry], parts: set[PartName]
) -> None:
    if not folder_of:
        what = "no files were found"
        if beside:
            first = ", ".join(shown("/".join(entry.name)) for entry in beside[:_FIRST])
            what = f"there is no folder of a class beside {first}"
        raise unusable_dataset(
            f"{what}: the images must lie in a folder per class, or in train/, val/ and test/ "
            f"with a folder per class in each{_why_none(found.left_out)}"
        )
    if parts.isdisjoint(("", "train")):
        raise unusable_dataset(
            f"there are the parts {' and '.join(f'{part}/' for part in sorted(parts))} and none to "
            "learn from: add train/ with a folder per class, or rename the folders if they are "
            "classes"
        )
    for part in sorted(parts - {file.part for file in found.files}):
        raise unusable_dataset(
            f"the part {part}/ holds no images: put some into its folders of classes, or remove it"
        )
    filled = {file.label for file in found.files}
    for label, folder in folder_of.items():
        if label not in filled:
            raise unusable_dataset(
                f"the class {shown(label)} has no images: {_why_empty(found, folder, label)}"
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
