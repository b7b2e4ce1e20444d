"""The one training loop: of model-based transfer and of whole-network adaptation.

Nothing is chosen here: the moving average of the weights after the last epoch is the
result, so that images which are not learned from measure it and no more. What is
minimised is the objective's; the rest, with the checkpoint after each epoch, the loop's.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from service import faults
from service.errors import GraftError, Reason
from service.inference.head import Head
from service.jobs.contract import EpochEnded, JobSpec, Note, Progressed
from trainer import compute
from trainer.backbones import Backbone
from trainer.checkpoint import Checkpoints, State
from trainer.data import Files, Part
from trainer.folding import folded
from trainer.images import AsServed, Images
from trainer.memory import is_out_of_memory
from trainer.methods import tuning
from trainer.pace import Pace
from trainer.recipes import LEAST_BATCH, Settings, batch_size_for, rate_for
from trainer.records import Send

_AVERAGES_AN_EPOCH = 8
"""An average after every step would take a thirtieth of its time."""
_PROGRESS_S = 0.5
_FORWARD_PART = 1 / 3
"""Of a step's time: backward takes twice as long as forward, about."""
_BEFORE_THE_END = 0.999
_OTHER_SEED = 0x7A26

_T = TypeVar("_T")
Hyperparameters = dict[str, float | int | str | bool | None]


class Result(NamedTuple):
    """Names what training came to; the backbone was changed in place."""

    head: Head
    """At temperature 1: nothing that it did not learn from was looked at."""
    hyperparameters: Hyperparameters
    device: str
    precision: str


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


