"""What a version is compared with: the same data learned from in other ways.

Each trains for itself, within an equal share of what is left of the job's time,
and answers on the validation images. Nothing of it is published.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from service.contract import (
    Baseline,
    EpochEnded,
    FeatureBased,
    JobSpec,
    ModelBased,
    Note,
    Progressed,
    Record,
)
from service.engine.head import Floats, Head
from service.errors import GraftError
from trainer.arrays import Bools
from trainer.data import Part
from trainer.divided import Divided
from trainer.features import Features
from trainer.measuring import Decide
from trainer.methods import feature_based
from trainer.records import Send
from trainer.reporting.comparisons import Measured

_TRAINED = ("full_fine_tune", "from_scratch")


JUDGING = (0.4, 0.7)
"""Begin and end of the comparisons within the stage "checking", as fractions of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What baselines are measured with."""

    spec: JobSpec
    divided: Divided
    learned: Bools
    """Marks the training images [n] to learn from."""
    measured: Part
    """To be measured on."""
    frozen: Features
    """Of the pretrained backbone."""
    linear_probe: Callable[[], Head]
    decide: Decide
    """As the version does, so that it is not the rules that are compared."""
    budget_s: float | None
    """For all of them."""
    send: Send


def measure(bench: Bench, served: str) -> list[Measured]:
    """Those that the job asked for; `served` is the one that the version itself is, or ""."""
    asked = [name for name in bench.spec.baselines if name != "nearest_class_mean"]
    found: list[Measured] = []
    for name in asked:
        if name == served:
            bench.send(Note("info", "the version is a linear probe itself: it is not compared"))
            continue
        trained = [other for other in asked if other in _TRAINED]
        share_s = None if bench.budget_s is None else bench.budget_s / max(1, len(trained))
        send = _within_checking(bench.send, name, asked.index(name), len(asked))
        send(Progressed("training", 0.0))
        started = time.monotonic()
        is_probe = name == "linear_probe"
        try:
            answers = (
                _linear_probe(bench, send) if is_probe else _trained(bench, name, share_s, send)
            )
        except (GraftError, MemoryError, RuntimeError) as error:
            # The version is there and good; a comparison is not worth losing it.
            text = f"{name.replace('_', ' ')} could not be measured for comparison: {error}"
            bench.send(Note("warning", text))
            continue
        found.append(Measured(name, bench.decide(answers), time.monotonic() - started))
    return found


def _linear_probe(bench: Bench, send: Send) -> Floats:
    fitted = feature_based.fit_head(
        FeatureBased(), *bench.divided.dealt(bench.learned), bench.frozen, bench.spec.seed, send,
        bench.spec.threads,
    )  # fmt: skip
    return fitted.head.probabilities(bench.frozen.all_of(bench.measured))


def _trained(bench: Bench, name: Baseline, budget_s: float | None, send: Send) -> Floats:
    from trainer import backbones, export
    from trainer.methods import model_based

    weights = "random" if name == "from_scratch" else bench.spec.weights
    spec = msgspec.structs.replace(bench.spec, weights=weights, checkpoint_dir="")
    backbone = backbones.load(spec.backbone, spec.weights, spec.seed, Path(spec.weights_dir))
    deadline = None if budget_s is None else time.monotonic() + budget_s
    data = bench.divided.data
    part = data.train.take(bench.learned)
    head, *_ = model_based.train(
        spec,
        # All layers, from images.
        ModelBased(train_from_stage=backbone.stage_names[0]),
        part,
        part.none(),
        data.classes,
        backbone,
        bench.linear_probe,
        deadline,
        send,
    )
    pixels = bench.measured.decode(threads=spec.threads)
    return head.probabilities(export.torch_features(backbone, pixels))


def _within_checking(send: Send, name: Baseline, index: int, count: int) -> Send:
    """Passes on how far a comparison is, as a fraction of the stage "checking".

    Leaves out its epochs and notes, which are not the job's.
    """
    low, high = JUDGING
    detail = f"for comparison: {name.replace('_', ' ')}"

    def told(record: Record) -> None:
        if isinstance(record, Progressed):
            # Preparing comes before the training, and is the small part of it.
            done = record.fraction if record.stage == "training" else 0.0
            share = low + (high - low) * (index + done) / count
            send(Progressed("checking", share, detail, record.step, record.steps))
        elif isinstance(record, Note | EpochEnded):
            return
        else:
            send(record)

    return told
