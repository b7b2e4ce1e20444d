"""Settles which parameters move, and how fast: freezing, rates by stage, the schedule."""

import math
from typing import Any

from torch import nn

from trainer.backbones import Backbone
from trainer.recipes import Settings

_STEP_EPOCHS, _STEP_FACTOR = 7, 0.1
_OBJECTIVE_RATE = 3.0
"""Of the objective's own parameters over the head's: they start from nothing."""


def freeze(backbone: Backbone, recipe: Settings) -> list[nn.Module]:
    """Switches gradients off; returns the modules that stay in evaluation mode."""
    frozen: list[nn.Module] = []
    if recipe.train_from_stage:
        frozen += backbone.frozen_modules(recipe.train_from_stage)
    if recipe.freeze_batch_norm:
        frozen += [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def train_mode(network: nn.Module, frozen: list[nn.Module]) -> None:
    """Puts all but the frozen into training mode."""
    network.train()
    for module in frozen:
        module.eval()


def groups(
    backbone: Backbone, classifier: nn.Module, objective: nn.Module, recipe: Settings
) -> list[dict[str, Any]]:
    """Returns the optimiser's groups; `factor` is of a group's rate over the head's.

    Early stages move least (Howard and Ruder 2018, discriminative fine-tuning);
    the penalty is for what multiplies, not for biases and scales.
    """
    count = len(backbone.stages)
    rated: list[tuple[float, list[nn.Module]]] = [
        (recipe.first_stage_rate ** ((count - i) / count), modules)
        for i, modules in enumerate(backbone.stages.values())
    ]
    rated += [(1.0, [classifier]), (_OBJECTIVE_RATE, [objective])]
    found: list[dict[str, Any]] = []
    for factor, modules in rated:
        moving = [p for m in modules for p in m.parameters() if p.requires_grad]
        for is_weight in (True, False):
            own = [p for p in moving if (p.ndim > 1) == is_weight]
            if own:
                decay = recipe.weight_decay if is_weight else 0.0
                found.append({"params": own, "weight_decay": decay, "factor": factor})
    return found


def part_of_rate(recipe: Settings, epochs_done: float, epochs: int) -> float:
    """Returns the part of the highest learning rate that the schedule leaves, 0 to 1."""
    if recipe.schedule == "step":
        return _STEP_FACTOR ** (int(epochs_done) // _STEP_EPOCHS)
    warm_up = min(1.0, epochs / 5)
    if epochs_done < warm_up:
        return 0.1 + 0.9 * epochs_done / warm_up
    left = (epochs_done - warm_up) / max(epochs - warm_up, 1e-9)
    return 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))
