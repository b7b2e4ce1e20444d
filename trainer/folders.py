"""The trainer's commands for people: on folders, without the service.

What they do is `__main__`'s; here is what they understand and how they tell it.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import backbones as registry
from service.backbones import BACKBONES, TIMM
from service.contract import (
    BACKBONE_FILE,
    BASELINES,
    DEFAULT_BACKBONE,
    FROZEN_TECHNIQUES,
    HEAD_FILE,
    MANIFEST_FILE,
    NETWORK_TECHNIQUES,
    Augmentation,
    Auto,
    BackbonesRanked,
    DataFound,
    DomainAdaptation,
    EpochEnded,
    ExitCode,
    Failed,
    FeatureBased,
    Finished,
    Grouping,
    ImageSource,
    JobSpec,
    Method,
    ModelBased,
    Note,
    PretrainedBackbone,
    Progressed,
    RankSpec,
    Record,
    decode_manifest,
    encode,
)
from service.domain import WHITE, Decision, check_colour
from service.errors import InvalidInput
from trainer.records import Send

MODEL_FILE = "model.onnx"
_NAMES = f"one of {', '.join(BACKBONES)}, or {TIMM}NAME"


def add(commands: Any) -> None:
    """Adds `train` and `rank-folder`."""
    _add_train(commands)
    _add_rank_folder(commands)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train on a folder, without the service",
        description="Trains on a folder with a folder of images per class, or with train/, val/ "
        "and test/ (two of them at least) with a folder per class in each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("folder", type=Path)
    train.add_argument("--out", type=Path, required=True, help="new or empty folder for the result")
    train.add_argument(
        "--method",
        choices=("auto", "feature-based", "model-based", "domain-adaptation"),
        default="auto",
        help="auto trains the network only where the cross-validated loss says that it pays",
    )
    train.add_argument(
        "--backbone",
        type=_backbone,
        default=DEFAULT_BACKBONE,
        help=f"{_NAMES}; auto takes what rank-folder puts first",
    )
    train.add_argument(
        "--weights",
        default="",
        help="weights of the backbone's by name, 'random', or file:NAME of the folder of weights",
    )
    train.add_argument("--weights-dir", type=Path, default=_default_weights_dir())
    train.add_argument(
        "--background",
        type=_colour,
        default=WHITE,
        metavar="#RRGGBB",
        help="what transparent parts of images are laid on",
    )
    train.add_argument(
        "--framing",
        choices=("auto", "crop", "whole", "compare"),
        default="auto",
        help="what is seen of an image: its middle, all of it squeezed, or the better of the two; "
        "auto compares where images are long",
    )
    train.add_argument(
        "--validation-fraction",
        type=float,
        default=0.2,
        help="held out where a network is trained and no images are in val/",
    )
    groups = train.add_mutually_exclusive_group()
    groups.add_argument(
        "--group-by-folder",
        type=int,
        default=0,
        metavar="LEVEL",
        help="images in the same folder so many levels below their class belong together",
    )
    groups.add_argument(
        "--group-pattern",
        default="",
        metavar="PATTERN",
        help="so do those whose file names agree in {group}, as in {group}_*",
    )
    decision = train.add_mutually_exclusive_group()
    decision.add_argument(
        "--decision",
        choices=("argmax", "balanced"),
        default="argmax",
        help="what is answered: the most probable class, or by the classes' shares, so that every "
        "class counts the same",
    )
    decision.add_argument(
        "--threshold",
        action="append",
        default=[],
        type=_threshold,
        metavar="[CLASS=]P",
        help="the most probable class of those that reach theirs, or none: the least probability "
        "of a class, or of all others; more than once for several",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    train.add_argument(
        "--threads", type=int, default=0, help="0 means one for each core that the process may use"
    )
    train.add_argument("--time-budget", type=float, metavar="SECONDS")
    train.add_argument("--json", action="store_true", help="records as JSON lines on stdout")
    train.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=[name.replace("_", "-") for name in BASELINES],
        help="to be compared with in the report; more than once for several",
    )
    train.add_argument("--l2", type=float, help="feature-based: penalty; else cross-validated")
    train.add_argument(
        "--augmented-views", type=int, default=0, help="feature-based: cropped copies of an image"
    )
    varied = train.add_argument_group(
        "augmentation", "how images are varied in training; else the method's own choice"
    )
    varied.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="left to right; --no-mirror where left and right are different classes",
    )
    varied.add_argument(
        "--min-scale",
        type=_within(0.05, 1),
        help="part of the image's area that a random crop has at least, 0.05 to 1",
    )
    varied.add_argument(
        "--rotation",
        type=_within(0, 180),
        dest="rotation_degrees",
        metavar="DEGREES",
        help="at most, to either side, 0 to 180",
    )
    varied.add_argument(
        "--colour",
        type=_within(0, 1),
        help="part that brightness, contrast and saturation change by at most, 0 to 1",
    )
    varied.add_argument(
        "--trivial-augment",
        action=argparse.BooleanOptionalAction,
        help="one of 14 operations in a random strength",
    )
    adapt = train.add_argument_group("domain-adaptation")
    adapt.add_argument("--target", type=Path, help="folder of unlabelled images")
    adapt.add_argument(
        "--technique",
        choices=["auto", *(t.replace("_", "-") for t in FROZEN_TECHNIQUES + NETWORK_TECHNIQUES)],
        default="auto",
    )
    adapt.add_argument("--always-adapt", action="store_true")
    adapt.add_argument(
        "--evaluate-on-target", action="store_true", help="the target has a folder per class"
    )
    model = train.add_argument_group("model-based", "what is not given is the recipe's choice")
    model.add_argument("--recipe", choices=("auto", "classic"), default="auto")
    model.add_argument("--epochs", type=int)
    model.add_argument("--batch-size", type=int)
    model.add_argument("--learning-rate", type=float)
    model.add_argument("--weight-decay", type=float)
    model.add_argument("--label-smoothing", type=float)
    model.add_argument("--train-from-stage", default="", metavar="STAGE")
    model.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")


def _colour(text: str) -> str:
    try:
        return check_colour(text, "it")
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _within(low: float, high: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    return number


def _threshold(text: str) -> tuple[str, float]:
    label, _, least = text.rpartition("=")
    try:
        share = float(least)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability, nor CLASS=0.8, say")
    return label, share


def _backbone(text: str) -> str:
    if text == "auto":
        return text
    try:
        return registry.found(text, "backbone", "auto").name
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _default_weights_dir() -> Path:
    return Path(tempfile.gettempdir()) / "graft-weights"


def _add_rank_folder(commands: Any) -> None:
    rank = commands.add_parser(
        "rank-folder",
        help="say which backbone to start from, without the service",
        description="Scores backbones on the training images of a folder as `train` takes it, "
        "by a quick head's loss and LogME; trains none. Takes those whose weights are here where "
        "none is named.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rank.add_argument("folder", type=Path)
    rank.add_argument(
        "--backbone",
        action="append",
        default=[],
        metavar="NAME[:WEIGHTS]",
        help=f"{_NAMES}; more than once for several",
    )
    rank.add_argument("--weights-dir", type=Path, default=_default_weights_dir())
    rank.add_argument("--time-budget", type=float, default=60.0, metavar="SECONDS")
    rank.add_argument("--seed", type=int, default=0)
    rank.add_argument(
        "--threads", type=int, default=0, help="0 means one for each core that the process may use"
    )


def train(parsed: argparse.Namespace, run: Callable[[JobSpec, Send], int]) -> int:
    """Trains on a folder; returns the exit code."""

    def show(record: Record) -> None:
        if parsed.json:
            print(encode(record).decode(), flush=True)
        elif text := _for_people(record):
            print(text, file=sys.stderr, flush=True)

    out: Path = parsed.out
    if out.exists() and any(out.iterdir()):
        print(f"trainer: {out} is not empty: name another folder", file=sys.stderr)
        return 2
    for folder in (parsed.folder, parsed.target):
        if folder is not None and not folder.is_dir():
            print(f"trainer: {folder} is not a folder", file=sys.stderr)
            return 2
    if (parsed.method == "domain-adaptation") != (parsed.target is not None):
        print(
            "trainer: --method domain-adaptation and --target FOLDER need each other",
            file=sys.stderr,
        )
        return 2
    code = run(_spec(parsed), show)
    if code == ExitCode.OK:
        _compose(out)
        print(f"wrote {out / MODEL_FILE} and {out / 'report.html'}", file=sys.stderr)
    return code


def _spec(parsed: argparse.Namespace) -> JobSpec:
    method: Method
    if parsed.method == "auto":
        method = Auto()
    elif parsed.method == "feature-based":
        method = FeatureBased(l2=parsed.l2, augmented_views=parsed.augmented_views)
    elif parsed.method == "domain-adaptation":
        method = DomainAdaptation(
            technique=parsed.technique.replace("-", "_"),
            always_adapt=parsed.always_adapt,
            evaluate_on_target=parsed.evaluate_on_target,
            epochs=parsed.epochs,
            batch_size=parsed.batch_size,
            learning_rate=parsed.learning_rate,
        )
    else:
        method = ModelBased(
            recipe=parsed.recipe,
            epochs=parsed.epochs,
            batch_size=parsed.batch_size,
            learning_rate=parsed.learning_rate,
            weight_decay=parsed.weight_decay,
            label_smoothing=parsed.label_smoothing,
            train_from_stage=parsed.train_from_stage,
            precision=parsed.precision,
        )
    return JobSpec(
        job_id="local",
        model=parsed.folder.resolve().name,
        data=ImageSource(folder=str(parsed.folder.resolve())),
        out_dir=str(parsed.out),
        method=method,
        backbone=parsed.backbone,
        weights=parsed.weights,
        background=parsed.background,
        framing=parsed.framing,
        augmentation=_augmentation(parsed),
        weights_dir=str(parsed.weights_dir),
        validation_fraction=parsed.validation_fraction,
        grouping=_grouping(parsed),
        decision=_decision(parsed),
        seed=parsed.seed,
        time_budget_s=parsed.time_budget,
        asked_budget_s=parsed.time_budget,
        device=parsed.device,
        threads=parsed.threads,
        target=parsed.target and ImageSource(folder=str(parsed.target.resolve())),
        baselines=[name.replace("-", "_") for name in parsed.baseline],
        backbones=[PretrainedBackbone(backbone=name) for name in BACKBONES],
    )


def _augmentation(parsed: argparse.Namespace) -> Augmentation | None:
    found = Augmentation(**{name: getattr(parsed, name) for name in Augmentation.__struct_fields__})
    return None if found == Augmentation() else found


def _grouping(parsed: argparse.Namespace) -> Grouping | None:
    if not parsed.group_by_folder and not parsed.group_pattern:
        return None
    return Grouping(folder_level=parsed.group_by_folder, name_pattern=parsed.group_pattern)


def _decision(parsed: argparse.Namespace) -> Decision:
    if not parsed.threshold:
        return Decision(rule=parsed.decision)
    named = dict(parsed.threshold)
    others = named.pop("", 0.0)
    return Decision(rule="thresholds", thresholds=named, default_threshold=others)


def _compose(out: Path) -> None:
    from service.engine import export, head

    backbone = (out / BACKBONE_FILE).read_bytes()
    decoding = decode_manifest((out / MANIFEST_FILE).read_bytes()).decoding
    composed = export.compose(backbone, head.load((out / HEAD_FILE).read_bytes()), {}, decoding)
    (out / MODEL_FILE).write_bytes(composed)


def _for_people(record: Record) -> str:  # noqa: PLR0911 - one for each kind
    match record:
        case DataFound():
            counts = ", ".join(
                f"{c.label} {c.train}+{c.validation}+{c.test}" for c in record.classes
            )
            summary = record.summary
            left_out = "".join(f"\n  left out {f.path}: {f.detail}" for f in summary.files)
            return f"images (train+validation+test): {counts}{left_out}"
        case EpochEnded():
            return (
                f"epoch {record.epoch}/{record.epochs}  train loss {record.train_loss:.4f} "
                f"accuracy {record.train_accuracy:.4f}  {_of_validation(record)}"
                f"{record.images_per_second:.1f} images/s  ETA {record.eta_s:.0f} s"
            )
        case Note():
            return f"{record.level}: {record.text}"
        case Failed():
            return f"failed ({record.reason}): {record.message}"
        case Finished():
            if record.accuracy is None:
                return "nothing could be measured: the report says why"
            return f"accuracy {record.accuracy:.4f} on {record.count} images not learned from"
        case Progressed() if record.fraction == 0:
            return f"{record.stage} {record.detail}".rstrip()
    return ""


def _of_validation(record: EpochEnded) -> str:
    loss, accuracy = record.validation_loss, record.validation_accuracy
    if loss is None or accuracy is None:
        return ""
    return f"validation loss {loss:.4f} accuracy {accuracy:.4f}  "


def rank(parsed: argparse.Namespace, run: Callable[[RankSpec, Send], int]) -> int:
    """Ranks backbones on a folder; returns the exit code."""
    if not parsed.folder.is_dir():
        print(f"trainer: {parsed.folder} is not a folder", file=sys.stderr)
        return 2
    named = [name.partition(":") for name in parsed.backbone]
    spec = RankSpec(
        data=ImageSource(folder=str(parsed.folder.resolve())),
        backbones=[
            PretrainedBackbone(backbone=backbone, weights=weights)
            for backbone, _, weights in named or [(name, "", "") for name in BACKBONES]
        ],
        only_available=not named,
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

    return run(spec, show)


def _table(ranked: BackbonesRanked) -> str:
    lines = [["backbone", "weights", "log loss", "LogME", "ms an image", "features", "licence"]]
    for row in ranked.ranking:
        figures = (row.log_loss, row.log_me)
        lines.append(
            [
                row.backbone,
                row.weights,
                *("-" if value is None else f"{value:.3f}" for value in figures),
                "-" if row.image_ms is None else f"{row.image_ms:.3g}",
                str(row.feature_dim or "-"),
                row.weights_licence or "-",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
             for line in lines]  # fmt: skip
    problems = [f"{row.backbone}: {row.problem}" for row in ranked.ranking if row.problem]
    return "\n".join([*table, ranked.explanation, *problems])
