"""Draws the report as one self-contained page for people: no script, no link, images inside.

The words and figures are `trainer.reporting.report`'s.
"""

import base64
import functools
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from service.contract import (
    REPORT_STANDING_MARK,
    REPORT_VERSION_MARK,
    BackbonesRanked,
    EpochEnded,
)
from service.engine.preprocess import Pixels
from service.ops.escaping import escaped
from trainer.data import Data, Files
from trainer.evaluate import ClassMetrics, Metrics
from trainer.measuring import Measured
from trainer.reporting import plots
from trainer.reporting.advice import Advice, is_mostly_copied, listed, plain
from trainer.reporting.comparisons import UNCORRECTED
from trainer.reporting.findings import Adaptation
from trainer.reporting.label_errors import RECALL_FLOOR
from trainer.reporting.measured_on import NOUNS, how
from trainer.reporting.plots import Dot
from trainer.reporting.report import MAX_MATRIX, PartName, Report

_MOST_SHOWN = {"mistakes": 12, "examples": 6, "suspects": 12, "pairs": 6, "confused": 15}
"""On the page, where an image costs two milliseconds; the JSON lists more."""
_LEFT_OUT_ROWS = 50
_CLASS_ROWS = 200
_TABLED_CLASSES = 12
"""Up to how many classes the confusion matrix is a table; above it is a heat map."""
_TABLED_COUNT = 1000
"""Counts from here on need wider columns than a telephone has for twelve classes."""
_NAMED_CLASSES = 4
"""Up to how many classes the columns of the matrix have names; above, numbers."""
_GAP_NAMES = {
    "proxy_a_distance": "proxy A-distance",
    "mmd": "maximum mean discrepancy",
    "frechet_distance": "Fréchet distance",
}
_BACKBONE_COLUMNS = (
    ("Log loss", "log_loss", "%.3f"),
    ("LogME", "log_me", "%.3f"),
    ("ms an image", "image_ms", "%.1f"),
)


def to_html(report: Report, data: Data, measured: Sequence[Measured]) -> str:
    """Returns the page: no script, no link to elsewhere, images inside.

    Its policy has a browser load and run nothing else. Characters of names that would turn
    the text around or reach a terminal's controls are escaped.

    `measured` are the sets that the report was made of. The service puts the version's
    number in the place of `REPORT_VERSION_MARK`.
    """
    mistakes = report.mistakes[: _MOST_SHOWN["mistakes"]]
    examples = report.examples[: _MOST_SHOWN["examples"]]
    suspects = report.suspects[: _MOST_SHOWN["suspects"]]
    contradictions = report.contradictions[: _MOST_SHOWN["pairs"]]
    basis = report.basis
    wanted: list[tuple[str, int]] = [(s.measured_on, s.place) for s in suspects]
    if basis is not None:
        wanted += [(basis.measured_on, s.place) for s in (*mistakes, *examples)]
    wanted += [(f"all/{p.part}", p.place) for two in contradictions for p in two.images]
    parts: dict[str, Files] = {m.measured_on: m.part for m in measured}
    # Places among all images of a part, be they measured on or not.
    parts |= {f"all/{name}": getattr(data, name) for name in get_args(PartName)}
    drawn = template().render(
        report=report,
        manifest=report.manifest,
        metrics=report.metrics,
        basis=basis,
        shown={
            "mistakes": mistakes,
            "examples": examples,
            "suspects": suspects,
            "contradictions": contradictions,
            "confused": report.confused[: _MOST_SHOWN["confused"]],
            "classes": _class_rows(report),
            "left_out": _LEFT_OUT_ROWS,
        },
        images=_images(parts, wanted),
        plots=_plots(report),
        topics=_topics(report.advice),
        tabled=report.metrics is not None and _is_tabled(report.metrics),
        numbered=len(data.classes) > _NAMED_CLASSES,
        choice=_choice(report.adaptation),
        nouns=NOUNS,
        how=how,
        gap_names=_GAP_NAMES,
        uncorrected=UNCORRECTED,
        backbone_columns=_backbone_columns(report.backbones),
        floor=RECALL_FLOOR,
        is_copied=is_mostly_copied(report.grouped),
        # Comments, which a reader does not see: the service replaces them.
        marks={"version": REPORT_VERSION_MARK, "standing": REPORT_STANDING_MARK},
    )
    # Here rather than for each name: none can be forgotten.
    return escaped(drawn, keep="\n")


