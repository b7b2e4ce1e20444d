"""Files that were found and not used, by reason and class; for the report."""

import msgspec

from service.domain import LeftOutReason, ReadSummary

MAX_EXAMPLES = 5

_WORDS = {
    LeftOutReason.UNREADABLE: "damaged, or cannot be read",
    LeftOutReason.WRONG_FORMAT: "no image, or of a format that is not decoded",
    LeftOutReason.LINK: "a link, which is not followed",
    LeftOutReason.HIDDEN: "hidden",
    LeftOutReason.SYSTEM: "a system's own",
    LeftOutReason.STRAY: "beside the folders of the classes",
    LeftOutReason.COPY: "a copy of another image",
    LeftOutReason.CONTRADICTION: "the same image in two classes",
    LeftOutReason.ERASED: "erased from the dataset",
}


class LeftOutRow(msgspec.Struct, frozen=True, kw_only=True):
    """Files of one class that were left out for one reason."""

    reason: str
    """For people, as "damaged, or cannot be read"."""
    label: str
    """Their class; "" where they lie in none."""
    count: int
    """Number of files."""
    examples: list[str] = []
    """Some of their names, relative to the dataset, and what is wrong with each."""


class LeftOutTable(msgspec.Struct, frozen=True, kw_only=True):
    """All files that were found, and those of them that were left out."""

    rows: list[LeftOutRow]
    """Most files first."""
    seen: int
    """Files that were found."""
    used: int
    """Files that were learned from or measured on."""

    @property
    def count(self) -> int:
        """Counts the files that were left out."""
        return self.seen - self.used

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Counts the files of each reason over all classes, commonest first."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.reason] = totals.get(row.reason, 0) + row.count
        return sorted(totals.items(), key=lambda item: -item[1])


def of(summary: ReadSummary) -> LeftOutTable:
    """Returns what became of the files of a dataset, in the report's words."""
    rows = [
        LeftOutRow(
            reason=_WORDS[row.reason],
            label=row.label,
            count=row.count,
            examples=[
                f"{file.path} ({file.detail})"
                for file in summary.files
                if (file.reason, file.label) == (row.reason, row.label)
            ][:MAX_EXAMPLES],
        )
        for row in summary.left_out
    ]
    rows.sort(key=lambda row: -row.count)
    return LeftOutTable(rows=rows, seen=summary.seen, used=summary.used)
