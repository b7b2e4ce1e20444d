"""Model-based transfer: training starts from the pretrained weights and goes on.

One loop, read top to bottom. The best epoch is kept: the highest validation
accuracy, and among equals the lowest validation loss.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from service.errors import GraftError, Reason
from service.inference.head import Head
from service.jobs.contract import EpochEnded, JobSpec, ModelBased, Note, Progressed
from trainer import compute
from trainer.backbones import Backbone
from trainer.data import Data, Part
from trainer.pictures import Pictures
from trainer.recipes import Settings, settings
from trainer.records import Send

_EVALUATION_BATCH = 32
_STEP_EPOCHS, _STEP_FACTOR = 7, 0.1
_BUDGET_PART = 0.85
"""Of the time budget that epochs may take; export, check and report need the rest."""
_PROGRESS_S = 0.5

Hyperparameters = dict[str, float | int | str | bool | None]


def train(
    spec: JobSpec,
    method: ModelBased,
    data: Data,
    backbone: Backbone,
    first_head: Callable[[], Head],
    deadline: float | None,
    send: Send,
) -> tuple[Head, Hyperparameters, str, str]:
    """Trains the backbone in place; returns the head, hyperparameters, device and precision.

    `first_head` fits a feature-based head, where the recipe begins with one.
    `deadline` is a `time.monotonic()`; epochs are planned to end before it.
    Raises GraftError with TRAINING_FAILED when the loss is no number any more.
    """
    recipe = settings(method)
    device = compute.choose_device(spec.device)
    torch.manual_seed(spec.seed)

    classifier = nn.Linear(backbone.feature_dim, len(data.classes))
    if recipe.fitted_head:
        fitted = first_head()
        with torch.no_grad():
            classifier.weight.copy_(torch.from_numpy(fitted.weight / fitted.temperature))
            classifier.bias.copy_(torch.from_numpy(fitted.bias / fitted.temperature))
    network = nn.Sequential(backbone, classifier)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    precision, why = compute.choose_precision(method, device, network, recipe.batch_size)
    send(Note("info", f"training on {device.type} in {precision}: {why}"))
    autocast = compute.autocast(precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    frozen = _freeze(backbone, recipe)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        trained,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )

    pictures = Pictures(data.train, spec.seed, spec.threads)
    steps_an_epoch = max(1, math.ceil(len(data.train) / recipe.batch_size))
    epochs = recipe.epochs
    best: tuple[float, float] = (-1.0, -math.inf)
    best_state: dict[str, torch.Tensor] = {}
    best_epoch = 0
    began = time.monotonic()
    last_progress = began
    try:
        epoch = 0
        while epoch < epochs:
            epoch += 1
            _train_mode(network, frozen)
            epoch_began = time.monotonic()
            loss_sum, right, seen = 0.0, 0, 0
            for step, (batch, targets) in enumerate(pictures.batches(epoch, recipe.batch_size)):
                rate = _learning_rate(recipe, epoch - 1 + step / steps_an_epoch, epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch, targets = batch.to(device), targets.to(device)  # noqa: PLW2901
                with autocast():
                    logits = network(batch)
                    loss = functional.cross_entropy(
                        logits.float(), targets, label_smoothing=recipe.label_smoothing
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
                loss_sum += loss.item() * len(targets)
                right += int((logits.argmax(dim=1) == targets).sum())
                seen += len(targets)
                if (now := time.monotonic()) - last_progress > _PROGRESS_S:
                    last_progress = now
                    done = (epoch - 1 + seen / len(data.train)) / epochs
                    send(Progressed("training", min(done, 1.0), f"epoch {epoch} of {epochs}"))
                if deadline is not None and now > deadline and best_epoch:
                    break
            train_s = time.monotonic() - epoch_began
            if not math.isfinite(loss_sum):
                raise GraftError(
                    Reason.TRAINING_FAILED,
                    f"the training loss became {loss_sum} in epoch {epoch}: ask for a lower "
                    f"learning rate than {recipe.learning_rate:g}, or for precision fp32",
                )
            validation_loss, accuracy = _evaluate(network, data.validation, device)
            if (accuracy, -validation_loss) > best:
                best, best_epoch = (accuracy, -validation_loss), epoch
                best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}

            epoch_s = (time.monotonic() - began) / epoch
            if deadline is not None:
                room = int((deadline - time.monotonic()) / epoch_s)
                if epoch + room < epochs:
                    epochs = epoch + max(0, room)
                    send(Note("warning", f"the time budget has room for {epochs} epochs"))
            if _is_tired(recipe, epoch, best_epoch):
                epochs = epoch
            send(
                EpochEnded(
                    epoch=epoch,
                    epochs=epochs,
                    train_loss=loss_sum / seen,
                    train_accuracy=right / seen,
                    validation_loss=validation_loss,
                    validation_accuracy=accuracy,
                    images_per_second=seen / train_s,
                    eta_s=epoch_s * (epochs - epoch),
                    learning_rate=rate,
                )
            )
    finally:
        pictures.close()

    network.load_state_dict(best_state)
    network.to("cpu", torch.float32).eval()
    head = Head(
        weight=classifier.weight.detach().numpy().astype(np.float32),
        bias=classifier.bias.detach().numpy().astype(np.float32),
        classes=data.classes,
    )
    used: Hyperparameters = {k: v for k, v in asdict(recipe).items() if k != "recipe"}
    used |= {"epochs": epoch, "epochs_planned": recipe.epochs, "best_epoch": best_epoch}
    return head, used, device.type, precision


def _freeze(backbone: Backbone, recipe: Settings) -> list[nn.Module]:
    """Switches gradients off; returns the modules that stay in evaluation mode."""
    frozen: list[nn.Module] = []
    if recipe.train_from_stage:
        frozen += backbone.frozen_modules(recipe.train_from_stage)
    if recipe.freeze_batch_norm:
        frozen += [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _train_mode(network: nn.Module, frozen: list[nn.Module]) -> None:
    network.train()
    for module in frozen:
        module.eval()


def _learning_rate(recipe: Settings, epochs_done: float, epochs: int) -> float:
    if recipe.schedule == "step":
        return recipe.learning_rate * _STEP_FACTOR ** (int(epochs_done) // _STEP_EPOCHS)
    warm_up = min(1.0, epochs / 5)
    if epochs_done < warm_up:
        return recipe.learning_rate * (0.1 + 0.9 * epochs_done / warm_up)
    left = (epochs_done - warm_up) / max(epochs - warm_up, 1e-9)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))


def _is_tired(recipe: Settings, epoch: int, best_epoch: int) -> bool:
    patience = recipe.early_stopping_patience
    return patience > 0 and epoch - best_epoch >= patience


def _evaluate(network: nn.Module, part: Part, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on pictures as served, in 32 bits as served.

    In bf16 the chosen epoch's accuracy was two pictures of 153 off what served.
    """
    network.eval()
    loss_sum, right = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(part), _EVALUATION_BATCH):
            end = start + _EVALUATION_BATCH
            targets = torch.from_numpy(part.targets[start:end]).to(device)
            logits = network(torch.from_numpy(part.pixels[start:end]).to(device))
            loss_sum += float(functional.cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(dim=1) == targets).sum())
    return loss_sum / len(part), right / len(part)


def training_deadline(started: float, budget_s: float | None) -> float | None:
    """When the epochs must have ended, as a `time.monotonic()`."""
    return None if budget_s is None else started + _BUDGET_PART * budget_s
