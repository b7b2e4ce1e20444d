"""Lays rows out for people: in columns where they fit, below one another where they do not.

Nothing is cut, and nothing but prose is broken, at its spaces: what is copied from a
terminal must work. A width of None is that of a pipe, into which every row goes as one line.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, islice

from rich.cells import cell_len

_MEASURED = 100
"""Rows by which the columns' widths are chosen, so that a list of any length is shown as it
comes."""
_GAP = "  "
_LEAST_PROSE = 24
"""Characters, below which prose in a column is hard to read."""

NOTHING = "-"
"""Stands where there is no value."""


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], width: int | None, *, is_prose: bool
) -> Iterator[str]:
    """Yields lines, the first of them the columns' names; none where there are no rows.

    With `is_prose` the last column may be broken at its spaces. Where the columns do not fit,
    each row is a heading, its first cell, with its other cells below.
    """
    remaining = iter(rows)
    sample = list(islice(remaining, _MEASURED))
    if not sample:
        return
    widths = [max(map(cell_len, column)) for column in zip(columns, *sample, strict=True)]
    before = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    last = min(widths[-1], _LEAST_PROSE) if is_prose else widths[-1]
    is_narrow = width is not None and before + last > width
    if is_narrow and len(sample) < _MEASURED:
        # All rows are here: a column without a value in any says nothing.
        said = [any(cell != NOTHING for cell in cells) for cells in zip(*sample, strict=True)]
        if not all(said):
            less = [list(compress(row, said)) for row in sample]
            yield from table(
                list(compress(columns, said)), less, width, is_prose=is_prose and said[-1]
            )
            return
    if not is_narrow:
        yield from _in_columns(columns, widths, None)
    for row in _chained(sample, remaining):
        if is_narrow:
            yield from _stacked(columns, row, width or 0)
        else:
            room = width - before if width is not None and is_prose else None
            yield from _in_columns(row, widths, room)


def fields(pairs: Sequence[tuple[str, str]], width: int | None) -> Iterator[str]:
    """Yields a line for each name with its value, and more where a value is wider than that."""
    names = max((cell_len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        room = None if width is None else max(width - names - len(_GAP), _LEAST_PROSE)
        yield from _in_columns((name, value), (names, 0), room)


def _chained(
    first: Iterable[Sequence[str]], then: Iterable[Sequence[str]]
) -> Iterator[Sequence[str]]:
    yield from first
    yield from then


def _in_columns(cells: Sequence[str], widths: Sequence[int], room: int | None) -> Iterator[str]:
    *padded, last = cells
    start = "".join(
        cell + " " * (width - cell_len(cell)) + _GAP
        for cell, width in zip(padded, widths, strict=False)
    )
    first, *more = _broken(last, room) if room is not None else [last]
    yield (start + first).rstrip()
    indent = " " * (sum(widths[:-1]) + len(_GAP) * len(padded))
    for line in more:
        yield indent + line


def _stacked(columns: Sequence[str], cells: Sequence[str], width: int) -> Iterator[str]:
    if cells[0]:
        # A number alone says little.
        yield f"{columns[0]} {cells[0]}" if cells[0].isdigit() else cells[0]
    line = ""
    for name, cell in zip(columns[1:], cells[1:], strict=True):
        if cell in ("", NOTHING):
            continue
        pair = f"{name}: {cell}" if name else cell
        if line and cell_len(_GAP + line + _GAP + pair) <= width:
            line += _GAP + pair
            continue
        if line:
            yield _GAP + line
        *more, line = _broken(pair, width - len(_GAP))
        yield from (_GAP + part for part in more)
    if line:
        yield _GAP + line


def _broken(text: str, width: int) -> list[str]:
    if cell_len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]
