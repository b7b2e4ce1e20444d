"""Plots of a report as inline SVG: no script, colours by the page's style sheet.

Every function gives one `<svg>`, 360 units wide, so that its text keeps its size on
a telephone. Names from outside are escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from trainer.reporting.calibration import Bin
from trainer.reporting.findings import ScoreBin

WIDTH = 360.0
_DIGIT = 6.0
"""Width of a digit of the smallest text."""
_HEIGHT = 240.0
_NUMBERED = 20
"""Rows of a heat map that can have a number beside them."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 12.0, 24.0, 36.0


@dataclass(frozen=True)
class _Axes:
    """Turns data into points of the image."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        part = (value - self.x_low) / ((self.x_high - self.x_low) or 1)
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * part

    def y(self, value: float) -> float:
        part = (value - self.y_low) / ((self.y_high - self.y_low) or 1)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * part

    def point(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot: a value with its interval, 0 to 1."""

    name: str
    value: float
    low: float
    high: float
    is_served: bool = False


def reliability(bins: Sequence[Bin], before: Sequence[Bin]) -> Markup:
    """Accuracy over confidence: dots with 95 % intervals and counts; rings before the temperature.

    A dot on the diagonal keeps what it promises.
    """
    start = min(b.low for b in (*bins, *before))
    # The strip below 0 is for the counts, in two rows where they would touch.
    axes = _Axes(min(start, 0.8), 1, -0.29, 1.04)
    ends = [-math.inf, -math.inf]
    parts = _frame(axes, "confidence", "accuracy", _ticks(axes.x_low, 1), _ticks(0, 1))
    diagonal = f"{axes.point(axes.x_low, axes.x_low)} {axes.point(1, 1)}"
    parts.append(f'<polyline class="ref" points="{diagonal}"/>')
    largest = max(b.count for b in bins)
    for b in before:
        parts.append(
            f'<circle class="ring" cx="{axes.x(b.confidence):.1f}" '
            f'cy="{axes.y(b.accuracy):.1f}" r="3"/>'
        )
    for b in bins:
        x = axes.x(b.confidence)
        radius = 3 + 5 * math.sqrt(b.count / largest)
        parts.append(_line("a", x, axes.y(b.accuracy_low), x, axes.y(b.accuracy_high)))
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{axes.y(b.accuracy):.1f}" r="{radius:.1f}"/>'
        )
        count = str(b.count)
        half = _DIGIT * len(count) / 2 + 2
        row = 0 if x - half >= ends[0] else 1
        # Pushed aside where both rows are taken, never onto another.
        at = max(x, ends[row] + half)
        ends[row] = at + half
        parts.append(_text(at, axes.y(-0.17 - 0.09 * row), count, "middle", "small"))
    return _svg(parts, _HEIGHT, "Accuracy over confidence")


def epochs(title: str, series: dict[str, list[float | None]]) -> Markup:
    """Lines over epochs, from 1, of what was measured in each; the page names them."""
    lines = {
        name: [(i + 1, value) for i, value in enumerate(line) if value is not None]
        for name, line in series.items()
    }
    values = [value for line in lines.values() for _, value in line]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or 0.01
    count = max(len(line) for line in series.values())
    axes = _Axes(1, count, low - margin, high + margin)
    step = max(1, math.ceil(count / 6))
    marks = [(float(e), str(e)) for e in range(1, count + 1, step)]
    parts = _frame(axes, "epoch", title.lower(), marks, None)
    for name, line in lines.items():
        points = " ".join(axes.point(epoch, value) for epoch, value in line)
        if points:
            parts.append(f'<polyline class="{"b" if name == "train" else "a"}" points="{points}"/>')
    return _svg(parts, _HEIGHT, f"{title} by epoch")


def dots(rows: Sequence[Dot]) -> Markup:
    """Accuracies with their intervals, one a row."""
    row, top = 40.0, 8.0
    height = top + row * len(rows) + 24
    low = min(r.low for r in rows)
    start = max(0.0, math.floor((low - 0.02) * 20) / 20)

    def x(value: float) -> float:
        return 6 + (WIDTH - 12) * (value - start) / (1 - start)

    parts = []
    for value, name in _ticks(start, 1):
        # Only beside the dots: through the names they would strike them out.
        for i in range(len(rows)):
            middle = top + row * i + 25
            parts.append(_line("grid", x(value), middle - 6, x(value), middle + 7))
        parts.append(_text(min(max(x(value), 14), WIDTH - 14), height - 6, name, "middle"))
    for i, r in enumerate(rows):
        y = top + row * i
        kind = "served" if r.is_served else "other"
        parts.append(_text(6, y + 13, r.name, "start", f"ink {kind}"))
        parts.append(_text(WIDTH - 6, y + 13, f"{r.value * 100:.1f} %", "end", f"ink {kind}"))
        line = f'x1="{x(r.low):.1f}" x2="{x(r.high):.1f}" y1="{y + 25:.1f}" y2="{y + 25:.1f}"'
        parts.append(f'<line class="whisker {kind}" {line}/>')
        parts.append(f'<circle class="dot {kind}" cx="{x(r.value):.1f}" cy="{y + 25:.1f}" r="5"/>')
    return _svg(parts, height, "Accuracies with 95 % intervals")


