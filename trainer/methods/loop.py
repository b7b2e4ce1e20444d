"""The one training loop: of model-based transfer and of whole-network adaptation.

What is minimised and what an epoch is judged by is the objective's; the loop
owns the rest: precision and batch size, the moving average, the plan of epochs,
the best epoch, and the checkpoint after each.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from service import faults
from service.errors import GraftError, Reason
from service.inference.head import Head
from service.jobs.contract import EpochEnded, JobSpec, ModelBased, Note, Progressed
from trainer import compute
from trainer.backbones import Backbone
from trainer.checkpoint import Checkpoints, State
from trainer.data import Data, Files
from trainer.folding import folded
from trainer.images import AsServed, Images
from trainer.methods import tuning
from trainer.methods.objective import Judged, Objective, Outputs, Score
from trainer.pace import Pace
from trainer.recipes import Settings, rate_for
from trainer.records import Send

_EVALUATION_BATCH = 32
_AVERAGES_AN_EPOCH = 8
"""An average after every step would take a thirtieth of its time."""
_PROGRESS_S = 0.5
_LEARNING_PART = 0.9
"""Fraction of an epoch that its steps take, the rest being its validation, until measured."""
_BEFORE_THE_END = 0.999
_OTHER_SEED = 0x7A26
_NEVER: Score = (-math.inf, -math.inf)

Hyperparameters = dict[str, float | int | str | bool | None]
Result = tuple[Head, Hyperparameters, str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What to train, on what, and towards what."""

    spec: JobSpec
    method: ModelBased
    """Read for its precision and recipe alone."""
    recipe: Settings
    data: Data
    backbone: Backbone
    first_head: Callable[[], Head]
    objective: Objective
    other: Files | None = None
    """Images of a target domain, as many in a batch as there are of the data."""
    may_keep_start: bool = True
    """Epoch 0, the fitted head on the frozen backbone, may be the best."""
    key: str
    """Of the checkpoint."""


@dataclass
class _Standing:
    """Where training stands; with the tensors it makes the checkpoint."""

    precision: str = ""
    batch_size: int = 0
    epochs: int = 0
    epoch: int = 0
    best: Score = _NEVER
    best_epoch: int = 0
    best_weights: str = ""
    """`fitted head`, `trained` or `averaged`."""
    best_trained: Score = _NEVER
    best_trained_epoch: int = 0
    head_only_loss: float | None = None
    head_only_accuracy: float | None = None
    spent_s: float = 0.0


