"""The soak as one chart: an SVG of panels over a common axis of time, from its samples.

No script, no outside font; drawn to be read on white. Fine-tunes are grey marks,
kills of trainers red ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from bench.soak.book import Mark

_WIDTH, _LEFT, _RIGHT = 960.0, 64.0, 150.0
_PANEL, _GAP, _TOP, _BOTTOM = 108.0, 30.0, 52.0, 46.0
_MAX_POINTS = 480
_COLOURS = ("#1f6fb4", "#c2571a", "#2a8c4a")

Sample = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One thing over time: its key in the samples, and what people call it."""

    key: str
    name: str


@dataclass(frozen=True)
class Panel:
    """Lines with the same unit."""

    title: str
    lines: tuple[Line, ...]
    is_log: bool = False


PANELS = (
    Panel(
        "memory of the server, MiB", (Line("pss_mib", "PSS"), Line("anonymous_mib", "anonymous"))
    ),
    Panel("memory of its trainers, MiB", (Line("trainers_mib", "RSS"),)),
    Panel(
        "open file descriptors, and threads",
        (Line("descriptors", "descriptors"), Line("threads", "threads")),
    ),
    Panel("latency of Predict, ms", (Line("p50_ms", "p50"), Line("p99_ms", "p99")), is_log=True),
    Panel("Predict calls, 1/s", (Line("good", "good"), Line("refused", "refused"))),
    Panel("data folder, MiB", (Line("stored_mib", "files"),)),
)


def draw(samples: Sequence[Sample], marks: Sequence[Mark], title: str) -> str:
    """The SVG file's text."""
    last_s = max([sample["at_s"] for sample in samples] or [1.0]) or 1.0
    height = _TOP + len(PANELS) * (_PANEL + _GAP) - _GAP + _BOTTOM
    right = _WIDTH - _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
        'font-family="sans-serif" font-size="12" fill="#333" role="img" '
        f'aria-label="{escape(title)}">',
        f'<rect width="{_WIDTH:.0f}" height="{height:.0f}" fill="#fff"/>',
        _text(_LEFT, 20, title, weight="bold"),
    ]

    def x(at_s: float) -> float:
        return _LEFT + (right - _LEFT) * at_s / last_s

    bottom = height - _BOTTOM
    for mark in marks:
        colour, opacity = ("#d01f1f", 0.8) if mark.what == "kill" else ("#999", 0.3)
        if mark.what in ("kill", "fine-tune") and mark.at_s <= last_s:
            at = x(mark.at_s)
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 10:.0f}" y2="{bottom:.0f}" '
                f'stroke="{colour}" stroke-opacity="{opacity}"/>'
            )
    for number, panel in enumerate(PANELS):
        parts += _panel(panel, samples, _TOP + number * (_PANEL + _GAP), last_s)
    unit, seconds = ("min", 60.0) if last_s >= 180 else ("s", 1.0)
    for value in _ticks(0, last_s / seconds):
        parts.append(_text(x(value * seconds), bottom + 16, f"{value:g}", "middle"))
    parts.append(_text(right, bottom + 34, unit, "end"))
    parts.append(_text(_LEFT, bottom + 34, "grey: a fine-tune was asked for"))
    parts.append(_text(_LEFT + 200, bottom + 34, "red: a trainer was killed", colour="#d01f1f"))
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, samples: Sequence[Sample], top: float, last_s: float) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, top + _PANEL
    drawn = [(line, _points(samples, line.key, last_s)) for line in panel.lines]
    values = [value for _, points in drawn for _, value in points if not panel.is_log or value > 0]
    high = max(values, default=1.0) * (1.5 if panel.is_log else 1.05) or 1.0
    low = min(values, default=0.1) / 1.5 if panel.is_log else 0.0

    def y(value: float) -> float:
        if panel.is_log:
            part = math.log(max(value, low) / low) / math.log(high / low)
        else:
            part = value / high
        return bottom - _PANEL * part

    parts = [_text(_LEFT, top - 5, panel.title)]
    for value in _powers(low, high) if panel.is_log else _ticks(0, high):
        at = y(value)
        parts.append(
            f'<line x1="{_LEFT:.0f}" x2="{right:.0f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(_LEFT - 6, at + 4, f"{value:g}", "end"))
    for row, (line, points) in enumerate(drawn):
        colour = _COLOURS[row]
        path = " ".join(
            f"{_LEFT + (right - _LEFT) * at_s / last_s:.1f},{y(value):.1f}"
            for at_s, value in points
        )
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>'
        )
        told = f"{line.name} {points[-1][1]:.4g}" if points else f"{line.name}: none"
        parts.append(_text(right + 8, top + 14 + 18 * row, told, colour=colour))
    return parts


def _points(samples: Sequence[Sample], key: str, last_s: float) -> list[tuple[float, float]]:
    """At most so many as are wide apart; of each stretch the highest, which must not be hidden."""
    kept: dict[int, tuple[float, float]] = {}
    for sample in samples:
        value = sample.get(key)
        if value is None:
            continue
        stretch = int(sample["at_s"] / last_s * _MAX_POINTS)
        if stretch not in kept or value > kept[stretch][1]:
            kept[stretch] = (sample["at_s"], value)
    return list(kept.values())


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / about * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [m * 10.0**p for p in range(first, last + 1) for m in (1, 3)]
    return [value for value in every if low <= value <= high]


def _text(
    x: float, y: float, text: str, anchor: str = "start", *, colour: str = "", weight: str = ""
) -> str:
    more = f' fill="{colour}"' if colour else ""
    more += f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