@functools.cache
def template() -> jinja2.Template:
    """Compiles the page's template, which is most of what a first report costs."""
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


def _class_rows(report: Report) -> list[tuple[int, ClassMetrics, int]]:
    """Returns number, figures and training images of each class, or of the least recognised."""
    if report.metrics is None:
        return []
    rows = [
        (i + 1, one, counts.train)
        for i, (one, counts) in enumerate(zip(report.metrics.classes, report.data, strict=True))
    ]
    if len(rows) <= _CLASS_ROWS:
        return rows
    return sorted(rows, key=lambda row: 1.0 if row[1].recall is None else row[1].recall)[
        :_CLASS_ROWS
    ]


def _choice(adaptation: Adaptation | None) -> str:
    """Says why what serves was chosen though another's criterion is higher, "" where none is."""
    if adaptation is None:
        return ""
    chosen = next((c for c in adaptation.candidates if c.technique == adaptation.chosen), None)
    best = max(adaptation.candidates, key=lambda c: c.criterion, default=None)
    # Where adapting is in doubt, the words say what decided.
    if chosen is None or best is None or adaptation.doubt or best.criterion <= chosen.criterion:
        return ""
    return (
        f'"{plain(best.technique)}" has the highest criterion, and "{plain(chosen.technique)}" '
        "was chosen: candidates are tried from simple to refined, and a more refined one is taken "
        f"only where its criterion is higher by more than {adaptation.margin:g}."
    )


def _backbone_columns(ranked: BackbonesRanked | None) -> list[tuple[str, str, str]]:
    """Returns title, field and format of the columns in which any backbone has a value."""
    if ranked is None:
        return []
    return [
        column
        for column in _BACKBONE_COLUMNS
        if any(getattr(one, column[1]) is not None for one in ranked.ranking)
    ]


def _images(
    parts: Mapping[str, Files], wanted: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], str]:
    """Data URLs by part and place, each image decoded once."""
    unique = list(dict.fromkeys(wanted))
    urls: dict[tuple[str, int], str] = {}
    for part, files in parts.items():
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
        "dots": None,
        "scores": None,
        "confusion": None,
        "epochs": _epochs(report.epochs),
    }
    if (c := report.calibration) is not None:
        before = c.bins_before if c.temperature != 1 else []
        drawn["reliability"] = plots.reliability(c.bins, before)
    # Far below, always answering the commonest class would press the others together.
    others = [o for o in report.comparisons if o.name != "majority_class"]
    if others and (m := report.metrics) is not None:
        served = Dot("this version", m.accuracy, m.accuracy_low, m.accuracy_high, is_served=True)
        drawn["dots"] = plots.dots(
            [served, *(Dot(o.title, o.accuracy, o.accuracy_low, o.accuracy_high) for o in others)]
        )
    if (ood := report.out_of_distribution) is not None:
        drawn["scores"] = plots.histogram(ood.bins, ood.threshold)
    if (m := report.metrics) is not None and not _is_tabled(m) and len(m.classes) <= MAX_MATRIX:
        drawn["confusion"] = plots.confusion(m.confusion, [c.label for c in m.classes])
    return drawn


def _epochs(epochs: Sequence[EpochEnded]) -> list[Markup]:
    if len(epochs) < 2:
        return []
    losses: dict[str, list[float | None]] = {
        "train": [e.train_loss for e in epochs],
        "held out": [e.validation_loss for e in epochs],
    }
    accuracies: dict[str, list[float | None]] = {
        "train": [e.train_accuracy for e in epochs],
        "held out": [e.validation_accuracy for e in epochs],
    }
    return [plots.epochs("Loss", losses), plots.epochs("Accuracy", accuracies)]
