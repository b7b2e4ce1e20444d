"""Loops of training to hold ours against: bare compute, and torchvision's as people write it.

Of `bench.gpu`. The statistics of BatchNorm stay as they are in the bare loop, as those of a
pretrained network would.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from service import backbones as registry
from service.contract import EpochEnded, JobSpec, ModelBased, Record
from service.engine.head import Head
from service.ops.cpus import available_cores
from trainer import compute
from trainer.backbones import Backbone
from trainer.data import Data
from trainer.methods import model_based
from trainer.methods.model_based import Hyperparameters


def trained(
    spec: JobSpec, recipe: ModelBased, found: Data, backbone: Backbone
) -> tuple[float, Hyperparameters, str]:
    """Images a second of the fastest epoch, hyperparameters and precision."""
    rates: list[float] = []

    def hear(record: Record) -> None:
        if isinstance(record, EpochEnded):
            rates.append(record.images_per_second)

    def head() -> Head:
        weight = torch.zeros(len(found.classes), backbone.feature_dim).numpy()
        return Head(weight, weight[:, 0].copy(), found.classes)

    nothing = found.train.take(np.empty(0, np.int64))
    _, used, _, precision = model_based.train(
        spec, recipe, found.train, nothing, found.classes, backbone, head, None, hear
    )
    return max(rates), used, precision


def bare(
    backbone: Backbone, classes: int, precision: str, size: int, steps: int, where: str
) -> float:
    """Images a second of the fastest step on one batch that is already there."""
    network = nn.Sequential(backbone, nn.Linear(backbone.feature_dim, classes))
    device = compute.choose_device(where)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    moving = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-3, fused=True)
    shape = (size, backbone.size, backbone.size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    targets = torch.randint(0, classes, (size,), device=device)
    context = compute.autocast(precision, device)
    times = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        with context():
            logits = network(images).float()
        loss = functional.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    # As an epoch is: all its steps, not the luckiest one.
    return size * steps / math.fsum(times[1:])


def plain(folder: Path, classes: int, name: str, epochs: int, where: str) -> float:
    """Images a second of the fastest epoch of the well-known loop, as it is usually written."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    row = registry.BACKBONES[name]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(row.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(row.mean, row.std),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(root, transform),
        batch_size=4,
        shuffle=True,
        num_workers=available_cores(),
        persistent_workers=True,
    )
    device = compute.choose_device(where)
    network = models.get_model(name, weights=None, num_classes=classes).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    rates = []
    for _ in range(epochs):
        began, seen = time.perf_counter(), 0
        for images, targets in loader:
            loss = functional.cross_entropy(network(images.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += len(targets)
        rates.append(seen / (time.perf_counter() - began))
    return max(rates)
