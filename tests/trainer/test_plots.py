"""Plots are well-formed SVG that shows what it was given."""

import re
from xml.etree import ElementTree

import pytest

from trainer.reporting import plots
from trainer.reporting.calibration import Bin
from trainer.reporting.findings import Gap, ScoreBin
from trainer.reporting.plots import Dot
from trainer.reporting.power_law import LearningCurve, Point


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


def test_the_reliability_diagram_shows_each_filled_bin_with_its_count() -> None:
    bins = [Bin(i / 15, (i + 1) / 15, 0, None, None) for i in range(15)]
    bins[14] = Bin(14 / 15, 1, 130, 0.99, 0.98)
    bins[9] = Bin(9 / 15, 10 / 15, 7, 0.63, 0.2)
    root = _parsed(plots.reliability(bins, []))
    assert {"130", "7"} <= set(_texts(root))
    assert len([c for c in root.iter("circle") if c.get("class") == "dot"]) == 2
    high, low = (float(c.get("cy", 0)) for c in root.iter("circle"))
    assert {high > low, high < low} == {True, False}


def test_counts_of_bins_beside_each_other_do_not_run_together() -> None:
    bins = [Bin(i / 15, (i + 1) / 15, 1000 + i, (i + 0.5) / 15, 0.5) for i in range(15)]
    for b, confidence in ((3, 0.265), (4, 0.268)):
        bins[b] = Bin(b / 15, (b + 1) / 15, 1000 + b, confidence, 0.5)
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


def test_the_learning_curve_is_dashed_where_it_goes_beyond_the_data() -> None:
    points = [Point(n, 0.8 + n / 2000, 0.75, 0.95) for n in (20, 40, 80, 140, 200)]
    fitted = [Point(n, 0.85, 0.8, 0.9) for n in range(20, 401, 20)]
    curve = LearningCurve(points=points, fitted=fitted, verdict="little", words="w")
    root = _parsed(plots.learning_curve(curve))
    assert len(list(root.iter("polygon"))) == 1
    assert [p.get("class") for p in root.iter("polyline")] == ["a", "a dashed"]
    assert "400" in _texts(root)
    plain = LearningCurve(points=points, verdict="unknown", words="w")
    assert not list(_parsed(plots.learning_curve(plain)).iter("polyline"))


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


def test_a_gap_without_an_after_says_why() -> None:
    root = _parsed(plots.gaps([Gap("mmd", 0.4, 0.1), Gap("frechet_distance", 80, None)]))
    assert "features unchanged" in _texts(root)
    before, after, _ = (float(r.get("width", 0)) for r in root.iter("rect"))
    assert before == pytest.approx(4 * after)
    _parsed(plots.gaps([Gap("mmd", 0.0, 0.0)]))


def test_epochs_are_lines_of_their_own() -> None:
    root = _parsed(plots.epochs("Loss", {"train": [2.0, 1.0, 0.5], "validation": [2.1, 1.5, 1.6]}))
    lines = [p.get("points", "").split() for p in root.iter("polyline")]
    assert [len(line) for line in lines] == [3, 3]
    _parsed(plots.epochs("Loss", {"train": [1.0, 1.0], "validation": [1.0, 1.0]}))


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
