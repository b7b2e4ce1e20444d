"""`graft rank`: which backbone to start from."""

import argparse
from typing import Any

from graftml import Client
from graftml.cli import _names
from graftml.cli._output import Output
from graftml.cli._watching import Watching
from graftml.types import BackboneRanking, RankedBackbone

_COLUMNS = ["backbone", "weights", "log loss", "LogME", "ms an image", "features", "licence"]


def add(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add(
        "rank", "Rank backbones by how well they fit the data, without training", run
    )
    parser.add_argument("data", metavar="DATA", help="images, in the same forms as for finetune")
    parser.add_argument(
        "--backbone",
        action="append",
        default=[],
        metavar="NAME[:WEIGHTS]",
        help="a backbone; repeatable; default: all that the server has, without timm's",
    )
    parser.add_argument(
        "--time-budget", dest="time_budget_s", type=float, metavar="S", help="seconds; default: 60"
    )
    parser.add_argument("--seed", type=int, help="seed of everything random")
    parser.add_argument(
        "--case-sensitive-labels",
        action="store_true",
        help="treat class names that differ only in case as different classes",
    )


def run(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Ranks backbones."""
    with _names.folders_here(arguments.data), Watching(output) as watching:
        ranking = client.rank_backbones(
            _names.labelled(arguments.data),
            backbones=arguments.backbone,
            time_budget_s=arguments.time_budget_s,
            seed=arguments.seed,
            case_sensitive_labels=arguments.case_sensitive_labels,
            on_upload=watching.uploaded,
        )
    if output.is_json:
        output.emit(ranking)
    else:
        show(ranking, output)
    return 0


def show(ranking: BackboneRanking, output: Output) -> None:
    """Shows a ranking to people."""
    output.table(_COLUMNS, map(_row, ranking.backbones), is_prose=True)
    output.line(ranking.explanation)
    for backbone in ranking.backbones:
        if backbone.problem:
            output.line(f"- {backbone.backbone}: {backbone.problem}")


def _row(ranked: RankedBackbone) -> list[object]:
    return [
        ranked.backbone,
        ranked.weights or None,
        *(None if score is None else f"{score:.3f}"
          for score in (ranked.log_loss, ranked.log_me)),
        None if ranked.image_ms is None else f"{ranked.image_ms:.3g}",
        ranked.feature_dim or None,
        ranked.weights_licence or None,
    ]  # fmt: skip
