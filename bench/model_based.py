"""How fast all layers of a network train, beside the classic loops and beside bare compute.

    python -m bench.model_based FOLDER [--backbone resnet18] [--weights random] [--rounds 3]
        [--epochs 2] [--threads 0]

FOLDER holds images in a folder per class, or `train/` and `val/`. Each round, in
this order: epochs of the classic recipe (batch 4, fp32) as people write it with
torchvision (ImageFolder, DataLoader with a worker a core), of the same in our loop,
of the recipe `auto` through all layers, and a bare loop of forward, backward and optimiser
on one made-up batch of the same precision and size. Prints images a second, then the ratios
of each round's own: what else runs on the machine slows all three alike. The statistics of
BatchNorm stay as they are, as those of a pretrained network would.
"""

import argparse
import copy
import math
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from bench.running import spread
from service import backbones as registry
from service.contract import EpochEnded, ImageSource, JobSpec, ModelBased, Record
from service.engine.head import Head
from service.ops.cpus import available_cores
from trainer import backbones, compute, data
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
    backbone: Backbone, classes: int, precision: str, size: int, steps: int, where: str = "auto"
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


def plain(folder: Path, classes: int, name: str, epochs: int) -> float:
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
    network = models.get_model(name, weights=None, num_classes=classes).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    rates = []
    for _ in range(epochs):
        began, seen = time.perf_counter(), 0
        for images, targets in loader:
            loss = functional.cross_entropy(network(images), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += len(targets)
        rates.append(seen / (time.perf_counter() - began))
    return max(rates)


def main() -> None:
    """Prints each round, then median and range of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or available_cores())
    found = data.load(arguments.folder.resolve(), arguments.threads)
    first = backbones.load(arguments.backbone, arguments.weights, 0, Path(tempfile.gettempdir()))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"{arguments.backbone}, {len(found.train)} images, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}"
    )
    over: dict[str, list[float]] = {"plain": [], "classic": [], "bare": []}
    with tempfile.TemporaryDirectory() as out:
        for turn in range(arguments.rounds):
            rates = {"plain": math.nan}
            if arguments.backbone.startswith("resnet"):
                count = len(found.classes)
                rates["plain"] = plain(
                    arguments.folder, count, arguments.backbone, arguments.epochs
                )
            used: Hyperparameters = {}
            precision = ""
            for recipe in (
                ModelBased(recipe="classic", epochs=arguments.epochs),
                ModelBased(epochs=arguments.epochs, train_from_stage=first.stage_names[0]),
            ):
                spec = JobSpec(
                    job_id="bench",
                    model="bench",
                    data=ImageSource(folder=str(arguments.folder.resolve())),
                    out_dir=out,
                    method=recipe,
                    weights_dir=out,
                    threads=arguments.threads,
                )
                network = copy.deepcopy(first)
                rates[recipe.recipe], used, precision = trained(spec, recipe, found, network)
            size = int(used["batch_size"] or 0)
            steps = max(1, len(found.train) // size)
            rates["bare"] = bare(copy.deepcopy(first), len(found.classes), precision, size, steps)
            for other, ratios in over.items():
                ratios.append(rates["auto"] / rates[other])
            print(
                f"round {turn + 1}: torchvision's {rates['plain']:.1f}, classic "
                f"{rates['classic']:.1f}, modern {rates['auto']:.1f} ({precision}, batch {size}), "
                f"bare {rates['bare']:.1f} images/s",
                flush=True,
            )
    for name, ratios in over.items():
        print(f"modern over {name}: {spread(ratios, '.2f')}, n = {len(ratios)}")


if __name__ == "__main__":
    main()
