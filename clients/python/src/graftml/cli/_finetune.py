"""`graft finetune`: from a folder of images to a served model, with a bar in between."""

import argparse
import re
from typing import Any

from graftml import Client, _requests
from graftml.cli import _decision, _names
from graftml.cli._output import Output, Usage
from graftml.cli._watching import Watching, follow, tell
from graftml.errors import InvalidArgument
from graftml.types import Augmentation, FineTuneOptions, Gate, Grouping

_APART = {"labels", "decision", "augmentation", "target", "grouping", "base", "gate"}
"""Options of `fine_tune` that flags are composed to."""
_GATE = (
    "min_accuracy", "min_class_recall", "not_worse_than", "max_regression", "when_uncertain",
    "max_latency_ms",
)  # fmt: skip
_AUGMENTATION = tuple(Augmentation.__dataclass_fields__)
_METHOD = re.compile(r"method='(\w+)'")
_METHODS = ("auto", "feature_based", "model_based", "domain_adaptation")


def add(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add(
        "finetune",
        "Make a model, or a version of one, from labelled images",
        run,
        epilog="Ends with 4 when the version did not pass its gate. Ctrl-C stops watching; the "
        "job goes on. `graft jobs cancel` ends it.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a folder with a folder per class, a .tar, .tar.gz or .zip of one, the id of a "
        "dataset (ds-...), or server:PATH for what lies on the server",
    )
    parser.add_argument("--name", required=True, help="the model")
    parser.add_argument(
        "--backbone",
        help="a name such as efficientnet_lite0 or resnet50, timm/NAME for any network of timm's, "
        "onnx/NAME for a registered one, or auto for the best for the data; default: the server's",
    )
    parser.add_argument(
        "--weights",
        help="a torchvision name, random, or file:NAME for a file in the server's folder of "
        "weights; default: pretrained",
    )
    parser.add_argument(
        "--method",
        type=_method,
        help="auto (default), feature-based, model-based or domain-adaptation",
    )
    parser.add_argument("--recipe", choices=["auto", "classic"], help="of model-based")
    parser.add_argument("--l2", type=float, help="of feature-based; default: cross-validated")
    parser.add_argument(
        "--augmented-views",
        type=int,
        metavar="N",
        help="of feature-based: changed copies of each image to learn from, 0 to 16",
    )
    _add_adaptation(parser.add_argument_group("domain adaptation"))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", dest="learning_rate", type=float, help="the highest learning rate")
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--label-smoothing", type=float)
    parser.add_argument("--train-from-stage", metavar="STAGE", help="keep earlier stages frozen")
    parser.add_argument("--freeze-batch-norm", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument(
        "--background",
        metavar="#RRGGBB",
        help="the colour that transparent parts of images are laid on; default: white",
    )
    parser.add_argument(
        "--framing",
        choices=["auto", "crop", "whole", "compare"],
        help="what is seen of an image: its middle, all of it squeezed to a square, or the better "
        "of the two; auto (default) compares where images are long",
    )
    parser.add_argument(
        "--serving-precision",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="what the version computes in, wherever it serves; int8 is faster on a CPU, at a "
        "price that the report says; auto (default) is the server's choice",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        help="held out where a network is trained, 0.05 to 0.5; default: 0.2",
    )
    parser.add_argument(
        "--outlier-false-alarms",
        dest="outlier_false_alarm_rate",
        type=float,
        metavar="RATE",
        help="the part of images of the training's kind that may be called out of distribution, "
        "0.001 to 0.5; default: 0.05",
    )
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument(
        "--group-by-folder",
        dest="folder_level",
        type=int,
        metavar="N",
        help="images in one folder belong together: the Nth below the class's, from 1",
    )
    groups.add_argument(
        "--group-pattern",
        dest="name_pattern",
        metavar="PATTERN",
        help="which part of a file's name says what belongs together: '{group}_*.jpg'",
    )
    parser.add_argument(
        "--case-sensitive-labels",
        action="store_true",
        default=None,
        help="class names that differ in upper and lower case alone are two classes",
    )
    parser.add_argument(
        "--base",
        metavar="VERSION",
        help="learn from this version's images too: a number or an alias of the same model, or "
        "MODEL:VERSION or MODEL@ALIAS",
    )
    parser.add_argument(
        "--baseline",
        dest="baselines",
        action="append",
        type=_underscored,
        metavar="NAME",
        help="compare with it in the report: linear-probe, full-fine-tune, from-scratch, "
        "nearest-class-mean; repeatable",
    )
    _decision.add(parser)
    _add_augmentation(
        parser.add_argument_group(
            "augmentation", "how images are varied in training; default: the method's own choice"
        )
    )
    _add_gate(parser.add_argument_group("gate", "a version that fails is kept as a candidate"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--time-budget", dest="time_budget_s", type=float, metavar="S")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--label",
        action="append",
        type=_names.label,
        default=[],
        metavar="KEY=VALUE",
        help="repeatable",
    )
    parser.add_argument("--request-id", help="makes a repeat of this command harmless")
    parser.add_argument("--detach", action="store_true", help="do not wait for the end")


def _add_adaptation(group: Any) -> None:
    group.add_argument(
        "--target",
        metavar="DATA",
        help="images of the domain to adapt to, at any depth; given as DATA is",
    )
    group.add_argument(
        "--technique",
        type=_underscored,
        metavar="NAME",
        help=", ".join(_requests.TECHNIQUES).replace("_", "-"),
    )
    group.add_argument(
        "--always-adapt",
        action="store_true",
        default=None,
        help="also where there is a doubt that it helps",
    )
    group.add_argument(
        "--evaluate-on-target",
        action="store_true",
        default=None,
        help="the target has a folder per class: measure with it, never learn from it",
    )


def _add_augmentation(group: Any) -> None:
    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="left to right; --no-mirror where left and right are different classes",
    )
    group.add_argument(
        "--min-scale",
        type=float,
        metavar="S",
        help="the part of the image's area that a random crop has at least, 0.05 to 1",
    )
    group.add_argument(
        "--rotation",
        dest="rotation_degrees",
        type=float,
        metavar="DEGREES",
        help="at most, to either side, 0 to 180",
    )
    group.add_argument(
        "--colour",
        type=float,
        metavar="C",
        help="the part that brightness, contrast and saturation change by at most, 0 to 1",
    )
    group.add_argument(
        "--trivial-augment",
        action=argparse.BooleanOptionalAction,
        help="one of 14 operations in a random strength",
    )


def _add_gate(group: Any) -> None:
    group.add_argument("--min-accuracy", type=float, metavar="A", help="0 to 1")
    group.add_argument("--min-class-recall", type=float, metavar="R", help="of each class, 0 to 1")
    group.add_argument(
        "--class-recall",
        action="append",
        type=_class_recall,
        default=[],
        metavar="CLASS=R",
        help="of one class; repeatable",
    )
    group.add_argument("--not-worse-than", metavar="ALIAS", help="shown on the same images")
    group.add_argument(
        "--max-regression",
        type=float,
        metavar="D",
        help="of accuracy, that may be lost to it; default: 0.03",
    )
    group.add_argument(
        "--when-uncertain",
        choices=["hold", "promote"],
        help="where that is undecided; default: hold",
    )
    group.add_argument("--max-latency-ms", type=float, metavar="MS", help="of one image")
    group.add_argument(
        "--gate-alias", metavar="ALIAS", help="moves to the version when it passes, beside latest"
    )


def run(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Starts the job, and follows it."""
    names = [name for name in FineTuneOptions.__annotations__ if name not in _APART]
    given = {name: getattr(arguments, name) for name in names}
    chosen: Any = {name: value for name, value in given.items() if value is not None}
    chosen["labels"] = dict(arguments.label)
    chosen["decision"] = _decision.read(arguments)
    varied = Augmentation(**{name: getattr(arguments, name) for name in _AUGMENTATION})
    chosen["augmentation"] = None if varied == Augmentation() else varied
    if arguments.target is not None:
        chosen["target"] = _names.data(arguments.target)
    if arguments.folder_level is not None or arguments.name_pattern is not None:
        chosen["grouping"] = Grouping(
            folder_level=arguments.folder_level, name_pattern=arguments.name_pattern or ""
        )
    if arguments.base is not None:
        chosen["base"] = _names.base(arguments.base)
    bounds: Any = {name: getattr(arguments, name) for name in _GATE}
    wanted = {name: bound for name, bound in bounds.items() if bound is not None}
    if arguments.class_recall:
        wanted["class_recalls"] = dict(arguments.class_recall)
    if wanted or arguments.gate_alias is not None:
        chosen["gate"] = Gate(**wanted, alias=arguments.gate_alias or "")
    options: FineTuneOptions = chosen
    try:
        _requests.method(options)
    except InvalidArgument as error:
        message = _METHOD.sub(lambda found: f"--method {_dashed(found[1])}", error.message)
        raise Usage(f"{message} (see --method)") from error
    source = _names.labelled(arguments.data)
    with _names.folders_here(arguments.data, arguments.target), Watching(output) as watching:
        job = client.fine_tune(source, arguments.name, on_upload=watching.uploaded, **options)
    if arguments.detach:
        if output.is_json:
            output.emit({"type": "job", **vars(job.job)})
        else:
            output.line(job.job_id)
        return 0
    if output.is_json:
        output.emit({"type": "job", **vars(job.job)})
    else:
        output.line(f"job {job.job_id} of model {arguments.name}")
    code, version = follow(job, output)
    if version is not None and not output.is_json:
        tell(version, output)
    return code


def _dashed(text: str) -> str:
    return text.replace("_", "-")


def _underscored(text: str) -> str:
    return text.replace("-", "_")


def _method(text: str) -> str:
    method = _underscored(text)
    if method not in _METHODS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of auto, feature-based, model-based, domain-adaptation"
        )
    return method


def _class_recall(text: str) -> tuple[str, float]:
    label, equals, least = text.rpartition("=")
    try:
        return label, float(least if label and equals else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLASS=R, such as ants=0.8") from None
