"""Model-based transfer: training starts from the pretrained weights and goes on.

The recipe `auto` trains the last stages alone, on what the frozen ones made of a few views
of each image once, beginning with a head that was fitted to frozen features; where a network
cannot be parted, or all of it is asked for, random views go through all layers. The classic
recipe is the yardstick that users know. Whole-network adaptation trains in the same loop.

Nothing is chosen here: the moving average of the weights after the last epoch is the result,
so that images which are not learned from measure it and no more.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from service.contract import EpochEnded, JobSpec, ModelBased, Note, Progressed
from service.engine.head import Head
from service.errors import Aborted, Reason
from service.ops import failpoints
from trainer import checkpoint, compute, crops, maps
from trainer.arrays import Ints
from trainer.backbones import Backbone
from trainer.checkpoint import Checkpoints, State
from trainer.data import Part
from trainer.folding import folded
from trainer.images import AsServed, Images, Inputs, Judged
from trainer.maps import Frozen, Maps
from trainer.memory import is_out_of_memory
from trainer.pace import Epochs
from trainer.recipes import (
    LEAST_BATCH,
    Settings,
    batch_sizes_for,
    freeze,
    optimizer,
    part_of_rate,
    rate_for,
)
from trainer.records import Send
from trainer.uploads import Uploads, link_to

_AVERAGES_AN_EPOCH = 8
"""An average after every step would take a thirtieth of its time."""
_PROGRESS_S = 0.5
_FORWARD_PART = 1 / 3
"""Of a step's time: backward takes twice as long as forward, about."""

_T = TypeVar("_T")
Hyperparameters = dict[str, float | int | str | bool | None]


class Outputs(NamedTuple):
    """Holds features float32 [n, d] and logits float32 [n, classes] of one domain's images."""

    features: Tensor
    logits: Tensor


class Objective(nn.Module):
    """Minimises the cross-entropy.

    One that adapts may have parameters of its own, which are trained along and not exported.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(
        self,
        source: Outputs,
        targets: Tensor,
        other: Outputs | None,  # noqa: ARG002 - for those that adapt
        done: float,  # noqa: ARG002
    ) -> Tensor:
        """Computes the loss of a batch; `done` is how much of training is, 0 to 1."""
        return functional.cross_entropy(
            source.logits, targets, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """Names what to train, on what, and towards what."""

    spec: JobSpec
    """Read for its seed, device and folders."""
    recipe: Settings
    classes: tuple[str, ...]
    backbone: Backbone
    body: nn.Module
    """What is trained of it and computes features from the inputs: all of it, or its tail."""
    inputs: Inputs
    targets: Ints
    """Classes of the inputs' images, int64 [n]."""
    judged: Judged
    judged_targets: Ints
    """Of images that are measured on after each epoch, for people alone; may be empty."""
    linear_probe: Callable[[], Head]
    """Fits a head to the last layer's frozen features."""
    objective: Objective
    others: Inputs | None = None
    """Images of a target domain, as many in a batch as of the inputs."""
    key: str
    """Of the checkpoint."""
    is_whole: bool = False
    """All epochs are needed: no time for them is an error, and cuts none."""


class Result(NamedTuple):
    """Names what training came to; the backbone was changed in place."""

    head: Head
    """At temperature 1: nothing that it did not learn from was looked at."""
    hyperparameters: Hyperparameters
    device: str
    precision: str


def train(
    spec: JobSpec,
    method: ModelBased,
    learned: Part,
    held_out: Part,
    classes: tuple[str, ...],
    backbone: Backbone,
    linear_probe: Callable[[], Head],
    deadline: float | None,
    send: Send,
) -> Result:
    """Trains the backbone in place, from the images of `learned` alone.

    `held_out` may be empty: it is measured after each epoch, and chooses nothing.
    `linear_probe` fits a head to the last layer's features. The rest as `run`.
    """
    recipe, split = maps.parted(method, backbone, spec, len(learned))
    drawn = crops.views(spec.augmentation, recipe.min_scale)
    folder = Path(spec.out_dir) if Path(spec.out_dir).is_dir() else None
    inputs: Images | Maps
    judged: AsServed | Maps
    if split is None:
        inputs = Images(learned, drawn, spec.seed, spec.threads, folder, 2, spec.device)
        judged = AsServed(held_out, spec.threads, caches=2)
    else:
        frozen = Frozen(split, spec)
        inputs = Maps(learned, frozen, drawn, spec.seed, spec.threads, folder, kinds=2)
        judged = Maps(held_out, frozen, None, spec.seed, spec.threads, folder, kinds=2)
    work = Work(
        spec=spec,
        recipe=recipe,
        classes=classes,
        backbone=backbone,
        body=backbone if split is None else split.tail,
        inputs=inputs,
        targets=learned.targets,
        judged=judged,
        judged_targets=held_out.targets,
        linear_probe=linear_probe,
        objective=Objective(recipe.label_smoothing),
        key=checkpoint.key(spec, method, recipe, learned),
    )
    try:
        result = run(work, deadline, send)
    finally:
        inputs.close()
        judged.close()
    return result._replace(hyperparameters=result.hyperparameters | asdict(drawn))


