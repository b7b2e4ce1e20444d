"""Files that were found and not learned from, by reason and class; for the report."""

from collections.abc import Iterable
from pathlib import PurePath

import msgspec

from service.domain import RejectedFile

MAX_EXAMPLES = 5


class LeftOutRow(msgspec.Struct, frozen=True, kw_only=True):
    """Files of one class that were left out for one reason."""

    reason: str
    """For people, as "it is a GIF"."""
    label: str
    """Their class; "" where they lie in none."""
    count: int
    examples: list[str] = []
    """Some of their names, relative to the dataset."""


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """All files that were found, and those of them that were left out."""

    rows: list[LeftOutRow]
    """Most files first."""
    seen: int
    """Files that were found."""
    used: int
    """Files that were learned from or measured on."""

    @property
    def count(self) -> int:
        """Files that were left out."""
        return self.seen - self.used

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Each reason with its files over all classes, commonest first."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.reason] = totals.get(row.reason, 0) + row.count
        return sorted(totals.items(), key=lambda item: -item[1])


def summarise(rejected: Iterable[RejectedFile], used: int) -> LeftOut:
    """Groups refused files by what is wrong with them and by the folder that they lie in."""
    groups: dict[tuple[str, str], list[str]] = {}
    for file in rejected:
        parents = PurePath(file.path).parts[:-1]
        groups.setdefault((file.detail, parents[-1] if parents else ""), []).append(file.path)
    rows = [
        LeftOutRow(reason=reason, label=label, count=len(paths), examples=paths[:MAX_EXAMPLES])
        for (reason, label), paths in groups.items()
    ]
    rows.sort(key=lambda row: -row.count)
    return LeftOut(rows=rows, seen=used + sum(row.count for row in rows), used=used)
