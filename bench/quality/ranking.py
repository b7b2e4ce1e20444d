"""Whether the backbone that a ranking puts first is the best, and what it costs where it is not.

Backbones are ranked on the images of a draw, as the service does; then a head learns from them on
each backbone's features, and its accuracy on the images that were not drawn says which was best.
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bench.quality import images
from bench.quality.document import Section, half_width, share
from bench.quality.images import LabelledFile
from bench.quality.measuring import Measuring, Sets
from bench.quality.outliers import by_set, mean_of
from service.contract import RankedBackbone
from service.domain import DEFAULT_DECODING
from service.engine import preprocess
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.ops.cpus import available_cores
from trainer import backbones, evaluate, export, folds, linear, ranking, transferability
from trainer.arrays import Doubles, Floats, Ints
from trainer.backbone_file import BackboneFile
from trainer.methods import feature_based

PER_CLASS = (5, 20, 50)
ENTRANTS = (
    ("efficientnet_lite0", ""), ("efficientnet_lite1", ""), ("efficientnet_lite2", ""),
    ("efficientnet_lite0", "random"), ("resnet18", "random"),
)  # fmt: skip
"""Backbones with their weights."""
POOLS = {"pretrained": 3, "with random ones": 5}
"""How many of the entrants are ranked together, from the first."""
RULES = ("as served", "both scores", "log loss", "LogME", "cheapest")
"""What decides which backbone is first."""
_HELD_OUT = 5
"""Images of each class that are never drawn, at least."""
_MOST_ASKED = 600
_RUNS = 12
_BATCH = 8


@dataclass(frozen=True, eq=False)
class Seen:
    """A set as a backbone sees it."""

    backbone: str
    weights: str
    image_ms: float
    """Of one image alone, on one core, decoding aside."""
    features: Floats
    """Of the last layer, float32 [n, d]."""


@dataclass(frozen=True)
class Entrant:
    """A backbone in one draw: what it costs, and what a head on it came to."""

    backbone: str
    image_ms: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Row:
    """One draw: the entrants, and the places of those that each rule takes first."""

    name: str
    per_class: int
    pool: str
    entrants: tuple[Entrant, ...]
    first: dict[str, int]


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Ranks on draws of every set; what backbones make of the images is kept from run to run."""
    found = images.find(arguments.folder or images.data_root())
    tasks = []
    for name, files in found.items():
        seen = [see(*entrant, files, arguments.keep) for entrant in ENTRANTS]
        tasks += [(name, seen, size, seed) for size in PER_CLASS for seed in range(arguments.draws)]
    return section([row for rows in measuring.all(_measured, tasks)[0] for row in rows])


def _measured(
    sets: Sets, name: str, seen: Sequence["Seen"], per_class: int, seed: int
) -> "list[Row]":
    return measure(name, seen, sets.whole[name].targets, per_class, seed)


def see(name: str, weights: str, files: Sequence[LabelledFile], keep: Path) -> Seen:
    """Returns the images as a backbone sees them; computed where `keep` does not hold them yet."""
    encoded = [file.read() for file in files]
    content = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in encoded))
    kept = keep / f"seen-{name}-{weights or 'pretrained'}-{content.hexdigest()[:16]}.npz"
    if not kept.exists():
        keep.mkdir(parents=True, exist_ok=True)
        # Exact, so that the figures do not depend on the machine; but for the time.
        file = BackboneFile(
            keep / f"{name}-{weights or 'pretrained'}.onnx",
            OnnxRuntime(Provider("cpu", "the same everywhere"), 1),
            make=lambda path: export.to_onnx(backbones.load(name, weights, 0, keep), path),
        )
        session, size = file.load(), file.size
        decoding = msgspec.structs.replace(DEFAULT_DECODING, size=size)

        def run(start: int) -> Floats:
            some = [preprocess.decode(data, decoding) for data in encoded[start : start + _BATCH]]
            return session.run(np.stack(some), cores=1)[:, : file.blocks[0]]

        with ThreadPoolExecutor(available_cores()) as pool:
            features = np.concatenate(list(pool.map(run, range(0, len(encoded), _BATCH))))
        one, times = np.zeros((1, size, size, 3), np.uint8), []
        for _ in range(_RUNS):
            begun = time.monotonic()
            session.run(one, cores=1)
            times.append(time.monotonic() - begun)
        partial = kept.with_suffix(".partial.npz")
        np.savez(partial, features=features, image_ms=1000 * min(times))
        partial.replace(kept)
    with np.load(kept) as stored:
        return Seen(name, weights, float(stored["image_ms"]), stored["features"])


