"""Turns a backbone's features into class probabilities.

A head is kept as a safetensors file of kilobytes: tensors `weight` float16 [classes, d] and
`bias` float32 [classes]; metadata `head`, a JSON object with `scale` (what the weights
are to be multiplied by), `classes` (their names), `temperature`, `is_calibrated` and
`decision` (a `Decision`); where they are known, the classes' shares among the images that
it learned from, `prior` float32 [classes]; and, where it is known what those images look
like, the tensors of an `Outliers`: `outlier_means`, `outlier_inverse_variance`,
`outlier_validation` and `outlier_energy`, float64 [3]: the energy's weight and
floor, and the offset.
Loading one runs no code and opens no session.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from cachetools import LRUCache, cached
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_of
from safetensors.numpy import save_file

from service.domain import ARGMAX, Decision
from service.engine.outliers import KEPT_BYTES, Outliers
from service.errors import unloadable

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

NONE = -1
"""Stands for no class, where none reaches its threshold."""

_LARGEST = 1024.0
"""Largest weight as it is kept: far from the ends of float16 on both sides."""


@dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier on the first of a backbone's features, its classes and temperature."""

    weight: npt.NDArray[np.floating]
    """[classes, d], times `scale`; of whatever type it is given in, it is kept as float16."""
    bias: Floats
    classes: tuple[str, ...]
    temperature: float = 1.0
    outliers: Outliers | None = None
    is_calibrated: bool = True
    """True if its probabilities were shown to be right on images that nothing was learned from."""
    scale: float = 1.0
    prior: Floats | None = None
    """Each class's share [classes] of the images that it learned from; None where all are alike."""
    decision: Decision = ARGMAX
    """Turns its probabilities into answers."""

    def __post_init__(self) -> None:
        if self.weight.dtype != np.float16:
            # A power of two: nothing but the rounding to float16 is lost.
            largest = float(np.abs(self.weight).max(initial=0.0)) or 1.0
            scale = 2.0 ** math.ceil(math.log2(largest / _LARGEST))
            half = (self.weight / scale).astype(np.float16)
            object.__setattr__(self, "weight", half)
            object.__setattr__(self, "scale", self.scale * scale)
        count, dim = self.weight.shape
        if self.bias.shape != (count,) or len(self.classes) != count or dim < 1:
            raise ValueError(
                f"weight {self.weight.shape}, bias {self.bias.shape} and "
                f"{len(self.classes)} classes do not fit together"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} is not above 0")
        if not self.scale > 0:
            raise ValueError(f"scale {self.scale} is not above 0")
        prior = self.prior
        if prior is not None and not (prior.shape == (count,) and (prior >= 0).all()):
            raise ValueError(f"prior {prior} is not a share of each of {count} classes")
        if self.outliers is not None and self.outliers.means.shape[1] > dim:
            raise ValueError(f"outliers of {self.outliers.means.shape[1]} features, not {dim}")

    @property
    def feature_dim(self) -> int:
        """Number of features that it takes, the first of those that its backbone gives."""
        return int(self.weight.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory, about."""
        names = sum(len(name) + 64 for name in self.classes)
        outliers = 0 if self.outliers is None else self.outliers.nbytes
        return self.weight.nbytes + 2 * self.bias.nbytes + outliers + names + 512

    @property
    def matrix(self) -> Floats:
        """Weights float32 [classes, d], unscaled."""
        matrix: Floats = self.weight.astype(np.float32) * np.float32(self.scale)
        return matrix

    def logits(self, features: Floats) -> Floats:
        """Computes logits float32 [n, classes] of features float32 [n, d or more].

        They are not divided by the temperature yet.
        """
        logits: Floats = features[:, : self.feature_dim] @ _matrix(self).T + self.bias
        return logits

    def probabilities(self, features: Floats) -> Floats:
        """Computes probabilities float32 [n, classes] of features float32 [n, d or more]."""
        return np.exp(self.log_probabilities(features))

    def log_probabilities(self, features: Floats) -> Floats:
        """Computes their logarithms, float32 [n, classes], of features float32 [n, d or more]."""
        scaled = self.logits(features) / np.float32(self.temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        return scaled

    def decide(
        self, probabilities: npt.NDArray[np.floating], decision: Decision | None = None
    ) -> Ints:
        """Decides by probabilities [n, classes] which class int64 [n] is answered, or `NONE`.

        By the head's own decision where none is given. Of equals the first class is answered.
        """
        decision = decision or self.decision
        if decision.rule == "balanced" and self.prior is not None:
            # A class that was not learned from is never answered.
            probabilities = probabilities / np.where(self.prior > 0, self.prior, np.inf)
        best: Ints = probabilities.argmax(axis=1)
        if decision.rule == "thresholds":
            named, other = decision.thresholds, decision.default_threshold
            # As exact as the probabilities that callers get.
            least = np.array([named.get(label, other) for label in self.classes], np.float32)
            has_reached = probabilities >= least
            best = np.where(has_reached, probabilities, -1).argmax(axis=1)
            best = np.where(has_reached.any(axis=1), best, NONE)
        return best


@cached(LRUCache(KEPT_BYTES, getsizeof=lambda matrix: matrix.nbytes), lock=Lock())
def _matrix(head: Head) -> Floats:
    return head.matrix


def save(head: Head, path: Path) -> None:
    """Writes the head; the caller renames the file into place."""
    tensors: dict[str, npt.NDArray[Any]] = {"weight": head.weight, "bias": head.bias}
    if head.prior is not None:
        tensors["prior"] = head.prior
    if (outliers := head.outliers) is not None:
        tensors |= {
            "outlier_means": outliers.means,
            "outlier_inverse_variance": outliers.inverse_variance,
            "outlier_validation": outliers.validation,
            "outlier_energy": np.array(
                [outliers.energy_weight, outliers.energy_floor, outliers.offset]
            ),
        }
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        str(path),
        # One key: safetensors writes several in any order, and the same head is to
        # be the same bytes.
        metadata={
            "head": json.dumps(
                {
                    "scale": head.scale,
                    "classes": head.classes,
                    "temperature": float(head.temperature),
                    "is_calibrated": head.is_calibrated,
                    "decision": msgspec.to_builtins(head.decision, order="deterministic"),
                },
                ensure_ascii=False,
            )
        },
    )


def load(data: bytes) -> Head:
    """Parses a head's file; raises Damaged (MODEL_UNLOADABLE) for anything but a whole one."""
    try:
        tensors = tensors_of(data)
        about = json.loads(_metadata(data)["head"])
        return Head(
            weight=tensors["weight"],
            bias=tensors["bias"],
            classes=_names(about["classes"]),
            temperature=float(about["temperature"]),
            outliers=_outliers(tensors) if "outlier_means" in tensors else None,
            is_calibrated=_flag(about["is_calibrated"]),
            scale=float(about["scale"]),
            prior=tensors.get("prior"),
            decision=msgspec.convert(about["decision"], Decision),
        )
    except (
        *(SafetensorError, KeyError, TypeError, ValueError, msgspec.ValidationError),
        *(AttributeError, OverflowError, RecursionError),  # of JSON that is not a head's
    ) as error:
        raise unloadable("head", "is not a head") from error


def _metadata(data: bytes) -> dict[str, str]:
    # The length of the header, and the header, JSON; the tensors' parser has checked both.
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def _outliers(tensors: dict[str, npt.NDArray[Any]]) -> Outliers:
    return Outliers(
        tensors["outlier_means"],
        tensors["outlier_inverse_variance"],
        tensors["outlier_validation"],
        *map(float, tensors["outlier_energy"]),
    )


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("is_calibrated is neither true nor false")
    return value


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("classes is not a list of names")
    return tuple(value)
