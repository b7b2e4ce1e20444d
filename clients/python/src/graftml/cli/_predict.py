"""`graft predict`: images in, one answer each out, as columns, CSV or JSON lines."""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar

from graftml import Client
from graftml.cli import _decision, _names
from graftml.cli._image_files import ImageFiles
from graftml.cli._output import Code, Output, Usage
from graftml.cli._predicting import Answer, answers
from graftml.cli._summary import Summary
from graftml.types import ModelSpec, Prediction

T = TypeVar("T")

_A_HANDFUL = 5
"""Images that need no summary."""
_EPILOG = """\
In a folder all images at any depth are classified, in the order of their names; hidden files and
files without an image's suffix are skipped. The exit code is 1 if an image could not be read.

  graft predict pets photos/ --csv > answers.csv
  find photos -newer last -name '*.jpg' | graft predict pets --files-from - --json
  camera | graft predict pets -"""


def add(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add(
        "predict",
        "Classify images",
        run,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"{_names.HELP}; several are separated by commas"
    )
    parser.add_argument(
        "images",
        nargs="*",
        metavar="PATH",
        help="an image (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC), a folder, or - for one "
        "image on standard input",
    )
    parser.add_argument(
        "--files-from",
        metavar="FILE",
        help="file with paths of images and folders, one per line; - for standard input",
    )
    parser.add_argument("--csv", action="store_true", help="write CSV to standard output")
    parser.add_argument(
        "--top-k", type=int, default=1, metavar="K", help="number of classes to show"
    )
    _decision.add(parser)
    parser.add_argument("--features", action="store_true", help="with --json: include the features")


def run(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Classifies the images; 1 when one of them could not be."""
    if arguments.csv and output.is_json:
        raise Usage("--csv and --json are two forms of the same: give one")
    if Path(arguments.model).is_file() and not all(map(os.path.exists, arguments.images)):
        raise Usage(f"{arguments.model} is a file: write the model before the images")
    names, decision = arguments.model.split(","), _decision.read(arguments)
    models = []
    for name in names:
        model, which = _names.parse(name)
        models.append(ModelSpec(model, decision=decision, **which))
    files, summary = ImageFiles(), Summary()
    found = answers(
        client,
        models,
        files.of(arguments.images, arguments.files_from),
        top_k=arguments.top_k,
        include_features=arguments.features,
    )
    with _counted(_noted(found, names, summary, output), output) as noted:
        if output.is_json:
            for path, by_model in noted:
                for prediction in by_model:
                    output.emit(_as_json(path, prediction, with_features=arguments.features))
        elif arguments.csv:
            _write_csv(noted, arguments.top_k)
        else:
            _show(noted, names, arguments.top_k, output)
    if files.other_files:
        were = "file was" if files.other_files == 1 else "files were"
        output.note(f"{files.other_files} {were} passed over, having no image's suffix")
    if not summary.images:
        raise Usage("no images were found")
    if summary.images > _A_HANDFUL and not output.is_quiet:
        summary.show(output, is_beside=arguments.csv)
    return Code.REFUSED if summary.failed else Code.OK


def _noted(
    found: Iterable[Answer], names: list[str], summary: Summary, output: Output
) -> Iterator[Answer]:
    """Counts the answers, and complains of each image that has none."""
    for path, by_model in found:
        summary.add(names, by_model)
        # An image that could not be read has the same error from every model.
        if by_model[0].error is not None:
            output.complain(by_model[0].error, Code.REFUSED, path)
        yield path, by_model


@contextmanager
def _counted(items: Iterator[T], output: Output) -> Iterator[Iterator[T]]:
    """Shows how many there were so far, where a terminal would show nothing else."""
    if output.is_json or output.is_quiet or sys.stdout.isatty() or not sys.stderr.isatty():
        yield items
        return
    from rich.console import Console  # noqa: PLC0415 - only where people read
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def counting(live: Live) -> Iterator[T]:
        for count, item in enumerate(items, 1):
            live.update(Text(f"{count} images"))
            yield item

    with Live(console=Console(stderr=True), redirect_stdout=False, transient=True) as live:
        yield counting(live)


def _show(found: Iterable[Answer], names: list[str], top_k: int, output: Output) -> None:
    columns, is_shown = ["image", "model", "class", "probability", ""], [True] * 5
    is_shown[1] = len(names) > 1
    rows = (
        list(compress(row, is_shown))
        for path, by_model in found
        for row in _rows(path, names, by_model, top_k)
    )
    output.table(list(compress(columns, is_shown)), rows)


def _rows(
    path: str, names: list[str], by_model: tuple[Prediction, ...], top_k: int
) -> Iterator[tuple[str, str, str, str, str]]:
    """The lines of one image; what stands in the line above is left out."""
    for at, (name, prediction) in enumerate(zip(names, by_model, strict=True)):
        for rank, (label, probability) in enumerate(_shown(prediction, top_k)):
            first = path if at == rank == 0 else ""
            above = ("", "") if rank else (name, _mark(prediction))
            yield first, above[0], label, probability, above[1]


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


def _write_csv(found: Iterable[Answer], top_k: int) -> None:
    """Writes a row for each image and model; the columns depend on `top_k` alone."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # RFC 4180 has its own line ends.
        sys.stdout.reconfigure(newline="")
    writer = csv.writer(sys.stdout)
    others = [f"{what}_{rank}" for rank in range(2, top_k + 1) for what in ("label", "probability")]
    notes = ["outlier_score", "is_outlier", "calibrated", "model", "version", "error"]
    writer.writerow(["file", "label", "probability", *others, *notes])
    for path, by_model in found:
        for prediction in by_model:
            writer.writerow([path, *_csv_cells(prediction, top_k)])


def _csv_cells(prediction: Prediction, top_k: int) -> list[object]:
    error = prediction.error
    if error is not None:
        why = f"{error.message} [{error.reason}]"
        return [*[""] * (2 * top_k + 3), prediction.model, "", why]
    answer = prediction.answer
    others = [score for score in prediction.scores if score != answer][: top_k - 1]
    cells: list[object] = []
    for score in (answer, *others):
        cells += ["", ""] if score is None else [score.label, f"{score.probability:.6f}"]
    cells += [""] * (2 * top_k - len(cells))
    outlier = prediction.out_of_distribution_score
    return [
        *cells,
        "" if outlier is None else f"{outlier:.4f}",
        str(prediction.is_out_of_distribution).lower(),
        str(prediction.calibrated).lower(),
        prediction.model,
        prediction.version,
        "",
    ]


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
