"""Served probabilities of heads on frozen features, against how often they come true.

Every image of a set is asked exactly once, by a head that did not learn from it, so that the
pooled answers are of different images and chance can be reckoned.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.quality import frozen_job
from bench.quality.document import Section, share
from bench.quality.images import BACKBONE, ImageSet, LabelledFile, data_root, find
from bench.quality.measuring import Measuring, Sets
from service.contract import BACKBONE_FILE, HEAD_FILE, ImageSource, JobSpec, ModelBased
from service.engine import head as heads
from service.engine import preprocess
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from trainer import train
from trainer.arrays import Doubles, Ints

BINS = 15
LEAST_POOLED = 1000
PER_CLASS: tuple[int | None, ...] = (None, 10)
"""Images of each class that a head learns from; None for two thirds of all."""
_BLOCKS = 3
_MOST_OF_A_SET = 1000
_BATCH = 8
_SIMULATED = 400


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers of one head to images that it did not learn from."""

    name: str
    per_class: int | None
    probability: Doubles
    """[m], of the answered class."""
    right: Doubles
    """[m], 0 or 1."""
    is_calibrated: bool
    """As its job said."""


def blocks(images: ImageSet, seed: int) -> tuple[Ints, Ints]:
    """Returns places of images in random order, at most 1,000, and the block of each, 0 to 2.

    Scenes stay together; the first image of each says of which class it is.
    """
    rng = np.random.default_rng([seed, 3])
    order = rng.permutation(len(images))[:_MOST_OF_A_SET]
    scenes, first, scene = np.unique(images.scenes[order], return_index=True, return_inverse=True)
    block_of = np.empty(len(scenes), np.int64)
    for k in range(len(images.classes)):
        own = images.targets[order][first] == k
        block_of[own] = np.arange(own.sum()) % _BLOCKS
    return order, block_of[scene]


def ask(images: ImageSet, per_class: int | None, seed: int) -> list[Asked]:
    """Asks each image once, in three blocks; each is answered by a head of the other two."""
    order, block = blocks(images, seed)
    answers = []
    for b in range(_BLOCKS):
        learned = order[block != b]
        if per_class is not None:
            of_class = (learned[images.targets[learned] == k] for k in range(len(images.classes)))
            learned = np.concatenate([own[:per_class] for own in of_class])
        job = frozen_job.run(images.at(learned), seed)
        asked = images.at(order[block == b])
        served = job.probabilities(asked)
        right = (served.argmax(axis=1) == asked.targets).astype(np.float64)
        answers.append(Asked(images.name, per_class, served.max(axis=1), right, job.is_calibrated))
    return answers


def ask_network(
    images: ImageSet, files: Sequence[LabelledFile], keep: Path, epochs: int | None
) -> Asked:
    """Trains a network on a third of the set's images, and asks it for the others.

    `files` are the set's, in the same order. `epochs` None means as many as the recipe says.
    """
    order, block = blocks(images, 0)
    learned, asked = order[block == 0], order[block != 0]
    with tempfile.TemporaryDirectory(prefix="graft-quality-") as temporary:
        folder = Path(temporary).resolve()
        for place in learned:
            data = files[place].read()
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            path = folder / "data" / files[place].label / f"{place:06}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        spec = JobSpec(
            job_id="quality",
            model="quality",
            data=ImageSource(folder=str(folder / "data")),
            out_dir=str(folder / "out"),
            method=ModelBased(epochs=epochs),
            backbone=BACKBONE,
            weights_dir=str(keep.resolve()),
            provider="cpu",
            # Nothing is held out: what is asked for tells.
            validation_fraction=0.0,
        )
        manifest = train.run(spec, lambda _: None)
        runtime = OnnxRuntime(Provider("cpu", "the same everywhere"), 1)
        session = runtime.load((folder / "out" / BACKBONE_FILE).read_bytes)
        head = heads.load((folder / "out" / HEAD_FILE).read_bytes())
        rows = []
        for start in range(0, len(asked), _BATCH):
            some = [files[place].read() for place in asked[start : start + _BATCH]]
            pixels = np.stack([preprocess.decode(data, manifest.decoding) for data in some])
            rows.append(head.probabilities(session.run(pixels)))
    p = np.concatenate(rows).astype(np.float64)
    answered = np.array([images.classes.index(head.classes[k]) for k in p.argmax(axis=1)])
    right = (answered == images.targets[asked]).astype(np.float64)
    return Asked(images.name, None, p.max(axis=1), right, manifest.calibrated)


