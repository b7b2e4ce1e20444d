"""The report as one self-contained page for people: no script, no link, images inside.

The words and figures are `trainer.reporting.report`'s; this draws them.
"""

import base64
import functools
import io
from collections.abc import Iterable, Sequence

import jinja2
from markupsafe import Markup
from PIL import Image

from service.inference.preprocess import Pixels
from service.jobs.contract import EpochEnded
from trainer.data import Data
from trainer.reporting import plots
from trainer.reporting.advice import Advice
from trainer.reporting.findings import PartName
from trainer.reporting.plots import Dot
from trainer.reporting.report import Report

_MOST_SHOWN = {"mistakes": 12, "examples": 6, "suspects": 12, "pairs": 6}
"""On the page, where each costs two milliseconds; the JSON lists more."""
_TABLED_CLASSES, _DRAWN_CLASSES = 12, 100
"""Up to how many classes the confusion matrix is a table, and a heat map; the JSON has more."""


def to_html(report: Report, data: Data) -> str:
    """The page: no script, no link to elsewhere, images inside."""
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
        },
        images=_images(data, wanted),
        plots=_plots(report),
        topics=_topics(report.advice),
        tabled=len(data.classes) <= _TABLED_CLASSES,
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
    return environment.get_template("report.html.j2")


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
    if _TABLED_CLASSES < len(names) <= _DRAWN_CLASSES:
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
