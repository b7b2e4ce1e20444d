"""What a FineTune call asked for: checked at the door, kept with the job as JSON.

Field names in errors are those of `FineTuneRequest`. Knows no gRPC.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from service.domain import check_name
from service.errors import InvalidInput, NotAllowed, NotFound, Reason
from service.jobs.contract import BACKBONES, DEFAULT_BACKBONE, FeatureBased, Method, ModelBased

MAX_REQUEST_ID_CHARS = 128
_MAX_LABELS = 32
_MAX_KEY_CHARS = 63
_MAX_VALUE_CHARS = 255
_MAX_PATH_CHARS = 4096

_WEIGHTS = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_STAGES = {
    "resnet": ("stem", "layer1", "layer2", "layer3", "layer4"),
    "efficientnet": ("stem", *(f"stage{n}" for n in range(1, 8)), "top"),
}


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request; its pictures lie at `server_path` or in `dataset_id`, one of the two."""

    model: str
    server_path: str = ""
    dataset_id: str = ""
    backbone: str = ""
    """"" or "auto" for the server's choice."""
    weights: str = ""
    method: Method = msgspec.field(default_factory=FeatureBased)
    validation_fraction: float | None = None
    """None means 0.2."""
    seed: int | None = None
    """None means 0."""
    time_budget_s: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    labels: dict[str, str] = {}

    def backbone_or(self, default: str) -> str:
        """The backbone that is meant where the server's choice is `default`."""
        return default if self.backbone in ("", "auto") else self.backbone

    def check(self, default_backbone: str = DEFAULT_BACKBONE) -> None:
        """Raises InvalidInput for the first field whose value is not allowed."""
        check_name(self.model, "model")
        self._check_data()
        backbone = self.backbone_or(default_backbone)
        if backbone not in BACKBONES:
            raise _bad(
                "backbone", f"backbone {_shown(backbone)} is none of {', '.join(BACKBONES)}, auto"
            )
        if self.weights and not _WEIGHTS.fullmatch(self.weights):
            raise _bad(
                "weights",
                f"weights {_shown(self.weights)} is no name: use a torchvision weights name such "
                "as IMAGENET1K_V1, random, or nothing for the pretrained ones",
            )
        if isinstance(self.method, ModelBased):
            self._check_model_based(self.method, backbone)
        else:
            _in("feature_based.l2", self.method.l2, 0, math.inf, above=True)
        _in("validation_fraction", self.validation_fraction, 0.05, 0.5)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise _bad("seed", "seed does not fit into 64 bits")
        _in("time_budget", self.time_budget_s, 1, math.inf, unit=" s")
        _check_labels(self.labels)

    def _check_data(self) -> None:
        if not self.server_path and not self.dataset_id:
            raise _bad(
                "data", "the request names no pictures: set server_path, dataset_id or "
                "inline_pictures",
            )  # fmt: skip
        if self.server_path and self.dataset_id:
            raise _bad("data", "server_path and dataset_id are both set: set one")

    def _check_model_based(self, method: ModelBased, backbone: str) -> None:
        at = "model_based."
        _in(at + "epochs", method.epochs, 1, 10_000)
        _in(at + "batch_size", method.batch_size, 1, 4096)
        _in(at + "learning_rate", method.learning_rate, 0, math.inf, above=True)
        _in(at + "momentum", method.momentum, 0, 1, below=True)
        _in(at + "weight_decay", method.weight_decay, 0, math.inf)
        _in(at + "label_smoothing", method.label_smoothing, 0, 1, below=True)
        _in(at + "early_stopping_patience", method.early_stopping_patience, 0, 2**31 - 1)
        stages = next(names for family, names in _STAGES.items() if backbone.startswith(family))
        if method.train_from_stage and method.train_from_stage not in stages:
            raise _bad(
                at + "train_from_stage",
                f"{backbone} has no stage {_shown(method.train_from_stage)}; its stages are "
                f"{', '.join(stages)}",
            )
        if method.precision == "fp16" and self.device == "cpu":
            raise _bad(at + "precision", "fp16 trains on CUDA alone: use fp32 or bf16 on the CPU")


def check_request_id(value: str) -> None:
    """Raises InvalidInput for a request id that is too long."""
    if len(value) > MAX_REQUEST_ID_CHARS:
        raise _bad("request_id", f"request_id has more than {MAX_REQUEST_ID_CHARS} characters")


def allowed_path(path: str, allowed: tuple[Path, ...]) -> Path:
    """The real path behind `path`, links resolved, when it lies in an allowed folder.

    Raises InvalidInput, NotAllowed (PATH_NOT_ALLOWED) or NotFound
    (PATH_NOT_FOUND); the messages tell nothing of what lies outside.
    """
    field = "server_path.path"
    if not path.startswith("/") or "\0" in path or len(path) > _MAX_PATH_CHARS:
        raise _bad(
            field, f"path {_shown(path)} is not absolute: name a folder or an archive from '/' on"
        )
    try:
        real = Path(path).resolve(strict=False)
    except (OSError, RuntimeError):
        # A loop of links, or a name that no file system takes: not inside, whatever it is.
        real = Path("/")
    folders = [folder.resolve() for folder in allowed]
    if not any(real.is_relative_to(folder) for folder in folders):
        raise NotAllowed(
            Reason.PATH_NOT_ALLOWED,
            f"path {_shown(path)} lies outside the folders that this server may read: ask its "
            "operator to allow the folder (GRAFT_ALLOWED_DIRS), or upload the pictures",
            field=field,
        )
    try:
        is_there = real.is_dir() or real.is_file()
    except OSError:
        is_there = False
    if not is_there:
        raise NotFound(
            Reason.PATH_NOT_FOUND,
            f"there is no folder or archive at {_shown(path)}",
            field=field,
        )
    return real


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > _MAX_LABELS:
        raise _bad("labels", f"there are {len(labels)} labels: at most {_MAX_LABELS} are kept")
    for key, value in labels.items():
        if not 1 <= len(key) <= _MAX_KEY_CHARS:
            raise _bad("labels", f"the label {_shown(key)} has no 1 to {_MAX_KEY_CHARS} characters")
        if len(value) > _MAX_VALUE_CHARS:
            raise _bad(
                f"labels[{key}]",
                f"the value of {key!r} has more than {_MAX_VALUE_CHARS} characters",
            )


def _in(
    field: str,
    value: float | None,
    low: float,
    high: float,
    *,
    above: bool = False,
    below: bool = False,
    unit: str = "",
) -> None:
    if value is None:
        return
    # Written so that NaN fails, and infinity everywhere.
    is_fine = (value > low if above else value >= low) and (
        value < high if below or high == math.inf else value <= high
    )
    if is_fine:
        return
    least = f"above {low:g}" if above else f"at least {low:g}"
    most = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
    raise _bad(field, f"{field} is {value:g}{unit}: it must be {least}{most}{unit}")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 120 else value[:117] + "...")


def _bad(field: str, message: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)