def measure(name: str, seen: Sequence[Seen], targets: Ints, per_class: int, seed: int) -> list[Row]:
    """Ranks on one draw, and asks heads of each backbone; none where fewer than two classes do.

    `targets` [n] are the classes of the set's images.
    """
    rng = np.random.default_rng([seed, per_class])
    kept = np.flatnonzero(np.bincount(targets) >= per_class + _HELD_OUT)
    if len(kept) < 2:
        return []
    of_class = [rng.permutation(np.flatnonzero(targets == k)) for k in kept]
    train = np.concatenate([own[:per_class] for own in of_class])
    test = np.concatenate([own[per_class:][: _MOST_ASKED // len(kept)] for own in of_class])
    learned, asked = (np.searchsorted(kept, targets[places]) for places in (train, test))
    dealt = folds.deal(learned)
    entrants, scored = [], []
    for one in seen:
        features = one.features[train]
        answered = linear.cross_validated(features, learned, len(kept), dealt, threads=1)
        losses = evaluate.losses(answered, learned)
        row = RankedBackbone(
            backbone=one.backbone,
            weights=one.weights,
            log_loss=float(np.nanmean(losses)),
            log_me=transferability.log_me(features, learned),
            image_ms=one.image_ms,
        )
        scored.append(_Scored(row, losses))
        names = tuple(map(str, range(len(kept))))
        head = feature_based.linear_probe(features, learned, None, names, 0, threads=1)
        said = head.log_probabilities(one.features[test])
        right = said.argmax(axis=1) == asked
        loss = -float(said[np.arange(len(asked)), asked].mean())
        entrants.append(Entrant(one.backbone, one.image_ms, float(right.mean()), loss))
    return [
        Row(name, per_class, pool, tuple(entrants[:count]), _first(scored[:count], len(train)))
        for pool, count in POOLS.items()
    ]


@dataclass(frozen=True, eq=False)
class _Scored:
    row: RankedBackbone
    losses: Doubles


def _first(scored: Sequence[_Scored], images: int) -> dict[str, int]:
    """Returns the place of the backbone that each of `RULES` takes first."""
    level = [_Scored(msgspec.structs.replace(s.row, image_ms=1.0), s.losses) for s in scored]
    served, by_scores = (ranking.ordered(some, images)[0][0] for some in (scored, level))
    places = range(len(scored))
    return {
        "as served": scored.index(served),
        "both scores": level.index(by_scores),
        "log loss": min(places, key=lambda k: scored[k].row.log_loss or 0.0),
        "LogME": max(places, key=lambda k: scored[k].row.log_me or 0.0),
        "cheapest": min(places, key=lambda k: scored[k].row.image_ms or 0.0),
    }


def regret(rows: Sequence[Row], rule: str) -> list[float]:
    """Returns for each draw the points of accuracy that the best backbone has more.

    The best is that of the highest mean accuracy over the draws of the same set and size.
    """
    found = []
    for row in rows:
        best = _best(rows, row)
        found.append(100 * (row.entrants[best].accuracy - row.entrants[row.first[rule]].accuracy))
    return found


def _best(rows: Sequence[Row], row: Row) -> int:
    alike = [
        r for r in rows if (r.name, r.per_class, r.pool) == (row.name, row.per_class, row.pool)
    ]
    means = [mean_of([r.entrants[k].accuracy for r in alike]) for k in range(len(row.entrants))]
    return int(np.argmax(means))


def section(rows: Sequence[Row]) -> Section:
    """Writes down how often each rule takes the best backbone, and what it loses and costs."""
    found = Section("Which backbone comes first")
    found.say(
        "Backbones ranked on the images of a draw, against the held-out accuracy of heads that "
        "learned from the same images. *Right*: the first is that of the highest mean accuracy "
        "over the draws of its set and size. *Lost*: how many points of accuracy that one has "
        "more, mean over sets with a 95 % t-interval, the set as the unit. *ms*: an image of the "
        "first, on one core. *Both scores*: log loss, then LogME within a standard error of the "
        "least; *as served*: the cheapest that neither score shows to be worse."
    )
    table = []
    for pool in dict.fromkeys(r.pool for r in rows):
        for per_class in (*dict.fromkeys(r.per_class for r in rows), None):
            own = [r for r in rows if r.pool == pool and per_class in (None, r.per_class)]
            for rule in RULES:
                right = sum(r.first[rule] == _best(own, r) for r in own)
                lost = [mean_of(regret(unit, rule)) for unit in by_set(own)]
                cost = [
                    mean_of([r.entrants[r.first[rule]].image_ms for r in u]) for u in by_set(own)
                ]
                table.append((
                    pool, "*all*" if per_class is None else str(per_class), rule,
                    share(right, len(own)),
                    f"{mean_of(lost):.2f} ±{half_width(lost):.2f}", f"{mean_of(cost):.1f}",
                ))  # fmt: skip
    found.table(("backbones", "images a class", "rule", "right", "lost, points", "ms"), table)
    random = [r for r in rows if r.pool == "with random ones"]
    worst = [100 * (max(e.accuracy for e in r.entrants) - min(e.accuracy for e in r.entrants))
             for r in random]  # fmt: skip
    served = mean_of(regret(random, "as served"))
    found.bound(
        f"of what the worst backbone loses ({mean_of(worst):.1f} points, random ones among them) "
        f"ranking saves nine tenths: it loses {served:.2f}",
        bool(random) and served < mean_of(worst) / 10,
    )
    return found