def run(work: Work, deadline: float | None, send: Send) -> Result:
    """Trains the backbone in place; returns the head, hyperparameters, device and precision.

    `deadline` is a `time.monotonic()`; epochs are planned to end before it.
    Goes on from a checkpoint of the same work, whose epochs are told again.
    Raises GraftError with TRAINING_FAILED when the loss is no number any more.
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
        self.classifier = nn.Linear(work.backbone.feature_dim, len(work.data.classes))
        self.network = nn.Sequential(work.backbone, self.classifier)
        self.frozen = tuning.freeze(work.backbone, self.recipe)
        self.told: list[EpochEnded] = []
        self.pace, self.fraction, self.learning_part = Pace(), 0.0, _LEARNING_PART
        self.step_s: float | None = None
        """Seconds a step of the last epoch; before the first, as planned."""
        self.judging_s: float | None = None
        """Seconds that validating takes in an epoch, of all networks together."""
        self.best_state: dict[str, Tensor] = {}
        self.checkpoints = Checkpoints(spec.checkpoint_dir, f"{work.key} {self.device.type}")
        found = self.checkpoints.load(send)
        if found is not None:
            self.at = _Standing(**found["standing"])
            self.network.load_state_dict(found["network"])
        else:
            self.at = _Standing(epochs=self.recipe.epochs)
            if self.recipe.fitted_head:
                self._take_fitted_head()
        self.network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        work.objective.to(self.device)
        tuning.train_mode(self.network, self.frozen)
        self.fast = self._folded()
        if found is None:
            self._choose()
        self.spent_before_s = self.at.spent_s
        if deadline is not None:
            self.deadline = deadline - self.spent_before_s

        folder = Path(spec.out_dir) if Path(spec.out_dir).is_dir() else None
        caches = 2 * self.domains
        self.images = Images(work.data.train, spec.seed, spec.threads, folder, caches)
        self.others: Images | None = None
        self.others_served: AsServed | None = None
        if work.other is not None:
            seed = spec.seed ^ _OTHER_SEED
            self.others = Images(work.other, seed, spec.threads, folder, caches)
            self.others_served = AsServed(work.other, spec.threads, caches)
        self.validation = AsServed(work.data.validation, spec.threads, caches)
        self.steps = self.images.steps(self.at.batch_size)
        self.send(Progressed("preparing", 0.7, "what training begins with"))
        self._prepare()
        if found is not None:
            self._restore(found)

    def run(self) -> Result:
        at = self.at
        if not at.epoch:
            self._plan(self._judge_start())
        while at.epoch < at.epochs:
            self._epoch()
        self._tell(self.steps, f"the best is epoch {at.best_epoch}", is_end=True)
        self.network.load_state_dict(self.best_state)
        self.network.to("cpu", torch.float32).eval()
        head = Head(
            weight=self.classifier.weight.detach().numpy().astype(np.float32),
            bias=self.classifier.bias.detach().numpy().astype(np.float32),
            classes=self.work.data.classes,
        )
        used: Hyperparameters = {k: v for k, v in asdict(self.recipe).items() if k != "recipe"}
        chosen_by = "probe" if self.recipe.batch_size is None else "recipe or request"
        used |= {"batch_size": at.batch_size, "batch_size_chosen_by": chosen_by}
        used |= {"learning_rate": self.highest_rate, "best_weights": at.best_weights}
        used |= {"epochs": at.epoch, "epochs_planned": self.recipe.epochs}
        used |= {"best_epoch": at.best_epoch, "head_only_loss": at.head_only_loss}
        used |= {"head_only_accuracy": at.head_only_accuracy}
        return head, used, self.device.type, at.precision

    def close(self) -> None:
        self.images.close()
        if self.others is not None:
            self.others.close()

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
        fast = Backbone(trunk, {}, own.feature_dim, (0, 0, 0), (1, 1, 1))
        fast.mean, fast.std = own.mean, own.std
        return fast

    def _choose(self) -> None:
        """Precision and batch size."""
        self.send(Progressed("preparing", 0.6, "measuring what trains fastest here"))
        size, probed = self.recipe.batch_size, nn.Sequential(self.fast, self.classifier)
        shown = None if size is None else self.domains * size
        chosen, why = compute.choose_precision(self.work.method, self.device, probed, shown)
        self.send(Note("info", f"training on {self.device.type} in {chosen}: {why}"))
        if size is None:
            count = len(self.work.data.train)
            size, why = compute.choose_batch_size(chosen, self.device, probed, count, self.domains)
            self.send(Note("info", f"batch size {size}: {why}"))
        self.at.precision, self.at.batch_size = chosen, size

    def _tell(self, step: int, detail: str, *, is_end: bool = False) -> None:
        """Says how far training is: `step` of the current epoch are done."""
        at = self.at
        done = at.epoch - 1 + self.learning_part * step / max(1, self.steps)
        # Never back, though the parts are measured ever better, and never 1 before the end.
        self.fraction = max(self.fraction, min(done / at.epochs, _BEFORE_THE_END))
        self.send(
            Progressed(
                "training",
                1.0 if is_end else self.fraction,
                detail,
                step=(at.epoch - 1) * self.steps + step,
                steps=at.epochs * self.steps,
                remaining_s=0.0 if is_end else self._remaining_s(step),
            )
        )

    def _remaining_s(self, step: int) -> float | None:
        """Returns the seconds until the last planned epoch is validated; None while not known."""
        step_s = self.pace.unit_s or self.step_s
        if step_s is None or self.judging_s is None:
            return None
        epochs = self.at.epochs - self.at.epoch
        left_s = (self.steps - step + epochs * self.steps) * step_s + (epochs + 1) * self.judging_s
        # The epochs that find no time are cut.
        over_s = math.inf if self.deadline is None else self.deadline - time.monotonic()
        return max(0.0, min(left_s, over_s))

    def _prepare(self) -> None:
        """What a step needs."""
        recipe, precision = self.recipe, self.at.precision
        self.highest_rate = rate_for(recipe, self.at.batch_size)
        self.autocast = compute.autocast(precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.optimizer = torch.optim.SGD(
            tuning.groups(self.backbone, self.classifier, self.work.objective, recipe),
            lr=self.highest_rate,
            momentum=recipe.momentum,
            fused=True,
        )
        self.average_every = max(1, self.steps // _AVERAGES_AN_EPOCH)
        self.averaged: AveragedModel | None = None
        if recipe.averaged_epochs:
            decay = math.exp(-self.average_every / (self.steps * recipe.averaged_epochs))
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
            self.averaged.requires_grad_(False)
            # The first one copies: the average begins where training does.
            self.averaged.update_parameters(self.network)

    def _judge_start(self) -> float:
        """Epoch 0, where it may be the best or its time is asked for; returns that, seconds."""
        at, began = self.at, time.monotonic()
        is_asked = self.recipe.fitted_head or self.others is not None
        if not is_asked and self.deadline is None:
            return 0.0
        self.send(Progressed("preparing", 0.8, "judging what training begins with"))
        judged = self._judge(self.network)
        score = self.work.objective.score_start(judged)
        if self.recipe.fitted_head:
            at.head_only_loss, at.head_only_accuracy = judged.loss, judged.accuracy
            text = f"the head alone reaches {judged.accuracy:.4f} on the validation images"
            self.send(Note("info", text))
            if self.work.may_keep_start:
                self._keep(score, "fitted head", self.network)
        return time.monotonic() - began

    def _plan(self, judging_s: float) -> None:
        """How many epochs the time budget has room for, from a measured step."""
        if self.deadline is None:
            return
        at = self.at
        probed = nn.Sequential(self.fast, self.classifier)
        shown = self.domains * at.batch_size
        self.send(Progressed("preparing", 0.9, "measuring a step"))
        step_s = compute.step_s(at.precision, self.device, probed, shown)
        judgements = 1 if self.averaged is None else 2
        epoch_s = self.steps * step_s + judgements * judging_s
        self.step_s, self.judging_s = step_s, judgements * judging_s
        self.learning_part = self.steps * step_s / epoch_s
        room = max(1, int((self.deadline - time.monotonic()) / epoch_s))
        text = f"an epoch takes about {epoch_s:.1f} s: the time budget has room for {room} epochs"
        if room < at.epochs:
            self.send(Note("warning", f"{text} of the {at.epochs} planned"))
            at.epochs = room
        else:
            self.send(Note("info", f"{text}, {at.epochs} are planned"))

    def _epoch(self) -> None:
        at, recipe = self.at, self.recipe
        at.epoch += 1
        faults.reach("trainer.training")
        epoch_began = time.monotonic()
        self._tell(0, f"epoch {at.epoch} of {at.epochs}")
        loss, accuracy, seen, rate = self._learn()
        train_s = time.monotonic() - epoch_began
        if not math.isfinite(loss):
            raise GraftError(
                Reason.TRAINING_FAILED,
                f"the training loss became {loss} in epoch {at.epoch}: ask for a lower "
                f"learning rate than {self.highest_rate:g}, or for precision fp32",
            )
        self._tell(self.steps, f"epoch {at.epoch} of {at.epochs}: validating")
        judged = self._judge_epoch()
        if recipe.early_stopping_patience > 0:
            tired = at.epoch - at.best_trained_epoch >= recipe.early_stopping_patience
            at.epochs = at.epoch if tired else at.epochs
        now = time.monotonic()
        at.spent_s = self.spent_before_s + now - self.began
        epoch_s = now - epoch_began
        self.step_s, self.judging_s = train_s / self.steps, epoch_s - train_s
        self.learning_part = train_s / epoch_s
        if self.deadline is not None and at.epoch < at.epochs:
            room = max(0, int((self.deadline - now) / epoch_s))
            if at.epoch + room < at.epochs:
                at.epochs = at.epoch + room
                text = f"the time budget has room for {at.epochs} epochs"
                self.send(Note("warning", text))
        ended = EpochEnded(
            epoch=at.epoch,
            epochs=at.epochs,
            train_loss=loss,
            train_accuracy=accuracy,
            validation_loss=judged.loss,
            validation_accuracy=judged.accuracy,
            images_per_second=seen / train_s,
            eta_s=epoch_s * (at.epochs - at.epoch),
            learning_rate=rate,
        )
        self.told.append(ended)
        # Kept before it is told: whoever hears of an epoch can rely on it.
        self._save()
        self.send(ended)

    def _learn(self) -> tuple[float, float, int, float]:
        """One pass; the mean loss and accuracy, how many images, the last rate."""
        at, size = self.at, self.at.batch_size
        self.pace = Pace()
        tuning.train_mode(self.network, self.frozen)
        targets_of = torch.from_numpy(self.work.data.train.targets)
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

    def _judge_epoch(self) -> Judged:
        """The better of the trained and the averaged weights; keeps them where they are best."""
        at, best = self.at, _NEVER
        found: Judged | None = None
        candidates: list[tuple[str, nn.Module]] = [("trained", self.network)]
        # Cut short before its second update, the average is what training began with.
        if self.averaged is not None and self.averaged.n_averaged > 1:
            candidates.append(("averaged", self.averaged.module))
        for name, network in candidates:
            judged = self._judge(network)
            score = self.work.objective.score(judged)
            self._keep(score, name, network)
            if found is None or score > best:
                found, best = judged, score
        if best > at.best_trained:
            at.best_trained, at.best_trained_epoch = best, at.epoch
        assert found is not None
        return found

    def _keep(self, score: Score, name: str, network: nn.Module) -> None:
        at = self.at
        if score > at.best or not self.best_state:
            at.best, at.best_epoch, at.best_weights = score, at.epoch, name
            self.best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    def _judge(self, network: nn.Module) -> Judged:
        """On images as served, in 32 bits as served.

        In bf16 the chosen epoch's accuracy was two images of 153 off what served.
        """
        network.eval()
        logits = self._outputs(network, self.validation).logits
        targets = torch.from_numpy(self.work.data.validation.targets)
        others = self.others_served
        return Judged(
            loss=float(functional.cross_entropy(logits, targets)),
            accuracy=float((logits.argmax(dim=1) == targets).double().mean()),
            other=None if others is None else self._outputs(network, others),
        )

    def _outputs(self, network: nn.Module, images: AsServed) -> Outputs:
        backbone, classifier = network.children()
        parts = []
        with torch.inference_mode():
            for shown in images.batches(_EVALUATION_BATCH):
                features = backbone(torch.from_numpy(shown).to(self.device))
                parts.append((features.cpu(), classifier(features).cpu()))
        return Outputs(*(torch.cat(part) for part in zip(*parts, strict=True)))

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
            "best_state": self.best_state,
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
        self.best_state = found["best_state"]
        torch.set_rng_state(found["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(found["cuda_rng"], self.device)
        self.send(Note("info", f"training goes on after epoch {self.at.epoch}, from a checkpoint"))
        for told in found["told"]:
            record = msgspec.convert(told, EpochEnded)
            self.told.append(record)
            self.send(record)