def histogram(bins: Sequence[ScoreBin], threshold: float) -> Markup:
    """Counts over scores; the threshold is a line, what lies beyond is coloured."""
    most = max((b.count for b in bins), default=1) or 1
    axes = _Axes(bins[0].low, bins[-1].high, 0, most * 1.1)
    parts = _frame(
        axes, "score (higher is stranger)", "images", _ticks(bins[0].low, bins[-1].high), None
    )
    for b in bins:
        left, right, y = axes.x(b.low), axes.x(b.high), axes.y(b.count)
        kind = "beyond" if (b.low + b.high) / 2 > threshold else "within"
        parts.append(
            f'<rect class="{kind}" x="{left + 0.5:.1f}" y="{y:.1f}" '
            f'width="{max(right - left - 1, 0.5):.1f}" height="{axes.y(0) - y:.1f}"/>'
        )
    x = axes.x(threshold)
    parts.append(_line("ref", x, axes.y(0), x, _TOP - 13))
    is_right = x > WIDTH * 0.7
    parts.append(
        _text(x + (-4 if is_right else 4), _TOP - 4, "threshold", "end" if is_right else "start")
    )
    return _svg(parts, _HEIGHT, "Scores of images")


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """A heat map for many classes: a square is the part of its row, named when pointed at."""
    k = len(matrix)
    margin, whole = 20.0, WIDTH - 28.0
    side = whole / k
    parts = [
        f'<rect class="plate" x="{margin:.0f}" y="{margin:.0f}" width="{whole:.0f}" '
        f'height="{whole:.0f}"/>'
    ]
    step = math.ceil(k / _NUMBERED)
    for i in range(step - 1 if step > 1 else 0, k, step):
        middle = margin + (i + 0.5) * side
        parts.append(_text(middle, margin - 5, str(i + 1), "middle", "small"))
        parts.append(_text(margin - 4, middle + 3.5, str(i + 1), "end", "small"))
    for i, counts in enumerate(matrix):
        total = sum(counts)
        for j, count in enumerate(counts):
            if not count:
                continue
            told = f"{names[i]} answered {names[j]}: {count} of {total}"
            parts.append(
                f'<rect class="{"hit" if i == j else "miss"}" x="{margin + j * side:.2f}" '
                f'y="{margin + i * side:.2f}" width="{side:.2f}" height="{side:.2f}" '
                f'fill-opacity="{0.15 + 0.85 * count / total:.2f}"><title>{escape(told)}</title>'
                "</rect>"
            )
    return _svg(parts, margin + whole + 4, "Confusion matrix")


def _frame(
    axes: _Axes,
    x_name: str,
    y_name: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]] | None,
) -> list[str]:
    parts = []
    for value, name in y_ticks if y_ticks is not None else _ticks(axes.y_low, axes.y_high):
        y = axes.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT:.0f}" x2="{WIDTH - _RIGHT:.0f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(_LEFT - 5, y + 4, name, "end"))
    bottom = _HEIGHT - _BOTTOM
    last = -math.inf
    for value, name in x_ticks:
        x = axes.x(value)
        # Names that would lie on each other are left out.
        if x - last < 7 * len(name) + 4:
            continue
        last = x
        parts.append(_text(x, bottom + 14, name, "middle"))
    parts.append(
        f'<line class="axis" x1="{_LEFT:.0f}" x2="{WIDTH - _RIGHT:.0f}" '
        f'y1="{bottom:.0f}" y2="{bottom:.0f}"/>'
    )
    parts.append(_text(WIDTH - _RIGHT, _HEIGHT - 6, x_name, "end"))
    # Above the highest tick, which may lie at the very top.
    parts.append(_text(2, _TOP - 13, y_name, "start"))
    return parts


def _ticks(low: float, high: float, about: int = 4) -> list[tuple[float, str]]:
    """Round numbers between, with their names."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [(low, f"{low:g}")]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, title: str) -> Markup:
    # Every part was made here, of numbers and escaped text.
    return Markup(  # nosec B704  # noqa: S704 - see above
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
