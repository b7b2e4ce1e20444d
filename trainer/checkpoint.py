"""Checkpoints of training on disk: written whole or not at all, read with suspicion.

A checkpoint takes a temporary name, is flushed to the disk and then renamed, so
that a process killed at any moment leaves the one before. It carries the key of
the work that it belongs to. Knows nothing of what a state is made of.
"""

import hashlib
import os
import pickle  # nosec B403 # for its error alone
from pathlib import Path
from typing import Any

import msgspec
import torch

from service.contract import JobSpec, Method, Note
from service.ops import failpoints
from trainer import liveness
from trainer.data import Part
from trainer.recipes import Settings
from trainer.records import Send

FILE = "training.pt"
_FLUSH_S = 600.0
"""Longest time that a disk that others keep busy gets."""

State = dict[str, Any]
"""Tensors, numbers, text, lists and dicts of them: what loads without running code."""


def key(spec: JobSpec, method: Method, recipe: Settings, learned: Part, *others: str) -> str:
    """Returns the digest of what training's outcome depends on.

    Those are the parts of a spec that say it, the recipe that was made of them, the images
    with their classes in their order, and `others`. Time is none of it: another attempt may
    have less.
    """
    said = (method, spec.backbone, spec.weights, spec.seed, spec.augmentation, recipe)
    images = (learned.digests, learned.targets.tolist())
    return hashlib.sha256(msgspec.json.encode((said, images, others))).hexdigest()


class Checkpoints:
    """Keeps one checkpoint in a folder; without a folder nothing is kept."""

    def __init__(self, folder: str, own_key: str) -> None:
        self._path = Path(folder) / FILE if folder else None
        self._key = own_key

    @property
    def is_kept(self) -> bool:
        """Tells whether there is a folder."""
        return self._path is not None

    def load(self, send: Send) -> State | None:
        """Reads the state that was saved last; None, with a note, where it is not this work's."""
        if self._path is None or not self._path.exists():
            return None
        try:
            found: State = torch.load(self._path, map_location="cpu", weights_only=True)
            own, state = found["key"], found["state"]
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, LookupError, TypeError):
            send(Note("warning", "the checkpoint cannot be read: training starts anew"))
            return None
        if own != self._key:
            text = "the checkpoint is of other settings or other data: training starts anew"
            send(Note("warning", text))
            return None
        loaded: State = state
        return loaded

    def save(self, state: State, send: Send) -> None:
        """Replaces the checkpoint; returns when it would survive a loss of power.

        Where it cannot be written a note says so: training is worth more than its safety.
        """
        try:
            self._save(state)
        except (OSError, RuntimeError) as error:  # torch says a full disk as a RuntimeError
            text = f"no checkpoint could be written ({error}): cut off, the job would start anew"
            send(Note("warning", text))

    def _save(self, state: State) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # One name: what a kill left half-written is written over.
        half = self._path.with_suffix(".half")
        with liveness.waiting(_FLUSH_S), half.open("wb") as file:
            torch.save({"key": self._key, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        failpoints.reach("trainer.checkpointing")
        half.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        failpoints.reach("trainer.checkpointed")


def draws(device: torch.device) -> State:
    """Returns where torch's random draws are."""
    state = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    return state


def draw_on(state: State, device: torch.device) -> None:
    """Goes on with torch's random draws where `draws` found them."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], device)
