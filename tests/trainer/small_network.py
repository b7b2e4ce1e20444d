"""A backbone of a few thousand weights, and images for it: a step takes milliseconds."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from service.ingest.packs import Location
from trainer.backbones import Backbone
from trainer.data import Part

HALF = (0.5, 0.5, 0.5)


def small_backbone(seed: int = 0, tuned_from: str = "top", taps: tuple[str, ...] = ()) -> Backbone:
    """Makes `stem` and `top` with a BatchNorm each, and 16 features; tunes `top`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Conv2d(3, 8, 7, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        top = nn.Sequential(nn.Conv2d(8, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        trunk = nn.Sequential(stem, top, pooled)
    return Backbone(
        trunk, {"stem": [stem], "top": [top]}, 16, HALF, HALF, taps=taps, tuned_from=tuned_from
    )


def parts_of(folder: Path, held_out: int = 0) -> tuple[Part, Part, tuple[str, ...]]:
    """Images to learn from and the last `held_out` of each class, and the classes."""
    classes = tuple(sorted(path.name for path in folder.iterdir()))
    learned: list[tuple[Path, int]] = []
    held: list[tuple[Path, int]] = []
    for target, label in enumerate(classes):
        images = [(path, target) for path in sorted((folder / label).iterdir())]
        cut = len(images) - held_out
        learned += images[:cut]
        held += images[cut:]
    return _part(learned), _part(held), classes


def _part(images: list[tuple[Path, int]]) -> Part:
    return Part(
        tuple(Location(path) for path, _ in images),
        tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path, _ in images),
        np.array([target for _, target in images], dtype=np.int64),
    )
