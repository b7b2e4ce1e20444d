"""Names that strangers give to files and classes: what is refused, what is left out."""

import re
import unicodedata
from pathlib import PurePosixPath

from service.errors import InvalidInput, Reason
from service.ops.escaping import may_name

MAX_LABEL_CHARS = 128
_MAX_DEPTH = 32
_MAX_PART_BYTES = 255
"""What Linux's file systems take."""
_MAX_NAME_BYTES = 200
"""Of a sender's name for an image; the end is kept, where names differ."""
_MAX_BYTES = 1000
"""Of a whole name: a path may have 4,096, and the folder that it lies in needs some too."""

_DRIVE = re.compile(r"[A-Za-z]:")


def parts_of(name: str) -> tuple[str, ...]:
    """Splits an archive's entry into its folders and its file, as they came; empty for the root.

    Raises InvalidInput: ARCHIVE_UNSAFE for a name that could lead elsewhere,
    ARCHIVE_UNREADABLE for one that cannot be kept.
    """
    problem = ""
    if "\0" in name:
        problem = "holds a NUL"
    elif name.startswith("/") or _DRIVE.match(name):
        problem = "is absolute"
    elif ".." in name.split("/"):
        problem = "leads upwards"
    if problem:
        raise InvalidInput(
            Reason.ARCHIVE_UNSAFE,
            f"the entry {shown(name)} {problem}: names must be relative, with '/' between folders",
        )
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if len(parts) > _MAX_DEPTH:
        raise _not_kept(name, f"lies deeper than {_MAX_DEPTH} folders")
    whole = 0
    for part in parts:
        size = len(part.encode("utf-8", "surrogateescape"))
        if size > _MAX_PART_BYTES:
            raise _not_kept(name, f"has a part longer than {_MAX_PART_BYTES} bytes")
        whole += size + 1
    if whole > _MAX_BYTES:
        raise _not_kept(name, f"is longer than {_MAX_BYTES} bytes")
    return parts


def is_text(name: str) -> bool:
    """Tells whether a name is UTF-8: other bytes can be kept in no JSON."""
    return name.isprintable() or not any("\ud800" <= char <= "\udfff" for char in name)


def text(name: str) -> str:
    """Returns the name with what is not UTF-8 replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def shown(name: str) -> str:
    """Returns the name as a message may show it: short, on one line."""
    return ascii(name if len(name) <= 120 else name[:117] + "...")


def label_problem(label: str) -> str:
    """Says why a text cannot name a class; empty when it can."""
    if not 1 <= len(label) <= MAX_LABEL_CHARS:
        return f"a class name has 1 to {MAX_LABEL_CHARS} characters, this one {len(label)}"
    if not may_name(label):
        return "a class name holds no control characters, nor any that turn the text around"
    if "/" in label or "\\" in label:
        return "a class name holds no '/' and no backslash"
    if label.startswith(".") or label == "__MACOSX":
        return "a class name does not begin with '.', and is not __MACOSX"
    if len(label.encode()) > _MAX_PART_BYTES:
        return f"a class name has at most {_MAX_PART_BYTES} bytes"
    return ""


def file_name(said: str, place: int) -> str:
    """Returns a name for an image by which people know it: its sender's, below its number."""
    base = PurePosixPath(said.replace("\\", "/")).name
    kept = "".join(filter(may_name, unicodedata.normalize("NFC", base)))
    kept = kept.encode()[-_MAX_NAME_BYTES:].decode(errors="ignore")
    return f"{place:06d}/{kept}" if kept else f"image {place}"


def _not_kept(name: str, why: str) -> InvalidInput:
    return InvalidInput(
        Reason.ARCHIVE_UNREADABLE, f"the entry {shown(name)} {why}: give it another name"
    )
