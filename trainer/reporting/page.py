"""The report as one self-contained page for people: no script, no link, images inside.

The words and figures are `trainer.reporting.report`'s; this draws them.
"""

import base64
import functools
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from service.inference.preprocess import Pixels
from service.jobs.contract import (
    REPORT_STANDING_MARK,
    REPORT_VERSION_MARK,
    BackbonesRanked,
    EpochEnded,
)
from trainer.data import Data
from trainer.evaluate import Metrics
from trainer.reporting import plots
from trainer.reporting.advice import MOST, VALIDATED, Advice, listed
from trainer.reporting.findings import Adaptation, PartName
from trainer.reporting.label_errors import RECALL_FLOOR
from trainer.reporting.plots import Dot
from trainer.reporting.report import Report

_MOST_SHOWN = {"mistakes": 12, "examples": 6, "suspects": 12, "pairs": 6}
"""On the page, where each costs two milliseconds; the JSON lists more."""
_LEFT_OUT_ROWS = 50
_TABLED_CLASSES, _DRAWN_CLASSES = 12, 100
"""Up to how many classes the confusion matrix is a table, and a heat map; the JSON has more."""
_TABLED_COUNT = 1000
"""Counts from here on need wider columns than a telephone has for twelve classes."""
_NAMED_CLASSES = 4
"""Up to how many classes the columns of the matrix have names; above, numbers."""
_CONFUSED = 15
_BACKBONE_COLUMNS = (
    ("Score", "score", "%.3f"),
    ("LogME", "log_me", "%.3f"),
    ("H-score", "h_score", "%.3f"),
    ("LEEP", "leep", "%.3f"),
    ("ms an image", "image_ms", "%.1f"),
)


@dataclass(frozen=True)
class _Confused:
    """Two classes of which one is taken for the other."""

    true: str
    answered: str
    count: int
    support: int
    """Images of the true class."""


def to_html(report: Report, data: Data) -> str:
    """Returns the page: no script, no link to elsewhere, images inside.

    The service puts the version's number in the place of `REPORT_VERSION_MARK`.
    """
    mistakes = report.mistakes[: _MOST_SHOWN["mistakes"]]
    examples = report.examples[: _MOST_SHOWN["examples"]]
    suspects = report.suspects[: _MOST_SHOWN["suspects"]]
    leaked = report.leaked[: _MOST_SHOWN["pairs"]]
    contradictions = report.contradictions[: _MOST_SHOWN["pairs"]]
    wanted: list[tuple[PartName, int]] = [("validation", s.place) for s in (*mistakes, *examples)]
    wanted += [(s.part, s.place) for s in suspects]
    wanted += [(p.part, p.place) for two in (*leaked, *contradictions) for p in two.images]
    return template().render(
        report=report,
        manifest=report.manifest,
        metrics=report.metrics,
        shown={
            "mistakes": mistakes,
            "examples": examples,
            "suspects": suspects,
            "leaked": leaked,
            "contradictions": contradictions,
            "left_out": _LEFT_OUT_ROWS,
        },
        images=_images(data, wanted),
        plots=_plots(report),
        topics=_topics(report.advice),
        tabled=_is_tabled(report.metrics),
        numbered=len(data.classes) > _NAMED_CLASSES,
        confused=_confused(report.metrics),
        choice=_choice(report.adaptation),
        validated=VALIDATED[report.manifest.validated_on],
        backbone_columns=_backbone_columns(report.backbones),
        floor=RECALL_FLOOR,
        is_void=report.leaked_count > MOST * report.metrics.count,
        # Comments, which a reader does not see: the service replaces them.
        marks={"version": REPORT_VERSION_MARK, "standing": REPORT_STANDING_MARK},
    )


