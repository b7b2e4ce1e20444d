"""The report of a job: JSON for programs, one self-contained page for people."""

import base64
import io
from collections.abc import Sequence

import jinja2
import msgspec
import numpy as np
from PIL import Image

from service.domain import ClassCount, Manifest, RejectedFile
from service.inference.head import Floats
from service.inference.preprocess import Pixels
from service.jobs.contract import EpochEnded
from trainer import evaluate
from trainer.data import Data
from trainer.evaluate import Metrics

_THUMBNAIL = 112
_MISTAKES = 24
_EXAMPLES = 12
_MAX_REJECTED = 100
_CHART = (520.0, 180.0)
_CONFUSION_CLASSES = 40
"""More do not fit a page; the JSON holds them."""


class Shown(msgspec.Struct, frozen=True):
    """A validation picture and its answer."""

    file: str
    true: str
    answered: str
    probability: float
    place: int
    """Among the validation pictures, from 0."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`report.json`."""

    format: int = 1
    manifest: Manifest
    metrics: Metrics
    epochs: list[EpochEnded]
    data: list[ClassCount]
    rejected: list[RejectedFile]
    warnings: list[str]
    mistakes: list[Shown]
    """The most confident wrong answers, at most 24."""
    examples: list[Shown]
    """Some right answers, spread over the classes."""


def collect(
    manifest: Manifest,
    metrics: Metrics,
    data: Data,
    probabilities: Floats,
    epochs: Sequence[EpochEnded],
) -> Report:
    """Puts the findings together; `probabilities` are those of the validation pictures."""
    wrong = evaluate.worst_mistakes(probabilities, data.validation.targets, _MISTAKES)
    return Report(
        manifest=manifest,
        metrics=metrics,
        epochs=list(epochs),
        data=data.counts(),
        rejected=list(data.rejected[:_MAX_REJECTED]),
        warnings=list(data.warnings),
        mistakes=[_shown(data, m.place, probabilities) for m in wrong],
        examples=[_shown(data, place, probabilities) for place in _right(data, probabilities)],
    )


def to_html(report: Report, data: Data) -> str:
    """The page: no script, no link to elsewhere, pictures inside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {
        shown.place: _data_url(data.validation.pixels[shown.place])
        for shown in (*report.mistakes, *report.examples)
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        manifest=report.manifest,
        metrics=report.metrics,
        pictures=pictures,
        charts=_charts(report.epochs),
        chart_size=_CHART,
        confusion=report.metrics.confusion if len(data.classes) <= _CONFUSION_CLASSES else None,
        hyperparameters=report.manifest.hyperparameters,
    )


def _shown(data: Data, place: int, probabilities: Floats) -> Shown:
    answered = int(probabilities[place].argmax())
    return Shown(
        file=str(data.validation.paths[place].relative_to(data.root)),
        true=data.classes[int(data.validation.targets[place])],
        answered=data.classes[answered],
        probability=float(probabilities[place, answered]),
        place=place,
    )


def _right(data: Data, probabilities: Floats) -> list[int]:
    right = np.flatnonzero(probabilities.argmax(axis=1) == data.validation.targets)
    # One of each class in turn, so that a small page shows many classes.
    turn: dict[int, int] = {}
    keyed = []
    for place in right.tolist():
        label = int(data.validation.targets[place])
        turn[label] = turn.get(label, 0) + 1
        keyed.append((turn[label], label, place))
    return [place for _, _, place in sorted(keyed)[:_EXAMPLES]]


def _data_url(pixels: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).resize((_THUMBNAIL, _THUMBNAIL)).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class _Line(msgspec.Struct):
    name: str
    points: str
    last: float


class _Chart(msgspec.Struct):
    title: str
    low: float
    high: float
    lines: list[_Line]


def _charts(epochs: Sequence[EpochEnded]) -> list[_Chart]:
    if len(epochs) < 2:
        return []
    return [
        _chart(
            "Loss",
            {
                "train": [e.train_loss for e in epochs],
                "validation": [e.validation_loss for e in epochs],
            },
        ),
        _chart(
            "Accuracy",
            {
                "train": [e.train_accuracy for e in epochs],
                "validation": [e.validation_accuracy for e in epochs],
            },
        ),
    ]


def _chart(title: str, series: dict[str, list[float]]) -> _Chart:
    values = [value for line in series.values() for value in line]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    width, height = _CHART
    lines = []
    for name, line in series.items():
        points = " ".join(
            f"{width * i / (len(line) - 1):.1f},{height * (1 - (value - low) / span):.1f}"
            for i, value in enumerate(line)
        )
        lines.append(_Line(name, points, line[-1]))
    return _Chart(title, low, high, lines)
