"""`python -m trainer`: `run SPEC` for the service, `train FOLDER` for people.

The exit codes are `service.jobs.contract.ExitCode`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from service.errors import GraftError, Reason
from service.jobs.contract import (
    BACKBONE_FILE,
    BACKBONES,
    DEFAULT_BACKBONE,
    HEAD_FILE,
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
    Record,
    encode,
)
from trainer.records import Records, Send

MODEL_FILE = "model.onnx"


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    # Found by libraries that draw lots; set before any of them is imported.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if parsed.command == "run":
        records = Records()
        records.keep_alive()
        spec = msgspec.json.decode(parsed.spec.read_bytes(), type=JobSpec)
        return _train(spec, records.send)
    return _train_folder(parsed)


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
    default_weights = Path(tempfile.gettempdir()) / "graft-weights"
    train.add_argument("--weights-dir", type=Path, default=default_weights)
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


if __name__ == "__main__":
    sys.exit(main())
