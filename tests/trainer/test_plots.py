"""Plots are well-formed SVG that shows what it was given."""

import re
from xml.etree import ElementTree

import pytest

from trainer.reporting import plots
from trainer.reporting.calibration import Bin
from trainer.reporting.findings import ScoreBin
from trainer.reporting.plots import Dot


def _parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    numbers = re.findall(r"-?\d+\.?\d*(?:e-?\d+)?|nan|inf", " ".join(_places(root)))
    assert not {"nan", "inf"} & set(numbers)
    assert all(-60 <= float(n) <= 2000 for n in numbers)
    return root


def _places(root: ElementTree.Element) -> list[str]:
    keys = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "points", "width", "height")
    return [value for e in root.iter() for key, value in e.items() if key in keys]


def _texts(root: ElementTree.Element) -> list[str]:
    return [e.text or "" for e in root.iter("text")]


def _bin(confidence: float, accuracy: float, count: int) -> Bin:
    return Bin(confidence - 0.01, confidence, count, confidence, accuracy, 0.1, 1.0)


def test_the_reliability_diagram_shows_each_bin_with_its_count() -> None:
    root = _parsed(plots.reliability([_bin(0.63, 0.2, 7), _bin(0.99, 0.98, 130)], []))
    assert {"130", "7"} <= set(_texts(root))
    assert len([c for c in root.iter("circle") if c.get("class") == "dot"]) == 2
    low, high = (float(c.get("cy", 0)) for c in root.iter("circle"))
    assert high < low


def test_counts_of_bins_beside_each_other_do_not_run_together() -> None:
    bins = [_bin((i + 0.5) / 15, 0.5, 1000 + i) for i in range(15)]
    for b, confidence in ((3, 0.265), (4, 0.268)):
        bins[b] = _bin(confidence, 0.5, 1000 + b)
    root = _parsed(plots.reliability(bins, []))
    placed = [
        (float(t.get("x", 0)), float(t.get("y", 0)))
        for t in root.iter("text")
        if (t.text or "").startswith("10") and len(t.text or "") == 4
    ]
    assert len(placed) == 15
    for i, (x, y) in enumerate(placed):
        for x2, y2 in placed[:i]:
            assert abs(x - x2) >= 24 or abs(y - y2) >= 10


def test_a_row_of_the_dot_plot_is_higher_where_accuracy_is() -> None:
    rows = [Dot("this", 0.95, 0.9, 0.98, is_served=True), Dot("other <b>", 0.5, 0.4, 0.6)]
    root = _parsed(plots.dots(rows))
    first, second = (float(c.get("cx", 0)) for c in root.iter("circle"))
    assert first > second
    assert "other <b>" in _texts(root)


def test_scores_beyond_the_threshold_are_marked() -> None:
    bins = [ScoreBin(i / 10, (i + 1) / 10, i) for i in range(12)]
    root = _parsed(plots.histogram(bins, 1.0))
    kinds = [r.get("class") for r in root.iter("rect")]
    assert kinds == ["within"] * 10 + ["beyond"] * 2
    _parsed(plots.histogram([ScoreBin(0.9, 1.1, 0)], 1.0))


def test_epochs_are_lines_of_their_own() -> None:
    root = _parsed(plots.epochs("Loss", {"train": [2.0, 1.0, 0.5], "held out": [2.1, None, 1.6]}))
    lines = [p.get("points", "").split() for p in root.iter("polyline")]
    assert [len(line) for line in lines] == [3, 2]
    # What was measured in no epoch has no line.
    flat = _parsed(plots.epochs("Loss", {"train": [1.0, 1.0], "held out": [None, None]}))
    assert len(list(flat.iter("polyline"))) == 1


def test_a_square_of_the_heat_map_names_its_classes() -> None:
    root = _parsed(plots.confusion([[3, 1], [0, 0]], ["<ant>", "bee"]))
    assert [t.text for t in root.iter("title")] == [
        "<ant> answered <ant>: 3 of 4",
        "<ant> answered bee: 1 of 4",
    ]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.931, 0.957), (0, 3e4), (5, 5), (1e-9, 2e-9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = plots._ticks(low, high)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in ticks)
    assert len({name for _, name in ticks}) == len(ticks)
