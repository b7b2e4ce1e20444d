"""`graft finetune`: from a folder of pictures to a served model, with a bar in between."""

import argparse
from typing import Any

from graft import _requests
from graft.cli._output import Output, Usage
from graft.cli._watching import Watching, follow
from graft.client import Client
from graft.errors import InvalidArgument
from graft.types import FineTuneOptions, ServerPath

_INTERRUPTED = 130
_OPTIONS = (
    "backbone", "weights", "method", "validation_fraction", "seed", "time_budget_s", "device",
    "request_id", "recipe", "l2", "epochs", "batch_size", "learning_rate", "momentum",
    "weight_decay", "label_smoothing", "train_from_stage", "early_stopping_patience", "precision",
)  # fmt: skip


def add(commands: Any) -> None:
    """The command and its options."""
    parser = commands.add(
        "finetune",
        "Make a model, or a version of one, from labelled pictures",
        run,
        epilog="Ctrl-C stops watching; the job goes on. `graft jobs cancel` ends it.",
    )
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a folder with a folder per class, a .tar, .tar.gz or .zip of one, the id of a "
        "dataset (ds-...), or server:PATH for what lies on the server",
    )
    parser.add_argument("--name", required=True, help="the model")
    parser.add_argument("--backbone", help="auto, resnet18 to resnet152, efficientnet_lite0")
    parser.add_argument("--weights", help="a torchvision name, or random; default: pretrained")
    parser.add_argument("--method", type=_method, help="feature-based (default) or model-based")
    parser.add_argument("--recipe", choices=["auto", "classic"], help="of model-based")
    parser.add_argument("--l2", type=float, help="of feature-based; default: cross-validated")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", dest="learning_rate", type=float, help="the highest learning rate")
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--label-smoothing", type=float)
    parser.add_argument("--train-from-stage", metavar="STAGE", help="keep earlier stages frozen")
    parser.add_argument("--freeze-batch-norm", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--early-stopping",
        dest="early_stopping_patience",
        type=int,
        metavar="EPOCHS",
        help="epochs without a better validation loss; 0 means never",
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--validation-fraction", type=float, help="0.05 to 0.5; default: 0.2")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--time-budget", dest="time_budget_s", type=float, metavar="S")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--label", action="append", type=_label, default=[], metavar="KEY=VALUE", help="repeatable"
    )
    parser.add_argument("--request-id", help="makes a repeat of this command harmless")
    parser.add_argument("--detach", action="store_true", help="do not wait for the end")


def run(client: Client, arguments: argparse.Namespace, output: Output) -> int:
    """Starts the job, and follows it."""
    given = {name: getattr(arguments, name) for name in _OPTIONS}
    chosen: Any = {name: value for name, value in given.items() if value is not None}
    if arguments.freeze_batch_norm is not None:
        chosen["freeze_batch_norm"] = arguments.freeze_batch_norm
    chosen["labels"] = dict(arguments.label)
    options: FineTuneOptions = chosen
    try:
        _requests.method(options)
    except InvalidArgument as error:
        raise Usage(f"{error.message} (see --method)") from error
    data = arguments.data
    source = ServerPath(data.removeprefix("server:")) if data.startswith("server:") else data
    with Watching(output) as watching:
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
    version = follow(job, output)
    if version is None:
        return _INTERRUPTED
    if not output.is_json:
        output.line(f"Try it: graft predict {version.model} PICTURE")
    return 0


def _method(text: str) -> str:
    method = text.replace("-", "_")
    if method not in ("feature_based", "model_based"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither feature-based nor model-based")
    return method


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value
