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
        "Train a version of a model from labelled images",
        run,
        epilog="The exit code is 4 if the version did not pass its gate. Ctrl-C stops watching "
        "and the job continues; `graft jobs cancel` ends it.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a folder with a folder per class, a .tar, .tar.gz or .zip of one, the id of a "
        "dataset (ds-...), or server:PATH for a folder or archive on the server",
    )
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument(
        "--backbone",
        help="a name such as efficientnet_lite0 or resnet50, timm/NAME for any network of timm, "
        "onnx/NAME for a registered one, or auto for the best on the data; default: the server's",
    )
    parser.add_argument(
        "--weights",
        help="a name of torchvision's, random, or file:NAME for a file in GRAFT_WEIGHTS_DIR; "
        "default: pretrained",
    )
    parser.add_argument(
        "--method",
        type=_method,
        help="auto (default), feature-based, model-based or domain-adaptation",
    )
    parser.add_argument(
        "--recipe", choices=["auto", "classic"], help="hyperparameters of model-based training"
    )
    parser.add_argument(
        "--l2", type=float, help="penalty of a feature-based head; default: cross-validated"
    )
    parser.add_argument(
        "--augmented-views",
        type=int,
        metavar="N",
        help="augmented copies of each image for a feature-based head, 0 to 16",
    )
    _add_adaptation(parser.add_argument_group("domain adaptation"))
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, help="images per training step")
    parser.add_argument("--lr", dest="learning_rate", type=float, help="peak learning rate")
    parser.add_argument("--momentum", type=float, help="momentum of SGD, or beta1 of AdamW")
    parser.add_argument("--weight-decay", type=float, help="weight decay of the optimiser")
    parser.add_argument("--label-smoothing", type=float, help="label smoothing, from 0")
    parser.add_argument("--train-from-stage", metavar="STAGE", help="freeze the stages before this")
    parser.add_argument(
        "--freeze-batch-norm",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the running statistics of BatchNorm fixed",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="number format of training",
    )
    parser.add_argument(
        "--background",
        metavar="#RRGGBB",
        help="colour behind transparent parts of images; default: white",
    )
    parser.add_argument(
        "--framing",
        choices=["auto", "crop", "whole", "compare"],
        help="what the backbone sees of an image: the centre (crop), all of it squeezed to a "
        "square (whole), or the better of the two (compare); auto (default) compares for elongated "
        "images",
    )
    parser.add_argument(
        "--serving-precision",
        choices=["auto", "fp32", "bf16", "fp16", "int8"],
        help="number format of the version when it serves; int8 is faster on a CPU and the report "
        "gives its cost in accuracy; auto (default): the server's choice",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        help="fraction of images held out when a network is trained, 0.05 to 0.5; default: 0.2",
    )
    parser.add_argument(
        "--outlier-false-alarms",
        dest="outlier_false_alarm_rate",
        type=float,
        metavar="RATE",
        help="fraction of images like the training images that may be reported as out of "
        "distribution, 0.001 to 0.5; default: 0.05",
    )
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument(
        "--group-by-folder",
        dest="folder_level",
        type=int,
        metavar="N",
        help="images in the same folder, N levels below the class's, belong together; from 1",
    )
    groups.add_argument(
        "--group-pattern",
        dest="name_pattern",
        metavar="PATTERN",
        help="files with the same {group} in their names belong together: '{group}_*.jpg'",
    )
    parser.add_argument(
        "--case-sensitive-labels",
        action="store_true",
        default=None,
        help="treat class names that differ only in case as different classes",
    )
    parser.add_argument(
        "--base",
        metavar="VERSION",
        help="train on this version's images, too: a number or an alias of the same model, or "
        "MODEL:VERSION or MODEL@ALIAS",
    )
    parser.add_argument(
        "--baseline",
        dest="baselines",
        action="append",
        type=_underscored,
        metavar="NAME",
        help="compare with this in the report: linear-probe, full-fine-tune, from-scratch, "
        "nearest-class-mean; repeatable",
    )
    _decision.add(parser)
    _add_augmentation(
        parser.add_argument_group(
            "augmentation", "random changes to training images; default: the method's choice"
        )
    )
    _add_gate(
        parser.add_argument_group(
            "gate", "conditions for publishing; a version that fails is kept as a candidate"
        )
    )
    parser.add_argument("--seed", type=int, help="seed of everything random")
    parser.add_argument(
        "--time-budget",
        dest="time_budget_s",
        type=float,
        metavar="S",
        help="seconds that training may take",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to train")
    parser.add_argument(
        "--label",
        action="append",
        type=_names.label,
        default=[],
        metavar="KEY=VALUE",
        help="a label for lists to filter by; repeatable",
    )
    parser.add_argument(
        "--request-id", help="repeating the command with the same id starts no second job"
    )
    parser.add_argument("--detach", action="store_true", help="do not wait for the job to end")


def _add_adaptation(group: Any) -> None:
    group.add_argument(
        "--target",
        metavar="DATA",
        help="unlabelled images of the target domain, at any depth; same forms as DATA",
    )
    group.add_argument(
        "--technique",
        type=_underscored,
        metavar="NAME",
        help="one of " + ", ".join(_requests.TECHNIQUES).replace("_", "-"),
    )
    group.add_argument(
        "--always-adapt",
        action="store_true",
        default=None,
        help="publish the adapted model even if it is in doubt that adapting helps",
    )
    group.add_argument(
        "--evaluate-on-target",
        action="store_true",
        default=None,
        help="the target has a folder per class: use it to measure, not to train",
    )


def _add_augmentation(group: Any) -> None:
    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="flip left to right; use --no-mirror if left and right are different classes",
    )
    group.add_argument(
        "--min-scale",
        type=float,
        metavar="S",
        help="least area of a random crop, as a fraction of the image's, 0.05 to 1",
    )
    group.add_argument(
        "--rotation",
        dest="rotation_degrees",
        type=float,
        metavar="DEGREES",
        help="greatest rotation to either side, 0 to 180",
    )
    group.add_argument(
        "--colour",
        type=float,
        metavar="C",
        help="greatest change of brightness, contrast and saturation, 0 to 1",
    )
    group.add_argument(
        "--trivial-augment",
        action=argparse.BooleanOptionalAction,
        help="apply one of 14 operations with random strength",
    )


def _add_gate(group: Any) -> None:
    group.add_argument(
        "--min-accuracy", type=_names.fraction, metavar="A", help="least accuracy, 0 to 1"
    )
    group.add_argument(
        "--min-class-recall",
        type=_names.fraction,
        metavar="R",
        help="least recall of each class, 0 to 1",
    )
    group.add_argument(
        "--class-recall",
        action="append",
        type=_class_recall,
        default=[],
        metavar="CLASS=R",
        help="least recall of one class; repeatable",
    )
    group.add_argument(
        "--not-worse-than",
        metavar="ALIAS",
        help="must be shown on the same images to be no worse than this version",
    )
    group.add_argument(
        "--max-regression",
        type=float,
        metavar="D",
        help="loss of accuracy that --not-worse-than allows; default: 0.03",
    )
    group.add_argument(
        "--when-uncertain",
        choices=["hold", "promote"],
        help="what to do if a condition is undecided; default: hold (a candidate)",
    )
    group.add_argument(
        "--max-latency-ms", type=float, metavar="MS", help="greatest latency of one image"
    )
    group.add_argument(
        "--gate-alias",
        metavar="ALIAS",
        help="alias to move to a version that passes, besides latest",
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
        return label, _names.fraction(least if label and equals else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLASS=R, such as ants=0.8") from None