@functools.cache
def template() -> jinja2.Template:
    """The page's template; compiling it is most of what a first report costs."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters["percent"] = lambda part: f"{part * 100:.1f}\u202f%"
    environment.filters["whole"] = lambda part: f"{part * 100:.0f}\u202f%"
    environment.filters["short"] = _short
    environment.filters["first"] = listed
    environment.filters["breakable"] = _breakable
    environment.filters["some"] = lambda rows, key: any(getattr(r, key) is not None for r in rows)
    return environment.get_template("report.html.j2")


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _breakable(name: str) -> Markup:
    """Lets a long name break between its words, rather than within one."""
    parts = re.split(r"(?<=[/\\_\- ])|(?<=[a-z])(?=[A-Z])", name)
    return Markup("<wbr>").join(escape(part) for part in parts if part)


def _is_tabled(metrics: Metrics) -> bool:
    most = max((count for row in metrics.confusion for count in row), default=0)
    count = len(metrics.classes)
    return count <= _NAMED_CLASSES or (count <= _TABLED_CLASSES and most < _TABLED_COUNT)


def _confused(metrics: Metrics) -> list[_Confused]:
    """Returns the pairs of classes that are confused, those with most images first."""
    labels = [c.label for c in metrics.classes]
    pairs = [
        (count, i, j)
        for i, row in enumerate(metrics.confusion)
        for j, count in enumerate(row)
        if count and i != j
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [
        _Confused(labels[i], labels[j], count, metrics.classes[i].support)
        for count, i, j in pairs[:_CONFUSED]
    ]


def _choice(adaptation: Adaptation | None) -> str:
    """Says why what serves was chosen though another's criterion is higher, "" where none is."""
    if adaptation is None or adaptation.margin is None:
        return ""
    scored = [c for c in adaptation.candidates if c.criterion is not None]
    chosen = next((c for c in scored if c.technique == adaptation.chosen), None)
    best = max(scored, key=lambda c: c.criterion or 0.0, default=None)
    if chosen is None or best is None or (best.criterion or 0.0) <= (chosen.criterion or 0.0):
        return ""
    return (
        f'"{_plain(best.technique)}" has the highest criterion, and "{_plain(chosen.technique)}" '
        "was chosen: candidates are tried from simple to refined, and a more refined one is taken "
        f"only where its criterion is higher by more than {adaptation.margin:g}."
    )


def _plain(technique: str) -> str:
    return technique.replace("_", "-")


def _backbone_columns(ranked: BackbonesRanked | None) -> list[tuple[str, str, str]]:
    """Returns title, field and format of the columns in which any backbone has a value."""
    if ranked is None:
        return []
    return [
        column
        for column in _BACKBONE_COLUMNS
        if any(getattr(one, column[1]) is not None for one in ranked.ranking)
    ]


def _images(data: Data, wanted: Iterable[tuple[PartName, int]]) -> dict[tuple[PartName, int], str]:
    """Data URLs by part and place, each image decoded once."""
    unique = list(dict.fromkeys(wanted))
    urls: dict[tuple[PartName, int], str] = {}
    for part, files in (("train", data.train), ("validation", data.validation)):
        keys = [key for key in unique if key[0] == part]
        if keys:
            decoded = files.decode([place for _, place in keys])
            urls.update(zip(keys, map(_data_url, decoded), strict=True))
    return urls


def _data_url(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).reduce(2).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _topics(advice: Sequence[Advice]) -> list[tuple[str, list[Advice]]]:
    titles = {
        "quality": "Is it good enough?",
        "trust": "Can it be trusted?",
        "next": "What next?",
    }
    return [(title, [a for a in advice if a.topic == topic]) for topic, title in titles.items()]


def _plots(report: Report) -> dict[str, Markup | list[Markup] | None]:
    drawn: dict[str, Markup | list[Markup] | None] = {
        "reliability": None,
        "curve": None,
        "dots": None,
        "scores": None,
        "gaps": None,
        "confusion": None,
        "epochs": _epochs(report.epochs),
    }
    if (c := report.calibration) is not None:
        before = c.bins_before if c.temperature != 1 else []
        drawn["reliability"] = plots.reliability(c.bins, before)
    if report.learning_curve is not None and len(report.learning_curve.points) > 1:
        drawn["curve"] = plots.learning_curve(report.learning_curve)
    if any(o.name != "majority_class" for o in report.comparisons):
        m = report.metrics
        served = Dot("this version", m.accuracy, m.accuracy_low, m.accuracy_high, is_served=True)
        others = [
            Dot(o.title, o.accuracy, o.accuracy_low, o.accuracy_high)
            for o in report.comparisons
            # Far below, it would press the others together.
            if o.name != "majority_class"
        ]
        drawn["dots"] = plots.dots([served, *others])
    if (ood := report.out_of_distribution) is not None:
        drawn["scores"] = plots.histogram(ood.bins, ood.threshold)
    if report.adaptation is not None and report.adaptation.gaps:
        drawn["gaps"] = plots.gaps(report.adaptation.gaps)
    names = [c.label for c in report.metrics.classes]
    if not _is_tabled(report.metrics) and len(names) <= _DRAWN_CLASSES:
        drawn["confusion"] = plots.confusion(report.metrics.confusion, names)
    return drawn


def _epochs(epochs: Sequence[EpochEnded]) -> list[Markup]:
    if len(epochs) < 2:
        return []
    return [
        plots.epochs(
            "Loss",
            {
                "train": [e.train_loss for e in epochs],
                "validation": [e.validation_loss for e in epochs],
            },
        ),
        plots.epochs(
            "Accuracy",
            {
                "train": [e.train_accuracy for e in epochs],
                "validation": [e.validation_accuracy for e in epochs],
            },
        ),
    ]
