"""A version's answers to images that it did not learn from, kept beside it.

One row an image of its job: what it answered where that is known, and whether it learned
from it. So a later job compares on what neither version learned from, and keeps images on
the side that they had.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from service.engine.head import NONE
from trainer.arrays import Floats, Ints

_READ = ("digests", "targets", "roles", "groups", "sides", "answers", "classes", "probabilities")
KEPT = 16
"""Classes of an image whose probabilities are kept, the most probable."""


class Role(IntEnum):
    """A version's use of an image."""

    LEARNED = 0
    """Learned from, and not answered by anything that did not."""
    OUT_OF_FOLD = 1
    """Learned from, and answered by heads that did not."""
    HELD_OUT = 2
    """Not learned from."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Images of one role, with their answers."""

    role: Role
    digests: Sequence[str]
    targets: Ints
    groups: Ints
    probabilities: Floats | None = None
    """[n, classes]; None for images that were not asked."""
    answers: Ints | None = None
    """[n], classes or `NONE`, by the version's decision; None with `probabilities` alone."""
    sides: Floats | None = None
    """[n], from 0 to 1, of the groups' in every job; None where there is none."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Keeps what is known of one image."""

    role: Role
    answered: str | None
    """The class, by the version's decision; empty for none, None where it was not asked."""
    probability: float
    """Of the most probable class; 0 where it was not asked."""
    group: int
    """Images of one number belonged together."""
    label: str
    """The class that it had; empty where none was known."""
    side: float
    """From 0 to 1; NaN for an image that no network may hold out."""


def save(path: Path, classes: Sequence[str], rows: Sequence[Rows]) -> None:
    """Writes the rows.

    Tensors `digests` uint8 [n, 32], `targets` int32 [n], `roles` uint8 [n], `groups` int32 [n],
    `sides` float64 [n], `answers` int32 [n] (`NONE` too where an image was not asked), `classes`
    uint16 [n, p] and `probabilities` float16 [n, p] of the most probable classes, 0 where an image
    was not asked; the names of the classes in the metadata.
    """
    kept = min(KEPT, len(classes))
    best, shares, answers = [], [], []
    for each in rows:
        n = len(each.digests)
        answers.append(np.full(n, NONE) if each.answers is None else each.answers)
        if each.probabilities is None:
            best.append(np.zeros((n, kept), np.uint16))
            shares.append(np.zeros((n, kept), np.float16))
            continue
        order = np.argsort(-each.probabilities, axis=1, kind="stable")[:, :kept]
        best.append(order.astype(np.uint16))
        shares.append(np.take_along_axis(each.probabilities, order, axis=1).astype(np.float16))
    digests = [digest for each in rows for digest in each.digests]
    raw = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(len(digests), 32)
    tensors: dict[str, npt.NDArray[Any]] = {
        "digests": raw,
        "targets": np.concatenate([each.targets for each in rows]).astype(np.int32),
        "roles": np.concatenate([np.full(len(e.digests), e.role, np.uint8) for e in rows]),
        "groups": np.concatenate([each.groups for each in rows]).astype(np.int32),
        "sides": np.concatenate(
            [np.full(len(e.digests), np.nan) if e.sides is None else e.sides for e in rows]
        ),
        "answers": np.concatenate(answers).astype(np.int32),
        "classes": np.concatenate(best),
        "probabilities": np.concatenate(shares),
    }
    save_file(tensors, path, {"answers": json.dumps({"classes": list(classes)})})


def load(path: Path) -> dict[str, Answer]:
    """Reads the answers by the images' digests; raises ValueError or OSError for no such file."""
    try:
        with safe_open(path, "np") as file:
            classes = json.loads((file.metadata() or {})["answers"])["classes"]
            tensors = [file.get_tensor(name) for name in _READ]
        known: dict[str, Answer] = {}
        for digest, target, role, group, side, answer, _, shares in zip(*tensors, strict=True):
            named = "" if answer == NONE else str(classes[int(answer)])
            known[digest.tobytes().hex()] = Answer(
                role=Role(int(role)),
                answered=named if shares[0] > 0 else None,
                probability=float(shares[0]),
                group=int(group),
                label=str(classes[int(target)]) if target >= 0 else "",
                side=float(side),
            )
    except (SafetensorError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the kept answers are damaged: {error}") from error
    return known