@dataclass
class _Standing:
    """Says how far training is; with the tensors it makes the checkpoint."""

    precision: str = ""
    batch_size: int = 0
    epochs: int = 0
    epoch: int = 0
    spent_s: float = 0.0


def run(work: Work, deadline: float | None, send: Send) -> Result:
    """Trains the backbone in place; epochs are planned to end before `deadline`.

    Goes on from a checkpoint of the same work, whose epochs are told again. Raises GraftError
    with TRAINING_FAILED when the loss is not a number any more, and OutOfTimeError where
    `work.is_whole` and the deadline, a `time.monotonic()`, has no room.
    """
    return _Training(work, deadline, send).run()


class _Training:
    def __init__(self, work: Work, deadline: float | None, send: Send) -> None:
        self.work, self.recipe, self.send = work, work.recipe, send
        self.domains = 1 if work.others is None else 2
        self.time = Epochs(deadline, time.monotonic(), is_whole=work.is_whole)
        self.device = compute.choose_device(work.spec.device)
        self.uploads, self.other_uploads = (Uploads(link_to(self.device)) for _ in range(2))
        torch.manual_seed(work.spec.seed)
        self.classifier = nn.Linear(work.backbone.feature_dim, len(work.classes))
        self.network = nn.Sequential(work.body, self.classifier)
        key = f"{work.key} {self.device.type} {' '.join(_Standing.__dataclass_fields__)}"
        self.checkpoints = Checkpoints(work.spec.checkpoint_dir, key)
        self.at = _Standing()
        self.told: list[EpochEnded] = []
        self.averaged: AveragedModel | None = None

    def run(self) -> Result:
        """Begins or goes on, trains, and hands the average back."""
        found = self.checkpoints.load(self.send)
        self._begin(found)
        if found is not None:
            self._restore(found)
        if not self.at.epoch:
            self._plan()
        while self.at.epoch < self.at.epochs:
            self._epoch()
        self.send(self.time.ended(self.at.epoch))
        return self._ended()

    def _begin(self, found: State | None) -> None:
        """Makes everything that a step needs."""
        work, recipe, at, send = self.work, self.recipe, self.at, self.send
        self.frozen = freeze(work.backbone, recipe)
        if found is not None:
            self.at = at = _Standing(**found["standing"])
            self.time.go_on(at.spent_s)
        else:
            at.epochs = recipe.epochs
            if recipe.start_from_linear_probe:
                fitted = work.linear_probe()
                with torch.no_grad():
                    weight, bias = (
                        fitted.matrix / fitted.temperature,
                        fitted.bias / fitted.temperature,
                    )
                    self.classifier.weight.copy_(torch.from_numpy(weight))
                    self.classifier.bias.copy_(torch.from_numpy(bias))
        detail = "views through the frozen stages"
        work.inputs.prepare(lambda done: send(Progressed("preparing", 0.4 + 0.2 * done, detail)))
        work.judged.prepare(lambda _: None)
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        work.objective.to(self.device)
        self._train_mode()
        fast = folded(work.body) if recipe.batch_norm != "learned" else None
        self.fast = work.body if fast is None else fast
        """The body as it runs in training: the same parameters, faster where it can be."""
        self.probed = nn.Sequential(self.fast, self.classifier)
        if found is None:
            send(Progressed("preparing", 0.6, "measuring what trains fastest here"))
            at.precision, why = compute.choose_precision(
                recipe.precision, self.device, self.probed, work.inputs.blank(compute.PROBE_BATCH)
            )
            send(Note("info", f"training on {self.device.type} in {at.precision}: {why}"))
            at.batch_size = recipe.batch_size or self._fastest_batch()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=at.precision == "fp16")
        self.autocast = compute.autocast(at.precision, self.device)
        self.optimizer = optimizer(work.backbone, self.classifier, work.objective, recipe)
        if recipe.ema_epochs:
            self.averaged = AveragedModel(self.network, use_buffers=True)
            self.averaged.requires_grad_(False)
            # The first one copies: the average begins where training does.
            self.averaged.update_parameters(self.network)
        self._size()

    def _train_mode(self) -> None:
        """Puts all but the frozen into training mode."""
        self.network.train()
        for module in self.frozen:
            module.eval()

    def _size(self) -> None:
        """Settles what goes by the batch size."""
        size = self.at.batch_size
        self.steps = self.time.steps = self.work.inputs.steps(size)
        self.highest_rate = rate_for(self.recipe, size)
        self.average_every = max(1, self.steps // _AVERAGES_AN_EPOCH)
        if self.averaged is not None:
            decay = math.exp(-self.average_every / (self.steps * self.recipe.ema_epochs))
            self.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def _fastest_batch(self) -> int:
        sizes = batch_sizes_for(len(self.work.targets), self.device.type)
        size = sizes[0] if len(sizes) == 1 else compute.largest_batch(sizes, self._step_s)
        how = "".join(f"; {name} {value}" for name, value in compute.describe(self.device).items())
        self.send(Note("info", f"batches have {size} images{how}"))
        return size

    def _step_s(self, size: int) -> float:
        batch = self.work.inputs.blank(self.domains * size)
        return compute.step_s(self.at.precision, self.device, self.probed, batch)

    def _plan(self) -> None:
        """Plans as many epochs as the time budget has room for, from a measured step."""
        at, timing = self.at, self.time
        if timing.deadline is None:
            return
        self.send(Progressed("preparing", 0.9, "measuring a step"))

        timing.step_s = self._within_memory(lambda: self._step_s(at.batch_size))
        image_s = timing.step_s / (self.domains * at.batch_size)
        timing.judging_s = len(self.work.judged_targets) * image_s * _FORWARD_PART
        epoch_s, now = self.steps * timing.step_s + timing.judging_s, time.monotonic()
        room = timing.room(0, at.epochs, epoch_s, now)
        has = f"has room for {room}"
        if timing.deadline - now < epoch_s:
            has = "has none for it, and one is trained"
        text = (
            f"an epoch takes about {epoch_s:.1f} s: the time budget {has}, {at.epochs} are planned"
        )
        self.send(Note("warning" if room < at.epochs else "info", text))
        at.epochs = room

    def _epoch(self) -> None:
        """Trains through all images once, measures, and keeps a checkpoint."""
        at = self.at
        at.epoch += 1
        failpoints.reach("trainer.training")
        epoch_began = time.monotonic()
        self._tell(0, f"epoch {at.epoch} of {at.epochs}")
        loss, accuracy, seen, rate = self._within_memory(self._learn)
        train_s = time.monotonic() - epoch_began
        if not math.isfinite(loss):
            raise Aborted(
                Reason.TRAINING_FAILED,
                f"the training loss became {loss} in epoch {at.epoch}: ask for a lower "
                f"learning rate than {self.highest_rate:g}, or for precision fp32",
            )
        self._tell(self.steps, f"epoch {at.epoch} of {at.epochs}: measuring")
        held_out_loss, held_out_accuracy = self._judge()
        now = time.monotonic()
        at.spent_s = self.time.spent_s(now)
        epoch_s = now - epoch_began
        self.time.step_s, self.time.judging_s = train_s / self.steps, epoch_s - train_s
        if at.epoch < at.epochs:
            room = self.time.room(at.epoch, at.epochs, epoch_s, now)
            if room < at.epochs:
                at.epochs = room
                self.send(Note("warning", f"the time budget has room for {room} epochs"))
        ended = EpochEnded(
            epoch=at.epoch,
            epochs=at.epochs,
            train_loss=loss,
            train_accuracy=accuracy,
            validation_loss=held_out_loss,
            validation_accuracy=held_out_accuracy,
            images_per_second=seen / train_s,
            eta_s=epoch_s * (at.epochs - at.epoch),
            learning_rate=rate,
        )
        self.told.append(ended)
        # Kept before it is told: whoever hears of an epoch can rely on it.
        self._save()
        self.send(ended)

    def _learn(self) -> tuple[float, float, int, float]:
        """Makes one pass; the mean loss and accuracy, how many images, the last rate."""
        at, size, work = self.at, self.at.batch_size, self.work
        self.time.begin()
        self._train_mode()
        targets_of = torch.from_numpy(work.targets)
        sums = torch.zeros(2, device=self.device)
        others = None
        if work.others is not None:
            drawn = ((b,) for b, _ in work.others.batches(at.epoch, size, self.steps))
            others = self.other_uploads.moved(drawn)
        batches = self.uploads.moved(
            (batch, targets_of[places]) for batch, places in work.inputs.batches(at.epoch, size)
        )
        seen, last_progress, rate = 0, time.monotonic(), 0.0
        for step, (batch, targets) in enumerate(batches):
            passed = at.epoch - 1 + step / self.steps
            rate = self.highest_rate * part_of_rate(self.recipe, passed, at.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            shown = batch if others is None else torch.cat([batch, next(others)[0]])
            with self.autocast():
                features = self.fast(compute.as_input(shown))
                logits = self.classifier(features).float()
            features, n = features.float(), len(targets)
            other = None if others is None else Outputs(features[n:], logits[n:])
            loss = work.objective(
                Outputs(features[:n], logits[:n]), targets, other, passed / at.epochs
            )
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.averaged is not None and (step + 1) % self.average_every == 0:
                self.averaged.update_parameters(self.network)
            with torch.no_grad():
                # Read once an epoch: a GPU would stop at every step to answer.
                sums[0] += loss * n
                sums[1] += (logits[:n].argmax(dim=1) == targets).sum()
            seen += n
            if (now := time.monotonic()) - last_progress > _PROGRESS_S:
                last_progress = now
                self.time.reached(step + 1)
                self._tell(step + 1, f"epoch {at.epoch} of {at.epochs}")
            if self.time.deadline is not None and now > self.time.deadline:
                break
        loss_sum, right = sums.tolist()
        return loss_sum / seen, right / seen, seen, rate

    @property
    def _result(self) -> nn.Module:
        """The outcome so far: the moving average, where there is one."""
        # Younger than it reaches back, the average is for a good part what training began with.
        if self.averaged is not None and self.at.epoch > self.recipe.ema_epochs:
            module: nn.Module = self.averaged.module
            return module
        return self.network

    def _judge(self) -> tuple[float | None, float | None]:
        """Measures loss and accuracy on the held-out images, if there are any."""
        targets = torch.from_numpy(self.work.judged_targets)
        if not len(targets):
            return None, None
        logits = self.work.judged.outputs(self._result, self.device)
        loss = float(functional.cross_entropy(logits, targets))
        return loss, float((logits.argmax(dim=1) == targets).double().mean())

    def _ended(self) -> Result:
        at, recipe = self.at, self.recipe
        is_average = self._result is not self.network
        self.network.load_state_dict(self._result.state_dict())
        self.network.to("cpu", torch.float32).eval()
        # Features of middle layers are a frozen head's to take.
        self.work.backbone.taps = ()
        head = Head(
            self.classifier.weight.detach().numpy().astype(np.float32),
            self.classifier.bias.detach().numpy().astype(np.float32),
            self.work.classes,
        )
        used: Hyperparameters = asdict(recipe)
        del used["recipe"], used["precision"], used["min_scale"]
        used |= {"batch_size": at.batch_size, "learning_rate": self.highest_rate}
        used |= {"epochs": at.epoch, "epochs_planned": recipe.epochs}
        used["kept_weights"] = "moving average" if is_average else "last step"
        used |= compute.describe(self.device)
        return Result(head, used, self.device.type, at.precision)

    def _within_memory(self, act: Callable[[], _T]) -> _T:
        """Runs `act`; halves the batches where memory is exhausted by the rule's size."""
        at = self.at
        while True:
            try:
                return act()
            except Exception as error:
                may_shrink = self.recipe.batch_size is None and at.batch_size > LEAST_BATCH
                if not (may_shrink and is_out_of_memory(error)):
                    raise
            # Outside of the handler, whose error holds on to what was computed.
            at.batch_size = max(LEAST_BATCH, at.batch_size // 2)
            self.optimizer.zero_grad(set_to_none=True)
            compute.free_memory()
            text = f"memory is exhausted: batches have {at.batch_size} images from now on"
            self.send(Note("warning", text))
            self._size()

    def _tell(self, step: int, detail: str) -> None:
        """Says how far training is: `step` steps of the current epoch are done."""
        at, now = self.at, time.monotonic()
        self.send(self.time.progress(at.epoch, at.epochs, step, detail, now))

    def _parts(self) -> dict[str, Any]:
        """Returns what has a state: with where training stands it is the checkpoint."""
        parts = {
            "network": self.network,
            "objective": self.work.objective,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        return parts if self.averaged is None else parts | {"averaged": self.averaged}

    def _save(self) -> None:
        if self.checkpoints.is_kept:
            told = [msgspec.to_builtins(record) for record in self.told]
            state: State = {"standing": asdict(self.at), "told": told}
            state |= {name: part.state_dict() for name, part in self._parts().items()}
            self.checkpoints.save(state | checkpoint.draws(self.device), self.send)

    def _restore(self, found: State) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(found[name])
        checkpoint.draw_on(found, self.device)
        self.send(Note("info", f"training goes on after epoch {self.at.epoch}, from a checkpoint"))
        for told in found["told"]:
            record = msgspec.convert(told, EpochEnded)
            self.told.append(record)
            self.send(record)
