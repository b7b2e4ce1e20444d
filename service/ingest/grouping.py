"""Groups of images that belong together, by their names: frames of a video, photos of a patient.

One of two ways: the n-th folder below the class's, or a pattern of file names. A group reaches
over classes, parts and the datasets of a version's bases: equal names are one group.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath

from service.errors import InvalidInput, bad_field
from service.ingest.index import IndexedImage
from service.ingest.names import shown

MAX_PATTERN_CHARS = 255
MAX_STARS = 4
MAX_LEVEL = 32
_WILD = re.compile(r"(\{group\}|\*)")


@dataclass(frozen=True)
class NamedGroups:
    """Groups that names tell: by a folder's level from 1, or by a pattern; at most one is set.

    In a pattern, `{group}` stands for the group's name, one character or more, and `*` for
    anything, also nothing; both take as little as fits, from left to right, and all else stands
    for itself. It covers the whole name of the file, with its ending. Raises InvalidInput
    (INVALID_FIELD).
    """

    folder_level: int = 0
    name_pattern: str = ""

    def __post_init__(self) -> None:
        if self.folder_level and self.name_pattern:
            raise _wrong("folder_level", "set folder_level or name_pattern, not both")
        if not 0 <= self.folder_level <= MAX_LEVEL:
            raise _wrong(
                "folder_level", f"folder_level must be 1 to {MAX_LEVEL}, not {self.folder_level}"
            )
        if self.name_pattern:
            _check_pattern(self.name_pattern)

    def of(self, image: IndexedImage) -> str:
        """Returns an image's group: what it came with, else what its name tells; "" for none."""
        if image.group:
            return image.group
        *folders, file = PurePosixPath(image.name).parts
        if self.folder_level:
            below = folders[len(folders) - image.depth :] if image.depth else []
            return below[self.folder_level - 1] if self.folder_level <= len(below) else ""
        return self._match(file) if self.name_pattern else ""

    def _match(self, name: str) -> str:
        # By hand and not by a regular expression: each piece is sought once, so that no name and
        # no pattern can make it slow.
        name = unicodedata.normalize("NFC", name)
        first, *rest = _WILD.split(unicodedata.normalize("NFC", self.name_pattern))
        if not name.startswith(first):
            return ""
        group, place = "", len(first)
        for at in range(0, len(rest), 2):
            wild, text = rest[at : at + 2]
            least = place + (wild != "*")
            is_last = at + 2 == len(rest)
            end = len(name) - len(text) if is_last else name.find(text, least)
            if end < least or not name.startswith(text, end):
                return ""
            if wild != "*":
                group = name[place:end]
            place = end + len(text)
        return group


def _check_pattern(pattern: str) -> None:
    wild = _WILD.findall(pattern)
    told = f"the name_pattern {shown(pattern)}"
    if len(pattern) > MAX_PATTERN_CHARS:
        problem = f"has more than {MAX_PATTERN_CHARS} characters"
    elif "/" in pattern or "\\" in pattern:
        problem = "holds a slash: it is matched against the file's name alone; for folders set "
        problem += "folder_level"
    elif wild.count("{group}") != 1:
        problem = "must hold {group} exactly once, as in 'patient-{group}_*.jpg'"
    elif len(wild) - 1 > MAX_STARS:
        problem = f"holds more than {MAX_STARS} stars"
    elif any(not text for text in _WILD.split(pattern)[2:-1:2]):
        problem = "has {group} or * side by side: put what stands between them in the names there"
    else:
        return
    raise _wrong("name_pattern", f"{told} {problem}")


def _wrong(field: str, message: str) -> InvalidInput:
    return bad_field(f"grouping.{field}", message)
