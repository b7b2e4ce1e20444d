"""`python -m trainer`: `run` and `rank` for the service, `train` and `rank-folder` for people.

The exit codes are `service.jobs.contract.ExitCode`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from service.errors import GraftError, Reason
from service.jobs.contract import (
    BACKBONE_FILE,
    BACKBONES,
    DEFAULT_BACKBONE,
    HEAD_FILE,
    BackbonesRanked,
    Candidate,
    DataFound,
    EpochEnded,
    ExitCode,
    Failed,
    FeatureBased,
    Finished,
    JobSpec,
    Method,
    ModelBased,
    Note,
    Progressed,
    RankSpec,
    Record,
    encode,
)
from trainer.records import Records, Send, read_order

MODEL_FILE = "model.onnx"


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    # Found by libraries that draw lots; set before any of them is imported.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if parsed.command == "run":
        records = Records()
        records.keep_alive()
        return _run(parsed.spec, records)
    if parsed.command == "wait":
        return _wait()
    if parsed.command == "rank":
        records = Records()
        records.keep_alive()
        # Whoever asks for answers goes before this.
        os.setpriority(os.PRIO_PROCESS, 0, 10)
        return _run_ranking(parsed.spec, records)
    if parsed.command == "rank-folder":
        return _rank_folder(parsed)
    return _train_folder(parsed)


def _run(spec_file: Path, records: Records) -> int:
    spec = msgspec.json.decode(spec_file.read_bytes(), type=JobSpec)
    return _train(spec, records.send)


def _wait() -> int:
    """Imports everything, then does what it is told on standard input."""
    # Whoever asks for answers goes before this.
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    records = Records()
    from trainer import warm

    warm.prepare()
    order = read_order()
    records.print_to(Path(order.log))
    records.keep_alive()
    go_on = _run_ranking if order.command == "rank" else _run
    return go_on(Path(order.spec), records)


def _run_ranking(spec_file: Path, records: Records) -> int:
    return _rank(msgspec.json.decode(spec_file.read_bytes(), type=RankSpec), records.send)


def _train(spec: JobSpec, send: Send) -> int:
    # Imported late: --help and a bad spec need none of it.
    from trainer import train

    try:
        train.run(spec, send)
    except GraftError as error:
        send(Failed(error.reason, error.message))
        return ExitCode.FAILED
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        send(
            Failed(
                Reason.OUT_OF_MEMORY,
                "training ran out of memory: ask for a smaller batch size or a smaller backbone",
            )
        )
        return ExitCode.FAILED
    return ExitCode.OK


def _rank(spec: RankSpec, send: Send) -> int:
    from trainer import ranking

    try:
        send(ranking.rank(spec, send))
    except GraftError as error:
        send(Failed(error.reason, error.message))
        return ExitCode.FAILED
    return ExitCode.OK


def _rank_folder(parsed: argparse.Namespace) -> int:
    if not parsed.folder.is_dir():
        print(f"trainer: {parsed.folder} is no folder", file=sys.stderr)
        return 2
    named = [name.partition(":") for name in parsed.backbone]
    spec = RankSpec(
        data_dir=str(parsed.folder),
        candidates=[
            Candidate(backbone=backbone, weights=weights)
            for backbone, _, weights in named or [(name, "", "") for name in BACKBONES]
        ],
        only_at_hand=not named,
        weights_dir=str(parsed.weights_dir),
        time_budget_s=parsed.time_budget,
        seed=parsed.seed,
        threads=parsed.threads,
    )

    def show(record: Record) -> None:
        if isinstance(record, BackbonesRanked):
            print(_table(record), flush=True)
        elif text := _for_people(record):
            print(text, file=sys.stderr, flush=True)

    return _rank(spec, show)


def _table(ranked: BackbonesRanked) -> str:
    lines = [["backbone", "weights", "LogME", "H-score", "LEEP", "ms a picture", "features"]]
    for row in ranked.ranking:
        figures = (row.log_me, row.h_score, row.leep)
        lines.append(
            [
                row.backbone,
                row.weights,
                *("-" if value is None else f"{value:.3f}" for value in figures),
                "-" if row.picture_ms is None else f"{row.picture_ms:.3g}",
                str(row.feature_dim or "-"),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
             for line in lines]  # fmt: skip
    problems = [f"{row.backbone}: {row.problem}" for row in ranked.ranking if row.problem]
    return "\n".join([*table, ranked.explanation, *problems])


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def _train_folder(parsed: argparse.Namespace) -> int:
    def show(record: Record) -> None:
        if parsed.json:
            print(encode(record).decode(), flush=True)
        elif text := _for_people(record):
            print(text, file=sys.stderr, flush=True)

    out: Path = parsed.out
    if out.exists() and any(out.iterdir()):
        print(f"trainer: {out} is not empty: name another folder", file=sys.stderr)
        return 2
    if not parsed.folder.is_dir():
        print(f"trainer: {parsed.folder} is no folder", file=sys.stderr)
        return 2
    code = _train(_spec(parsed), show)
    if code == ExitCode.OK:
        _compose(out)
        print(f"wrote {out / MODEL_FILE} and {out / 'report.html'}", file=sys.stderr)
    return code


def _spec(parsed: argparse.Namespace) -> JobSpec:
    method: Method
    if parsed.method == "feature-based":
        method = FeatureBased(l2=parsed.l2)
    else:
        method = ModelBased(
            recipe=parsed.recipe,
            epochs=parsed.epochs,
            batch_size=parsed.batch_size,
            learning_rate=parsed.learning_rate,
            weight_decay=parsed.weight_decay,
            label_smoothing=parsed.label_smoothing,
            train_from_stage=parsed.train_from_stage,
            early_stopping_patience=parsed.early_stopping_patience,
            precision=parsed.precision,
        )
    return JobSpec(
        job_id="local",
        model=parsed.folder.resolve().name,
        data_dir=str(parsed.folder),
        out_dir=str(parsed.out),
        method=method,
        backbone=parsed.backbone,
        weights=parsed.weights,
        weights_dir=str(parsed.weights_dir),
        validation_fraction=parsed.validation_fraction,
        seed=parsed.seed,
        time_budget_s=parsed.time_budget,
        device=parsed.device,
        threads=parsed.threads,
    )


def _compose(out: Path) -> None:
    from service.inference import export, head

    backbone = (out / BACKBONE_FILE).read_bytes()
    (out / MODEL_FILE).write_bytes(export.compose(backbone, head.load(out / HEAD_FILE), {}))


def _for_people(record: Record) -> str:  # noqa: PLR0911 - one for each kind
    match record:
        case DataFound():
            counts = ", ".join(f"{c.label} {c.train}+{c.validation}" for c in record.classes)
            rejected = "".join(f"\n  left out {f.path}: {f.detail}" for f in record.rejected)
            return f"pictures (train+validation): {counts}{rejected}"
        case EpochEnded():
            return (
                f"epoch {record.epoch}/{record.epochs}  train loss {record.train_loss:.4f} "
                f"accuracy {record.train_accuracy:.4f}  validation loss "
                f"{record.validation_loss:.4f} accuracy {record.validation_accuracy:.4f}  "
                f"{record.images_per_second:.1f} pictures/s  ETA {record.eta_s:.0f} s"
            )
        case Note():
            return f"{record.level}: {record.text}"
        case Failed():
            return f"failed ({record.reason}): {record.message}"
        case Finished():
            return (
                f"validation accuracy {record.validation_accuracy:.4f} on "
                f"{record.validation_count} pictures"
            )
        case Progressed() if record.fraction == 0:
            return f"{record.stage} {record.detail}".rstrip()
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Fine-tunes an image classifier and exports it to ONNX.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one job for the service")
    run.add_argument("spec", type=Path, help="JSON file with a JobSpec")
    rank = commands.add_parser("rank", help="run one ranking for the service")
    rank.add_argument("spec", type=Path, help="JSON file with a RankSpec")
    _add_rank_folder(commands)
    commands.add_parser("wait", help="run the job that a line on standard input names")
    train = commands.add_parser(
        "train",
        help="train on a folder, without the service",
        description="Trains on a folder with a folder of pictures per class, or with train/ and "
        "val/ with a folder per class in each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("folder", type=Path)
    train.add_argument("--out", type=Path, required=True, help="new or empty folder for the result")
    train.add_argument(
        "--method", choices=("feature-based", "model-based"), default="feature-based"
    )
    train.add_argument("--backbone", choices=BACKBONES, default=DEFAULT_BACKBONE)
    train.add_argument("--weights", default="", help="torchvision weights name, or 'random'")
    train.add_argument("--weights-dir", type=Path, default=_default_weights_dir())
    train.add_argument("--validation-fraction", type=float, default=0.2)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    train.add_argument("--threads", type=int, default=0, help="0 means one a core")
    train.add_argument("--time-budget", type=float, metavar="SECONDS")
    train.add_argument("--json", action="store_true", help="records as JSON lines on stdout")
    train.add_argument("--l2", type=float, help="feature-based: penalty; else cross-validated")
    model = train.add_argument_group("model-based", "what is not given is the recipe's choice")
    model.add_argument("--recipe", choices=("auto", "classic"), default="auto")
    model.add_argument("--epochs", type=int)
    model.add_argument("--batch-size", type=int)
    model.add_argument("--learning-rate", type=float)
    model.add_argument("--weight-decay", type=float)
    model.add_argument("--label-smoothing", type=float)
    model.add_argument("--train-from-stage", default="", metavar="STAGE")
    model.add_argument("--early-stopping-patience", type=int)
    model.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    return parser


def _default_weights_dir() -> Path:
    return Path(tempfile.gettempdir()) / "graft-weights"


def _add_rank_folder(commands: Any) -> None:
    rank = commands.add_parser(
        "rank-folder",
        help="say which backbone to start from, without the service",
        description="Scores backbones on the training pictures of a folder as `train` takes it, "
        "by LogME; trains none. Takes those whose weights are here where none is named.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rank.add_argument("folder", type=Path)
    rank.add_argument(
        "--backbone",
        action="append",
        default=[],
        metavar="NAME[:WEIGHTS]",
        help=f"one of {', '.join(BACKBONES)}; more than once for several",
    )
    rank.add_argument("--weights-dir", type=Path, default=_default_weights_dir())
    rank.add_argument("--time-budget", type=float, default=60.0, metavar="SECONDS")
    rank.add_argument("--seed", type=int, default=0)
    rank.add_argument("--threads", type=int, default=0, help="0 means one a core")


if __name__ == "__main__":
    sys.exit(main())
