"""A backbone of a few thousand weights: a step takes milliseconds."""

import torch
from torch import nn

from trainer.backbones import HALF, Backbone


def small_backbone(seed: int = 0) -> Backbone:
    """Two stages, `stem` with a BatchNorm and `top`, and 16 features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Sequential(nn.Conv2d(3, 8, 7, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        top = nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.ReLU())
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        trunk = nn.Sequential(stem, top, pooled)
    return Backbone(trunk, {"stem": [stem], "top": [top]}, 16, HALF, HALF)