class OutOfTimeError(Exception):
    """Raised where all epochs were asked for, and the deadline has no room for them."""

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"{needed_s:.0f} s are needed")
        self.needed_s = needed_s
        """Of all epochs, what was spent already included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """Names what to train, on what, and towards what."""

    spec: JobSpec
    """Read for its seed, device, threads and folders."""
    recipe: Settings
    classes: tuple[str, ...]
    learned: Part
    held_out: Part
    """Measured after each epoch, for people alone; may be empty."""
    backbone: Backbone
    first_head: Callable[[], Head]
    objective: Objective
    other: Files | None = None
    """Images of a target domain, as many in a batch as there are of `learned`."""
    key: str
    """Of the checkpoint."""
    is_whole: bool = False
    """All epochs are needed: no time for them is an error, and cuts none."""


@dataclass
class _Standing:
    """Says how far training is; with the tensors it makes the checkpoint."""

    precision: str = ""
    batch_size: int = 0
    epochs: int = 0
    epoch: int = 0
    spent_s: float = 0.0


def run(work: Work, deadline: float | None, send: Send) -> Result:
    """Trains the backbone in place.

    `deadline` is a `time.monotonic()`; epochs are planned to end before it.
    Goes on from a checkpoint of the same work, whose epochs are told again.
    Raises GraftError with TRAINING_FAILED when the loss is no number any more, and
    OutOfTimeError where `work.is_whole` and the deadline has no room.
    """
    loop = _Loop(work, deadline, send)
    try:
        return loop.run()
    finally:
        loop.close()


class _Loop:
    def __init__(self, work: Work, deadline: float | None, send: Send) -> None:
        spec, self.recipe = work.spec, work.recipe
        self.work, self.send, self.deadline = work, send, deadline
        self.domains = 1 if work.other is None else 2
        self.began = time.monotonic()
        self.device = compute.choose_device(spec.device)
        torch.manual_seed(spec.seed)
        self.backbone = work.backbone
        self.classifier = nn.Linear(work.backbone.feature_dim, len(work.classes))
        self.network = nn.Sequential(work.backbone, self.classifier)
        self.frozen = tuning.freeze(work.backbone, self.recipe)
        self.told: list[EpochEnded] = []
        self.pace, self.fraction = Pace(), 0.0
        self.step_s: float | None = None
        """Seconds a step of the last epoch; before the first, as planned."""
        self.judging_s = 0.0
        """Seconds that measuring takes in an epoch."""
        self.checkpoints = Checkpoints(spec.checkpoint_dir, f"{work.key} {self.device.type}")
        found = self.checkpoints.load(send)
        if found is not None:
            self.at = _Standing(**found["standing"])
            self.network.load_state_dict(found["network"])
        else:
            self.at = _Standing(
                epochs=self.recipe.epochs,
                batch_size=self.recipe.batch_size
                or batch_size_for(len(work.learned), self.device.type),
            )
            if self.recipe.fitted_head:
                self._take_fitted_head()
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        work.objective.to(self.device)
        tuning.train_mode(self.network, self.frozen)
        self.fast = self._folded()
        if found is None:
            self._choose_precision()
        self.spent_before_s = self.at.spent_s
        if deadline is not None:
            self.deadline = deadline - self.spent_before_s

        folder = Path(spec.out_dir) if Path(spec.out_dir).is_dir() else None
        caches = 1 + self.domains
        self.images = Images(work.learned, spec.seed, spec.threads, folder, caches)
        self.others: Images | None = None
        if work.other is not None:
            seed = spec.seed ^ _OTHER_SEED
            self.others = Images(work.other, seed, spec.threads, folder, caches)
        self.held_out = AsServed(work.held_out, spec.threads, caches)
        self.send(Progressed("preparing", 0.7, "what training begins with"))
        self._prepare()
        if found is not None:
            self._restore(found)

    def run(self) -> Result:
        at, recipe = self.at, self.recipe
        if not at.epoch:
            self._plan()
        while at.epoch < at.epochs:
            self._epoch()
        self._tell(self.steps, f"{at.epoch} epochs are done", is_end=True)
        is_average = self._result is not self.network
        self.network.load_state_dict(self._result.state_dict())
        self.network.to("cpu", torch.float32).eval()
        head = Head(
            weight=self.classifier.weight.detach().numpy().astype(np.float32),
            bias=self.classifier.bias.detach().numpy().astype(np.float32),
            classes=self.work.classes,
        )
        used: Hyperparameters = asdict(recipe)
        del used["recipe"], used["precision"]
        used |= {"batch_size": at.batch_size, "learning_rate": self.highest_rate}
        used |= {"epochs": at.epoch, "epochs_planned": recipe.epochs}
        used |= {"kept_weights": "moving average" if is_average else "last step"}
        return Result(head, used, self.device.type, at.precision)

    def close(self) -> None:
        self.images.close()
        if self.others is not None:
            self.others.close()

    @property
    def _result(self) -> nn.Module:
        """The outcome so far: the moving average, where there is one."""
        # Younger than it reaches back, the average is for a good part what training began with.
        if self.averaged is not None and self.at.epoch > self.recipe.averaged_epochs:
            module: nn.Module = self.averaged.module
            return module
        return self.network

    def _take_fitted_head(self) -> None:
        fitted = self.work.first_head()
        with torch.no_grad():
            self.classifier.weight.copy_(torch.from_numpy(fitted.weight / fitted.temperature))
            self.classifier.bias.copy_(torch.from_numpy(fitted.bias / fitted.temperature))

    def _folded(self) -> Backbone:
        """The backbone as it runs in training: the same parameters, faster where it can be."""
        own = self.backbone
        trunk = folded(own.trunk) if self.recipe.freeze_batch_norm else None
        if trunk is None:
            return own
        fast = Backbone(trunk, {}, own.feature_dim, (0, 0, 0), (1, 1, 1), own.size)
        fast.mean, fast.std = own.mean, own.std
        return fast

    def _choose_precision(self) -> None:
        self.send(Progressed("preparing", 0.6, "measuring what trains fastest here"))
        probed = nn.Sequential(self.fast, self.classifier)
        chosen, why = compute.choose_precision(
            self.recipe.precision, self.device, probed, self.backbone.size
        )
        self.send(Note("info", f"training on {self.device.type} in {chosen}: {why}"))
        self.at.precision = chosen

    def _prepare(self) -> None:
        """Makes what a step needs."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.at.precision == "fp16")
        self.autocast = compute.autocast(self.at.precision, self.device)
        self.optimizer = torch.optim.SGD(
            tuning.groups(self.backbone, self.classifier, self.work.objective, self.recipe),
            lr=rate_for(self.recipe, self.at.batch_size),
            momentum=self.recipe.momentum,
            fused=True,
        )
        self.averaged: AveragedModel | None = None
        if self.recipe.averaged_epochs:
            self.averaged = AveragedModel(self.network, use_buffers=True)
            self.averaged.requires_grad_(False)
            # The first one copies: the average begins where training does.
            self.averaged.update_parameters(self.network)
        self._size()

    def _size(self) -> None:
        """Settles what goes by the batch size."""
        size = self.at.batch_size
        self.steps = self.images.steps(size)
        self.highest_rate = rate_for(self.recipe, size)
        self.average_every = max(1, self.steps // _AVERAGES_AN_EPOCH)
        if self.averaged is not None:
            decay = math.exp(-self.average_every / (self.steps * self.recipe.averaged_epochs))
            self.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

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
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            text = f"memory is exhausted: batches have {at.batch_size} images from now on"
            self.send(Note("warning", text))
            self._size()

    def _tell(self, step: int, detail: str, *, is_end: bool = False) -> None:
        """Says how far training is: `step` of the current epoch are done."""
        at, step_s = self.at, self.pace.unit_s or self.step_s
        learning_s = self.steps * (step_s or 1.0)
        learning_part = learning_s / (learning_s + self.judging_s)
        done = at.epoch - 1 + learning_part * step / max(1, self.steps)
        # Never back, though the parts are measured ever better, and never 1 before the end.
        self.fraction = max(self.fraction, min(done / at.epochs, _BEFORE_THE_END))
        left_s = None
        if step_s is not None:
            epochs = at.epochs - at.epoch
            left_s = (self.steps - step) * step_s + self.judging_s
            left_s += epochs * (self.steps * step_s + self.judging_s)
            # The epochs that find no time are cut.
            over_s = math.inf if self.deadline is None else self.deadline - time.monotonic()
            left_s = max(0.0, min(left_s, over_s))
        self.send(
            Progressed(
                "training",
                1.0 if is_end else self.fraction,
                detail,
                step=(at.epoch - 1) * self.steps + step,
                steps=at.epochs * self.steps,
                remaining_s=0.0 if is_end else left_s,
            )
        )

    def _plan(self) -> None:
        """Plans as many epochs as the time budget has room for, from a measured step."""
        if self.deadline is None:
            return
        at = self.at
        probed = nn.Sequential(self.fast, self.classifier)
        self.send(Progressed("preparing", 0.9, "measuring a step"))
        self.step_s = step_s = self._within_memory(
            lambda: compute.step_s(
                at.precision,
                self.device,
                probed,
                self.domains * at.batch_size,
                self.backbone.size,
            )
        )
        image_s = step_s / (self.domains * at.batch_size)
        self.judging_s = len(self.work.held_out) * image_s * _FORWARD_PART
        epoch_s = self.steps * step_s + self.judging_s
        left_s = self.deadline - time.monotonic()
        room = self._room(0, left_s, epoch_s)
        has = f"has room for {room}" if left_s >= epoch_s else "has none for it, and one is trained"
        text = f"an epoch takes about {epoch_s:.1f} s: the time budget {has}"
        level: Literal["info", "warning"] = "warning" if room < at.epochs else "info"
        self.send(Note(level, f"{text}, {at.epochs} are planned"))
        at.epochs = min(room, at.epochs)

    def _room(self, done: int, left_s: float, epoch_s: float) -> int:
        """Counts the epochs that there is time for, `done` ones included; 1 at least."""
        room = max(1, done + max(0, int(left_s / epoch_s)))
        if self.work.is_whole and room < self.at.epochs:
            spent_s = self.spent_before_s + time.monotonic() - self.began
            raise OutOfTimeError(spent_s + (self.at.epochs - done) * epoch_s)
        return room

    def _epoch(self) -> None:
        at = self.at
        at.epoch += 1
        faults.reach("trainer.training")
        epoch_began = time.monotonic()
        self._tell(0, f"epoch {at.epoch} of {at.epochs}")
        loss, accuracy, seen, rate = self._within_memory(self._learn)
        train_s = time.monotonic() - epoch_began
        if not math.isfinite(loss):
            raise GraftError(
                Reason.TRAINING_FAILED,
                f"the training loss became {loss} in epoch {at.epoch}: ask for a lower "
                f"learning rate than {self.highest_rate:g}, or for precision fp32",
            )
        self._tell(self.steps, f"epoch {at.epoch} of {at.epochs}: measuring")
        held_out_loss, held_out_accuracy = self._judge()
        now = time.monotonic()
        at.spent_s = self.spent_before_s + now - self.began
        epoch_s = now - epoch_began
        self.step_s, self.judging_s = train_s / self.steps, epoch_s - train_s
        if self.deadline is not None and at.epoch < at.epochs:
            room = self._room(at.epoch, self.deadline - now, epoch_s)
            if room < at.epochs:
                at.epochs = room
                text = f"the time budget has room for {at.epochs} epochs"
                self.send(Note("warning", text))
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
        at, size = self.at, self.at.batch_size
        self.pace = Pace()
        tuning.train_mode(self.network, self.frozen)
        targets_of = torch.from_numpy(self.work.learned.targets)
        sums = torch.zeros(2, device=self.device)
        others = None
        if self.others is not None:
            others = self.others.batches(at.epoch, size, self.steps)
        seen, last_progress, rate = 0, time.monotonic(), 0.0
        for step, (images, places) in enumerate(self.images.batches(at.epoch, size)):
            passed = at.epoch - 1 + step / self.steps
            rate = self.highest_rate * tuning.part_of_rate(self.recipe, passed, at.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            targets = self._moved(targets_of[places])
            shown = images if others is None else torch.cat([images, next(others)[0]])
            with self.autocast():
                features = self.fast(self._moved(shown))
                logits = self.classifier(features).float()
            features, n = features.float(), len(targets)
            other = None if others is None else Outputs(features[n:], logits[n:])
            loss = self.work.objective(
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
                self.pace.reached(step + 1)
                self._tell(step + 1, f"epoch {at.epoch} of {at.epochs}")
            if self.deadline is not None and now > self.deadline:
                break
        loss_sum, right = sums.tolist()
        return loss_sum / seen, right / seen, seen, rate

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _judge(self) -> tuple[float | None, float | None]:
        """Measures loss and accuracy on the held-out images, if there are any."""
        targets = torch.from_numpy(self.work.held_out.targets)
        if not len(targets):
            return None, None
        logits = self.held_out.outputs(self._result, self.device)
        loss = float(functional.cross_entropy(logits, targets))
        return loss, float((logits.argmax(dim=1) == targets).double().mean())

    def _save(self) -> None:
        if not self.checkpoints.is_kept:
            return
        state: State = {
            "standing": asdict(self.at),
            "told": [msgspec.to_builtins(record) for record in self.told],
            "network": self.network.state_dict(),
            "objective": self.work.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        try:
            self.checkpoints.save(state)
        except (OSError, RuntimeError) as error:
            # Torch says a full disk as a RuntimeError. Training is worth more than its safety.
            text = f"no checkpoint could be written ({error}): cut off, the job would start anew"
            self.send(Note("warning", text))

    def _restore(self, found: State) -> None:
        self.work.objective.load_state_dict(found["objective"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.scaler.load_state_dict(found["scaler"])
        if self.averaged is not None:
            self.averaged.load_state_dict(found["averaged"])
        torch.set_rng_state(found["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(found["cuda_rng"], self.device)
        self.send(Note("info", f"training goes on after epoch {self.at.epoch}, from a checkpoint"))
        for told in found["told"]:
            record = msgspec.convert(told, EpochEnded)
            self.told.append(record)
            self.send(record)
