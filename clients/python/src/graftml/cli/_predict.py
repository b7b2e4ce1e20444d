"""`graft predict` and `graft health`."""

import argparse
from collections.abc import Iterator
from itertools import compress
from typing import Any

from graftml._channel import PROBE_TIMEOUT_S
from graftml.cli import _decision, _names
from graftml.cli._codes import Code
from graftml.cli._commands import in_commands
from graftml.cli._output import Output, complain
from graftml.client import Client
from graftml.errors import DeadlineExceeded
from graftml.types import ModelSpec, Prediction

_AT_ONCE = 64
"""Images answered before the first of them is shown."""


def add(commands: Any) -> None:
    """The commands and their options."""
    predict = commands.add("predict", "Classify images", run)
    predict.add_argument(
        "model", metavar="MODEL", help=f"{_names.HELP}; several are separated by commas"
    )
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC"
    )
    predict.add_argument("--top-k", type=int, default=1, metavar="K", help="classes to show")
    _decision.add(predict)
    predict.add_argument("--features", action="store_true", help="with --json: the features too")
    health = commands.add("health", "Say whether the server serves", run_health)
    health.add_argument("--wait", type=float, metavar="S", help="wait so long for it")


def run(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Classifies the images; 1 when one of them could not be."""
    names = arguments.model.split(",")
    answers = list(_answers(client, names, arguments, output))
    if not output.is_json:
        rows = [
            row
            for path, by_model in answers
            for row in _rows(path, names, by_model, arguments.top_k)
        ]
        columns = ["image", "model", "class", "probability", ""]
        is_shown = [True, len(names) > 1, True, True, any(row[-1] for row in rows)]
        if rows:
            output.table(
                list(compress(columns, is_shown)), [list(compress(row, is_shown)) for row in rows]
            )
    # An image that could not be read has the same error from every model.
    failed = [(path, by_model[0].error) for path, by_model in answers if by_model[0].error]
    for path, error in failed:
        complain(f"{path}: {in_commands(error.message)} [{error.reason}]", Code.REFUSED)
    return Code.REFUSED if failed else Code.OK


def _rows(
    path: str, names: list[str], by_model: tuple[Prediction, ...], top_k: int
) -> Iterator[tuple[str, str, str, str, str]]:
    """The lines of one image; what stands in the line above is left out."""
    for at, (name, prediction) in enumerate(zip(names, by_model, strict=True)):
        for rank, (label, probability) in enumerate(_shown(prediction, top_k)):
            first = path if at == rank == 0 else ""
            above = ("", "") if rank else (name, _mark(prediction))
            yield first, above[0], label, probability, above[1]


def _answers(
    client: Client, names: list[str], arguments: argparse.Namespace, output: Output
) -> Iterator[tuple[str, tuple[Prediction, ...]]]:
    decision = _decision.read(arguments)
    models = []
    for name in names:
        model, which = _names.parse(name)
        models.append(ModelSpec(model, decision=decision, **which))
    for start in range(0, len(arguments.images), _AT_ONCE):
        paths = arguments.images[start : start + _AT_ONCE]
        answers = client.predict_many(
            paths, models, top_k=arguments.top_k, include_features=arguments.features
        )
        for path, by_model in zip(paths, zip(*answers, strict=True), strict=True):
            if output.is_json:
                for prediction in by_model:
                    output.emit(_as_json(path, prediction, with_features=arguments.features))
            yield path, by_model


def _shown(prediction: Prediction, top_k: int) -> list[tuple[str, str]]:
    """The answer first, or that there is none, then the most probable of the others."""
    if prediction.error is not None:
        return []
    answer = prediction.answer
    scores = [score for score in prediction.scores if score != answer]
    cells = [(score.label, f"{score.probability:.1%}") for score in scores]
    if answer is None:
        return [("none", ""), *cells]
    return [(answer.label, f"{answer.probability:.1%}"), *cells][:top_k]


def _mark(prediction: Prediction) -> str:
    """What to know before a probability is taken at its word."""
    marks = [] if prediction.calibrated else ["not calibrated"]
    if prediction.is_out_of_distribution:
        marks.append(f"unlike the training images ({prediction.out_of_distribution_score:.1f})")
    return ", ".join(marks)


def _as_json(path: str, prediction: Prediction, *, with_features: bool) -> dict[str, Any]:
    value: dict[str, Any] = {
        "image": path,
        "model": prediction.model,
        "version": prediction.version,
    }
    if prediction.error is not None:
        return {**value, "error": prediction.error}
    value |= {
        "label": prediction.label,
        "probability": prediction.probability,
        "scores": prediction.scores,
        "out_of_distribution_score": prediction.out_of_distribution_score,
        "is_out_of_distribution": prediction.is_out_of_distribution,
        "calibrated": prediction.calibrated,
    }
    return {**value, "features": prediction.features} if with_features else value


def run_health(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Says whether the server serves, and why not."""
    why: str | None = None
    try:
        if arguments.wait is not None:
            client.wait_ready(arguments.wait)
    except DeadlineExceeded as error:
        why = error.message
    else:
        why = client.why_not_serving(min(arguments.timeout, PROBE_TIMEOUT_S))
    if output.is_json:
        output.emit({"server": arguments.server, "serving": why is None, "why": why or ""})
    elif why is None:
        output.line(f"{arguments.server} serves")
    return Code.OK if why is None else complain(why, Code.NOT_SERVING)
