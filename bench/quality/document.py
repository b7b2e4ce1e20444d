"""Writes down each measurement: a title, a table, and the bounds that it missed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from trainer.intervals import wilson


@dataclass
class Section:
    """One measurement in Markdown."""

    title: str
    lines: list[str] = field(default_factory=list)
    bounds: list[tuple[str, bool]] = field(default_factory=list)
    """What was promised, with the figure reached, and whether it was kept."""

    def say(self, text: str) -> None:
        """Adds a paragraph."""
        self.lines += [text, ""]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Adds a table."""
        self.lines += [_row(head), _row(["---"] * len(head)), *map(_row, rows), ""]

    def bound(self, promise: str, is_kept: bool) -> None:
        """Adds a bound, written below the table."""
        self.bounds.append((promise, is_kept))

    def markdown(self) -> str:
        """Returns the whole section."""
        kept = [f"- {'kept' if is_kept else '**MISSED**'}: {text}" for text, is_kept in self.bounds]
        return "\n".join([f"## {self.title}", "", *self.lines, *kept, ""])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def share(count: int, n: int) -> str:
    """Returns a share in percent with its 95 % Wilson interval; a dash where there is none."""
    if not n:
        return "-"
    low, high = wilson(count / n, n)
    return f"{100 * count / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {n}"


def mean(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Returns a mean with its standard error, in units of `scale`."""
    if not values:
        return "-"
    error = f" ±{stats.sem(values) / scale:.{digits}f}" if len(values) > 1 else ""
    return f"{float(np.mean(values)) / scale:+.{digits}f}{error}"


def half_width(values: Sequence[float], alpha: float = 0.05) -> float:
    """Returns half the width of the t-interval of a mean, 95 %; infinite of one value."""
    n = len(values)
    if n < 2:
        return math.inf
    return float(stats.t.ppf(1 - alpha / 2, n - 1) * stats.sem(values))


def interval(values: Sequence[float], scale: float = 1.0, form: str = "+.2f") -> str:
    """Returns a mean with half the width of its 95 % t-interval, in units of `scale`."""
    if not values:
        return "-"
    half = f" ±{half_width(values) / scale:{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{float(np.mean(values)) / scale:{form}}{half}"
