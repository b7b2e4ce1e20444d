"""Frozen features first; the network is trained on only where that is shown to win.

What would serve then is the average of both: the mean of the frozen head's and the tuned
network's logits, which is one linear head on the features of both. They share the stages that
stay frozen, so that only the last ones are computed twice. Whether the average wins is said by
its log loss on images that neither learned from, paired with the frozen head's, in a
cross-validation by groups; it breaks off as soon as it does not look so. What is hopeless is
said before anything is computed. Imports torch only where a network is trained.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from scipy.special import log_softmax, softmax, stdtrit

from service import backbones as registry
from service.contract import JobSpec, ModelBased, Note, Progressed, Record
from service.engine.head import Floats, Head
from service.engine.runtime import Session
from service.errors import GraftError, Reason
from service.ops.cpus import available_cores
from trainer import crops, folds, penalty
from trainer.arrays import Doubles, Ints
from trainer.data import Part
from trainer.intervals import clustered_se, group_count
from trainer.memory import is_out_of_memory
from trainer.methods import feature_based
from trainer.pace import OutOfTimeError
from trainer.recipes import VIEWS, Settings, settings
from trainer.records import Send

if TYPE_CHECKING:
    from torch import nn

    from trainer.backbones import Backbone
    from trainer.maps import Maps
    from trainer.methods.model_based import Hyperparameters, Result

FOLDS = 3
"""The fewest of which two others tell whether the average wins: each costs a training."""
LEAST_IMAGES = 100
LEAST_PER_CLASS = 20
"""Groups, on average: of fewer a network that was trained on two thirds of them has seldom
anything to win, and what it wins could not be shown."""
LEAST_WRONG = 10
"""A network that is right on half of them, and on all others too, is only just shown to win:
five for it and none against it have a chance of 1/32."""
UNASKED_S = 90.0
"""Seconds of training that nobody asked for: who names no method and no time waits for the
seconds that a frozen head takes, and would not expect minutes. Two cores tune on some 250 images
in it, and answer for them in three folds."""
_TRAINING_FACTOR, _TUNING_FACTOR = 5.0, 1.5
"""Of an image's time in training over that of a forward pass as served, of all layers and of the
last stages: backward costs twice as much, and nothing is fused. Measured on CPUs for all layers:
2 (resnets, bf16) to 6 (efficientnet_lite0). Only for what is said before computing; then a step
is measured."""
_MAPS_PART = 0.1
"""Of the stage "training", about."""
_ROOM = 1.25
"""Of the time that an estimate says: for what it does not know."""
_TRIES, _BATCH = 3, 8
_FOLDER = "folds"
_PASSED_OVER = {Reason.TRAINING_FAILED, Reason.WEIGHTS_UNAVAILABLE}
"""Failures of training that leave the frozen head as good as it was."""
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """Holds what the frozen features came to, and what trains."""

    spec: JobSpec
    """Its checkpoint folder is kept in."""
    classes: tuple[str, ...]
    learned: Part
    groups: Ints
    """int64 [n]: images that belong together have one number."""
    features: Floats
    """Of the frozen last layer, float32 [n, d]."""
    head: Head
    """On frozen features, fitted to all images; it may take more of them than the last layer's."""
    answers: Floats
    """Probabilities [n, classes] by heads that did not see the image; NaN where there is none."""
    order: Doubles
    """float64 [n], by which images are dealt to folds."""
    budget_s: float | None
    """Seconds that all training may take; None where the request names none."""
    session: Callable[[], Session]
    """Loads what a forward pass is timed on; see `Job.timed_session`."""
    pretrained: Callable[[], "Backbone"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Average:
    """The average of the frozen and the trained network, which serves where it wins."""

    backbone: "Backbone"
    """The frozen backbone with the tuned tail beside its own."""
    head: Head
    answers: Doubles
    """As `Given.answers`, of what this method as a whole would have served: for each fold the
    average or the frozen head, whichever the other folds say, at a temperature of theirs."""
    why: str
    hyperparameters: "Hyperparameters"
    device: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compares the log loss of the average with the frozen head's, paired; nats an image."""

    difference: float
    """The mean; below 0 the average is better."""
    upper: float
    """Its one-sided 95 % end, by groups."""
    images: int

    @property
    def wins(self) -> bool:
        """Whether the average is shown to be better."""
        return self.upper < 0


def improve(given: Given, send: Send) -> Average | str:
    """Trains the network on where it pays; else returns why it was not, for people.

    Goes on from what lies in `spec.checkpoint_dir`. Raises GraftError where the images are
    not what they were any more.
    """
    if why := refusal(given):
        return why
    try:
        return _Trial(given, send).run()
    except Exception as error:
        failed = isinstance(error, GraftError) and error.reason in _PASSED_OVER
        if not failed and not is_out_of_memory(error):
            raise
        return f"the frozen head serves: the network could not be trained ({error})"


def refusal(given: Given) -> str:
    """Returns for people why the network is not trained: `hopeless`; "" where it was begun."""
    kept = Path(given.spec.checkpoint_dir) if given.spec.checkpoint_dir else None
    # What an earlier attempt began is not hopeless because the machine is busy now.
    is_begun = kept is not None and any(kept.glob(f"{_FOLDER}*"))
    why = "" if is_begun else hopeless(given)
    return why and f"the network is not trained: {why}"


def hopeless(given: Given) -> str:
    """Returns why training the network cannot pay; "" where it may. Takes a moment."""
    if registry.is_registered(given.spec.backbone):
        return (
            f"{given.spec.backbone} is a registered file, which is used as it is; backbones that "
            "come with Graft can be trained"
        )
    groups, targets = given.groups, given.learned.targets
    count, classes = group_count(groups), len(given.classes)
    if count < max(LEAST_IMAGES, LEAST_PER_CLASS * classes):
        what = f"{len(targets)} images"
        if count < len(targets):
            what += f" in {count} group{'s' if count > 1 else ''}"
        return (
            f"{what} of {classes} classes are too few for it to be shown to win; it is tried from "
            f"{LEAST_IMAGES} in all and {LEAST_PER_CLASS} a class on"
        )
    measured = ~np.isnan(given.answers[:, 0])
    if not measured.any():
        return "no image can be held out, so that nothing tells whether it wins"
    is_wrong = measured & (given.answers.argmax(axis=1) != targets)
    if not is_wrong.any() or group_count(groups[is_wrong]) < LEAST_WRONG:
        return (
            f"the frozen head is wrong on {is_wrong.sum()} of {measured.sum()} images that it did "
            "not learn from: too few are left for a network to be shown to win"
        )
    # A GPU is so much faster that only a step on it tells.
    if given.spec.device != "cpu" and Path("/dev/nvidiactl").exists():
        return ""
    needed_s = estimated_s(given)
    is_too_long = needed_s * _ROOM > _allowed_s(given.budget_s)
    return _too_long(needed_s, given.budget_s) if is_too_long else ""


def estimated_s(given: Given) -> float:
    """Estimates the seconds of all training on this machine's cores, from a forward pass."""
    cores = given.spec.threads or available_cores()
    session, forward_s = given.session(), math.inf
    images = np.zeros((_BATCH, session.size, session.size, 3), np.uint8)
    for _ in range(_TRIES):
        began = time.monotonic()
        session.run(images, cores=1)
        forward_s = min(forward_s, time.monotonic() - began)
    recipe = _recipe(given.spec)
    passes = FOLDS * recipe.epochs * (_TUNING_FACTOR if recipe.keeps_maps else _TRAINING_FACTOR)
    passes += VIEWS if recipe.keeps_maps else 0
    return len(given.learned) * passes * forward_s / _BATCH / cores


def compare(mixed: Doubles, frozen: Doubles, targets: Ints, groups: Ints) -> Comparison:
    """Compares logits [n, classes] with logarithms of probabilities."""
    own = np.arange(len(targets)), targets
    difference = frozen[own] - log_softmax(mixed, axis=1)[own]
    mean = float(difference.mean())
    quantile = float(stdtrit(group_count(groups) - 1, 0.95))
    upper = mean + quantile * clustered_se(difference - mean, groups)
    return Comparison(difference=mean, upper=upper, images=len(targets))


class _Trial:
    """Cross-validates the average, and trains it on all images where it wins."""

    def __init__(self, given: Given, send: Send) -> None:
        from trainer import checkpoint, maps
        from trainer.checkpoint import Checkpoints

        spec, answers = given.spec, given.answers
        self.given, self.send = given, send
        self.pretrained = given.pretrained()
        self.recipe, split = maps.parted(ModelBased(), self.pretrained, spec, len(given.learned))
        self.stage = self.recipe.train_from_stage or self.pretrained.stage_names[0]
        """The first that is tuned."""
        self.drawn = crops.views(spec.augmentation, self.recipe.min_scale)
        self.folder = Path(spec.out_dir) if Path(spec.out_dir).is_dir() else None
        self.maps: Maps | None = None
        """Of all images: they serve all folds."""
        if split is not None:
            frozen = maps.Frozen(split, spec)
            self.maps = maps.Maps(
                given.learned, frozen, self.drawn, spec.seed, spec.threads, self.folder
            )
        self.fold = folds.deal(given.learned.targets, given.groups, given.order, FOLDS)
        """-1 for images that are never held out, and so never compared."""
        self.fold[np.isnan(answers[:, 0])] = -1
        self.frozen: Doubles = np.log(np.maximum(answers, _TINY), dtype=np.float64)
        self.mixed: Doubles = np.full_like(self.frozen, np.nan)
        """The average's logits of the folds that are done."""
        self.key = checkpoint.key(spec, spec.method, self.recipe, given.learned)
        folder = str(Path(spec.checkpoint_dir) / _FOLDER) if spec.checkpoint_dir else ""
        self.kept = Checkpoints(folder, f"{self.key} {self.fold.tolist()}")
        self.began, self.spent_before_s, self.folds_done = time.monotonic(), 0.0, 0
        self.spent_on_folds_s = 0.0
        """On those before the part that is trained now."""
        self.shares = [*[(FOLDS - 1) / FOLDS**2] * FOLDS, 1 / FOLDS]
        """Of all training: each fold's, and that on all images."""

    def run(self) -> Average | str:
        if (found := self.kept.load(self.send)) is not None:
            self.mixed, self.folds_done = found["mixed"].numpy(), found["folds_done"]
            self.spent_before_s = found["spent_s"]
            self.recipe = replace(self.recipe, precision=found["precision"])
        part = 0
        try:
            if self.maps is not None:
                self.maps.prepare(
                    lambda done: self.send(
                        Progressed("training", _MAPS_PART * done, "views through the frozen stages")
                    )
                )
            for part in range(FOLDS):
                if part >= self.folds_done:
                    self._hold_out(part)
                compared = self._compared(np.arange(part + 1))
                if compared.difference >= 0:
                    return _lost(compared)
            part = FOLDS
            return self._trained(compared) if compared.wins else _lost(compared)
        except OutOfTimeError as error:
            needed_s = error.needed_s * sum(self.shares[part:]) / self.shares[part]
            needed_s += self.spent_on_folds_s
            return f"the frozen head serves: {_too_long(needed_s, self.given.budget_s)}"
        finally:
            if self.maps is not None:
                self.maps.close()

    def _hold_out(self, fold: int) -> None:
        """Trains without a fold, and has it answered."""
        import torch

        from trainer.images import AsServed

        given = self.given
        held = np.flatnonzero(self.fold == fold)
        body, result = self._train(np.flatnonzero(self.fold != fold), fold)
        if self.maps is not None:
            judged: AsServed | Maps = self.maps.at(held)
        else:
            judged = AsServed(given.learned.take(held), given.spec.threads)
        features = judged.outputs(body, torch.device(result.device)).numpy()
        logits = features.astype(np.float64) @ result.head.matrix.T + result.head.bias
        self.mixed[held] = (self.frozen[held] + logits) / 2
        self.recipe = replace(self.recipe, precision=result.precision)
        self.folds_done = fold + 1
        state = {
            "mixed": torch.from_numpy(self.mixed),
            "folds_done": self.folds_done,
            "spent_s": self.spent_s,
            "precision": result.precision,
        }
        self.kept.save(state, self.send)

    def _trained(self, compared: Comparison) -> Average:
        """Trains on all images."""
        from trainer import export, tails

        given, n = self.given, len(self.given.learned)
        why = f"the network is trained on: {_said(compared)}"
        self.send(Note("info", why))
        body, result = self._train(np.arange(n), FOLDS)
        frozen, network = given.head, result.head
        has_taps = frozen.feature_dim > self.pretrained.feature_dim
        backbone = tails.tailed(self.pretrained, self.stage, body, with_taps=has_taps)
        bias = (frozen.bias / frozen.temperature + network.bias / network.temperature) / 2
        head = Head(
            weight=_side_by_side(frozen, network, export.blocks_of(backbone)) / 2,
            bias=bias.astype(np.float32),
            classes=given.classes,
            temperature=self._temperature(np.arange(FOLDS)),
        )
        used = (
            result.hyperparameters
            | asdict(self.drawn)
            | {
                "loss_difference": compared.difference,
                "loss_difference_upper": compared.upper,
            }
        )
        return Average(
            backbone=backbone,
            head=head,
            answers=self._answers(),
            why=why,
            hyperparameters=used,
            device=result.device,
            precision=result.precision,
        )

    def _train(self, places: Ints, part: int) -> "tuple[nn.Module, Result]":
        """Trains on the images at `places`, as fold `part`, or on all as the last.

        Returns the tail, or the whole trunk where no maps are kept.
        """
        from trainer import tails
        from trainer.images import AsServed, Images
        from trainer.methods import model_based

        given, spec, is_last = self.given, self.given.spec, part == FOLDS
        if spec.checkpoint_dir and not is_last:
            folder = str(Path(spec.checkpoint_dir) / f"{_FOLDER}-{part}")
            spec = msgspec.structs.replace(spec, checkpoint_dir=folder)
        learned = given.learned.take(places)
        backbone = copy.deepcopy(self.pretrained)
        body: nn.Module = backbone
        inputs: Images | Maps
        if self.maps is not None:
            split = tails.split(backbone, self.stage)
            assert split is not None, "it was before"
            body, inputs = split.tail, self.maps.at(places)
        else:
            inputs = Images(learned, self.drawn, spec.seed, spec.threads, self.folder)
        self.spent_on_folds_s = self.spent_s
        left_s = _allowed_s(given.budget_s) - self.spent_s
        work = model_based.Work(
            spec=spec,
            recipe=self.recipe,
            classes=given.classes,
            backbone=backbone,
            body=body,
            inputs=inputs,
            targets=learned.targets,
            judged=AsServed(learned.none(), spec.threads),
            judged_targets=np.empty(0, np.int64),
            linear_probe=lambda: self._head(places),
            objective=model_based.Objective(self.recipe.label_smoothing),
            key=f"{self.key} {part}",
            is_whole=True,
        )
        # Of what is left each gets its share, so that what finds no time is known early.
        deadline = time.monotonic() + left_s * self.shares[part] / sum(self.shares[part:])
        done, share = sum(self.shares[:part]), self.shares[part]
        low, high = (_MAPS_PART + (1 - _MAPS_PART) * at for at in (done, done + share))
        send = _within_training(self.send, low, high, is_last)
        try:
            return body, model_based.run(work, deadline, send)
        finally:
            if self.maps is None:
                inputs.close()

    def _head(self, places: Ints) -> Head:
        """Fits a head to the last layer's frozen features of some images alone."""
        given, targets = self.given, self.given.learned.targets[places]
        dealt = folds.deal(targets, given.groups[places], given.order[places])
        return feature_based.linear_probe(
            given.features[places], targets, dealt, given.classes, given.spec.seed,
            given.spec.threads,
        )  # fmt: skip

    def _compared(self, by: Ints) -> Comparison:
        """Compares on the images of some folds, each at the temperature of the others of these."""
        at = np.isin(self.fold, by)
        tempered = self.mixed.copy()
        for fold in by:
            others = by[by != fold] if len(by) > 1 else by
            tempered[self.fold == fold] /= self._temperature(others)
        targets, groups = self.given.learned.targets[at], self.given.groups[at]
        return compare(tempered[at], self.frozen[at], targets, groups)

    def _temperature(self, by: Ints) -> float:
        at = np.isin(self.fold, by)
        mixed = self.mixed[at].astype(np.float32)
        return penalty.temperature_of(mixed, self.given.learned.targets[at])

    def _answers(self) -> Doubles:
        answers = np.exp(self.frozen)
        for fold in range(FOLDS):
            others = np.flatnonzero(np.arange(FOLDS) != fold)
            if self._compared(others).wins:
                at = self.fold == fold
                answers[at] = softmax(self.mixed[at] / self._temperature(others), axis=1)
        return answers

    @property
    def spent_s(self) -> float:
        return self.spent_before_s + time.monotonic() - self.began


def _side_by_side(frozen: Head, network: Head, dims: list[int]) -> Doubles:
    """Joins the weights of two heads, with none for the features that the frozen one leaves out.

    `dims` are of the blocks of features, the last of them the network's.
    """
    unread = np.zeros((len(frozen.classes), sum(dims[:-1]) - frozen.feature_dim))
    weights = (frozen.matrix / frozen.temperature, unread, network.matrix / network.temperature)
    joined: Doubles = np.concatenate(weights, axis=1, dtype=np.float64)
    return joined


def _recipe(spec: JobSpec) -> Settings:
    """Returns the recipe, as far as it is known without the network."""
    row = registry.find(spec.backbone)
    kept_from = row.tuned_from if row is not None else ""
    return settings(ModelBased(), is_pretrained=spec.weights != "random", kept_from=kept_from)


def _allowed_s(budget_s: float | None) -> float:
    return UNASKED_S if budget_s is None else budget_s


def _too_long(needed_s: float, budget_s: float | None) -> str:
    ask = _duration(_ROOM * needed_s)
    if budget_s is None:
        limit = f"and {UNASKED_S:.0f} s are spent on it unasked"
    else:
        limit = f"and the time budget leaves {budget_s:.0f} s"
    return (
        f"training the network would take about {_duration(needed_s)} here, {limit}: ask for it "
        f"with a time budget of {ask} or more, or with model_based"
    )


def _duration(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{math.ceil(seconds / 60)} min"


def _said(found: Comparison) -> str:
    return (
        f"averaged with the frozen head it changes the log loss by {found.difference:+.3f} nats "
        f"(at most {found.upper:+.3f}, one-sided 95 %) on {found.images} images that neither "
        "learned from"
    )


def _lost(found: Comparison) -> str:
    return f"the frozen head serves: the network does not win; {_said(found)}"


def _within_training(send: Send, low: float, high: float, is_last: bool) -> Send:
    """Passes on how far a training is as a part of the stage, and of the last its epochs."""

    def told(record: Record) -> None:
        if isinstance(record, Progressed):
            fraction = record.fraction if record.stage == "training" else 0.0
            at = low + (high - low) * fraction
            left_s = record.remaining_s
            if left_s is not None and at < high:
                left_s *= (1 - at) / (high - at)
            detail = record.detail if is_last else f"cross-validating the network: {record.detail}"
            send(Progressed("training", at, detail, remaining_s=left_s))
        elif is_last or (isinstance(record, Note) and record.level == "warning"):
            send(record)

    return told