def expected_error(probability: Doubles, right: Doubles, bins: int = BINS) -> float:
    """Returns the expected calibration error over bins of equal mass (Nguyen and O'Connor 2015).

    Both [n]; the mean over bins of |share right - mean probability|, weighted by images.
    """
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(right[order] - probability[order], min(bins, len(order)))
    return float(sum(abs(part.sum()) for part in parts) / len(order))


def by_chance(probability: Doubles, seed: int = 0) -> tuple[float, float]:
    """Returns the mean and the 95 % quantile of the error of right probabilities [n] by chance."""
    rng = np.random.default_rng(seed)
    errors = [
        expected_error(probability, (rng.random(len(probability)) < probability).astype(float))
        for _ in range(_SIMULATED)
    ]
    return float(np.mean(errors)), float(np.quantile(errors, 0.95))


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Asks all sets, by heads that learned from many and from few images."""
    tasks = [(n, per_class, 0) for per_class in PER_CLASS for n in measuring.sets.whole]
    answers, _unasked = measuring.all(_asked, tasks)
    trained = []
    if arguments.networks:
        files = find(arguments.folder or data_root())
        trained = [
            ask_network(images, files[name], arguments.keep, arguments.epochs)
            for name, images in measuring.sets.whole.items()
        ]
    return section([each for some in answers for each in some], trained)


def _asked(sets: Sets, name: str, per_class: int | None, seed: int) -> list[Asked]:
    return ask(sets.whole[name], per_class, seed)


def section(answers: Sequence[Asked], networks: Sequence[Asked] = ()) -> Section:
    """Writes down the calibration errors, pooled and by set."""
    found = Section("Probabilities")
    found.say(
        f"Expected calibration error of the probability served with the answer, {BINS} bins of "
        "equal mass, points; beside it what right probabilities would have by chance, mean and "
        "95 % quantile. Every image is asked once, by a head that did not learn from it. "
        "*Surer*: mean probability less accuracy, points."
    )
    rows = []
    named: list[tuple[str, list[Asked]]] = []
    for per_class in dict.fromkeys(a.per_class for a in answers):
        called = "two thirds of the images" if per_class is None else f"{per_class} a class"
        own = [a for a in answers if a.per_class == per_class]
        named.append((f"*all sets, learned from {called}*", own))
        named += [
            (f"{name}, {called}", [a for a in own if a.name == name])
            for name in dict.fromkeys(a.name for a in own)
        ]
    if networks:
        named.append(("*trained networks, all sets, a third of the images*", list(networks)))
    for called, own in named:
        probability = np.concatenate([a.probability for a in own])
        right = np.concatenate([a.right for a in own])
        chance, most = by_chance(probability)
        rows.append((
            called, str(len(right)), f"{100 * right.mean():.1f} %",
            f"{100 * expected_error(probability, right):.1f}",
            f"{100 * chance:.1f} ({100 * most:.1f})",
            f"{100 * float(probability.mean() - right.mean()):+.1f}",
            share(sum(a.is_calibrated for a in own), len(own)),
        ))  # fmt: skip
    head = ("answers of", "images", "right", "error", "chance (95 %)", "surer", "jobs that said so")
    found.table((*head[:-1], "jobs that called themselves calibrated"), rows)
    pooled = sum(len(a.right) for a in answers if a.per_class is None)
    if answers and pooled < LEAST_POOLED:
        found.say(f"Only {pooled} images are pooled, fewer than {LEAST_POOLED}: too few to tell.")
    return found
