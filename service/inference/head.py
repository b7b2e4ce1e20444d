"""A head: what turns a backbone's features into class probabilities.

Kept as a safetensors file of kilobytes: tensors `weight` float32 [classes, d]
and `bias` float32 [classes]; metadata `head`, a JSON object with `classes` (their
names) and `temperature`; and, where it is known what the training pictures look
like, the tensors of an `Outliers`: `outlier_means`, `outlier_inverse_variance`
and `outlier_validation`. Loading one runs no code and opens no session.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from service.errors import Damaged, Reason
from service.inference.outliers import Outliers

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier with its class names and its temperature."""

    weight: Floats
    bias: Floats
    classes: tuple[str, ...]
    temperature: float = 1.0
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        count, dim = self.weight.shape
        if self.bias.shape != (count,) or len(self.classes) != count or dim < 1:
            raise ValueError(
                f"weight {self.weight.shape}, bias {self.bias.shape} and "
                f"{len(self.classes)} classes do not fit together"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not above 0")
        if self.outliers is not None and self.outliers.means.shape[1] != dim:
            raise ValueError(f"outliers of {self.outliers.means.shape[1]} features, not {dim}")

    @property
    def feature_dim(self) -> int:
        """How many features it takes."""
        return int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory, about."""
        names = sum(len(name) + 64 for name in self.classes)
        outliers = 0 if self.outliers is None else self.outliers.nbytes
        return self.weight.nbytes + self.bias.nbytes + outliers + names + 512

    def logits(self, features: Floats) -> Floats:
        """From features float32 [n, d] to logits float32 [n, classes], before the temperature."""
        logits: Floats = features @ self.weight.T + self.bias
        return logits

    def probabilities(self, features: Floats) -> Floats:
        """From features float32 [n, d] to probabilities float32 [n, classes]."""
        scaled = self.logits(features) / np.float32(self.temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        np.exp(scaled, out=scaled)
        scaled /= scaled.sum(axis=1, keepdims=True)
        return scaled


def save(head: Head, path: Path) -> None:
    """Writes the head; the caller renames the file into place."""
    tensors: dict[str, npt.NDArray[Any]] = {"weight": head.weight, "bias": head.bias}
    if (outliers := head.outliers) is not None:
        tensors |= {
            "outlier_means": outliers.means,
            "outlier_inverse_variance": outliers.inverse_variance,
            "outlier_validation": outliers.validation,
        }
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        str(path),
        # One key: safetensors writes several in any order, and the same head is to
        # be the same bytes.
        metadata={
            "head": json.dumps(
                {"classes": head.classes, "temperature": float(head.temperature)},
                ensure_ascii=False,
            )
        },
    )


def load(path: Path) -> Head:
    """Reads a head; raises Damaged (MODEL_UNLOADABLE) for anything but a whole one."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {})["head"])
            return Head(
                weight=file.get_tensor("weight"),
                bias=file.get_tensor("bias"),
                classes=_names(about["classes"]),
                temperature=float(about["temperature"]),
                outliers=_outliers(file) if "outlier_means" in file.keys() else None,  # noqa: SIM118
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            Reason.MODEL_UNLOADABLE,
            "the version's head cannot be read: publish the version again",
        ) from error


def _outliers(file: Any) -> Outliers:
    return Outliers(
        file.get_tensor("outlier_means"),
        file.get_tensor("outlier_inverse_variance"),
        file.get_tensor("outlier_validation"),
    )


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("classes is not a list of names")
    return tuple(value)
