"""What deciding by `balanced` brings where classes are imbalanced, and whether reports tell it.

Pairs of classes at nine to one, and sets that came imbalanced: a third of each class, whole scenes,
is held out, a head is fitted to the rest as a job does it, and both rules answer what was held out.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from bench.quality.document import Section, mean, share
from bench.quality.images import ImageSet
from bench.quality.measuring import Measuring, Sets
from service.domain import ARGMAX, Decision
from service.engine.head import Head
from trainer import folds, groups, linear
from trainer.arrays import Doubles, Ints
from trainer.data import Part
from trainer.measuring import Measured, deciding
from trainer.methods.feature_based import as_head
from trainer.reporting import rules

RATIO = 9
"""Images of the common class that are learned from for each of the rare one."""
_FEWEST = 4
"""Images of the rare class, without which there is no job."""
_MOST = 20
_PARTS = 3
"""One part in so many is held out."""
_HELD = 0.9
_BALANCED = Decision(rule="balanced")


@dataclass(frozen=True, eq=False)
class Outcome:
    """Both rules on images that were not learned from, and what the job's report said of them."""

    name: str
    is_pair: bool
    prior: Doubles
    """Shares [classes] of the images that were learned from."""
    argmax: Doubles
    """Recall [classes] of the images held out."""
    balanced: Doubles
    rare_images: int
    """Of the rarest class, held out."""
    told: rules.Ends | None
    """The gain in balanced accuracy as reported; None where nothing could be measured."""
    is_advised: bool
    """The report recommends `balanced`."""

    @property
    def rare(self) -> int:
        """The class that was learned from least."""
        return int(self.prior.argmin())

    @property
    def gain(self) -> float:
        """Of balanced accuracy, on the images held out."""
        return float(self.balanced.mean() - self.argmax.mean())


def tasks(sets: Mapping[str, ImageSet], jobs: int) -> Iterator[tuple[str, int, int, int]]:
    """Yields set, common class, rare class and seed of `jobs` jobs a set, its pairs in turn.

    Both classes are -1 for a set that came imbalanced and is taken as it is.
    """
    for name, images in sets.items():
        counts = np.bincount(images.targets)
        drawn = [*permutations(range(len(counts)), 2)]
        learned = counts * (_PARTS - 1) // _PARTS
        pairs = [
            (a, b) for a, b in drawn if learned[a] >= RATIO * _FEWEST and learned[b] >= _FEWEST
        ]
        yield from ((name, *pairs[n % len(pairs)], n // len(pairs)) for n in range(jobs) if pairs)
        if counts.min() < rules.IMBALANCED * counts.max():
            yield from ((name, -1, -1, seed) for seed in range(jobs))


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Measures jobs at nine to one, on every set."""
    asked = tasks(measuring.sets.whole, arguments.draws)
    return section(measuring.all(_measured, asked)[0])


def _measured(sets: Sets, name: str, common: int, rare: int, seed: int) -> Outcome | None:
    return measure(sets.whole[name], common, rare, seed)


def measure(images: ImageSet, common: int, rare: int, seed: int) -> Outcome | None:
    """Runs one of `tasks`; None where scenes leave too few images."""
    rng = np.random.default_rng([seed, 11])
    is_pair = common >= 0
    if is_pair:
        images = images.of_classes((common, rare))
    held, learned = _divided(images, rng)
    if is_pair:
        first, second = (learned[images.targets[learned] == k] for k in (0, 1))
        count = min(_MOST, len(second), len(first) // RATIO)
        if count < _FEWEST:
            return None
        learned = np.concatenate([first[: RATIO * count], second[:count]])
    asked, job = images.at(held), images.at(learned)
    k = len(images.classes)
    if len(np.unique(asked.targets)) < k or len(np.unique(job.targets)) < k:
        return None
    head, measured = _fitted(job, seed)
    told, is_advised = None, False
    if measured is not None:
        reported = rules.compared(head, measured)
        is_advised = bool(rules.advised(reported))
        told = reported.imbalance.gain if reported.imbalance else None
    shares = head.probabilities(asked.features.astype(np.float32))
    support = np.bincount(asked.targets, minlength=k)

    def recalls(decision: Decision) -> Doubles:
        right = head.decide(shares, decision) == asked.targets
        return np.bincount(asked.targets, weights=right, minlength=k) / support

    prior = np.bincount(job.targets, minlength=k) / len(job)
    return Outcome(
        name=images.name,
        is_pair=is_pair,
        prior=prior,
        argmax=recalls(ARGMAX),
        balanced=recalls(_BALANCED),
        rare_images=int(support[prior.argmin()]),
        told=told,
        is_advised=is_advised,
    )


def _divided(images: ImageSet, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Returns the places of images held out and of the others, in random order."""
    order = rng.permutation(len(images))
    scenes, first, scene = np.unique(images.scenes[order], return_index=True, return_inverse=True)
    class_of, turn = images.targets[order][first], rng.permutation(len(scenes))
    part = np.empty(len(scenes), np.int64)
    for k in range(len(images.classes)):
        own = turn[class_of[turn] == k]
        part[own] = np.arange(len(own)) % _PARTS
    is_held = part[scene] == 0
    return order[is_held], order[~is_held]


def _fitted(job: ImageSet, seed: int) -> tuple[Head, Measured | None]:
    """Fits a head as a job does; returns it with its answers by cross-validation."""
    of = groups.find(job.features, job.looks, job.targets, [""] * len(job)).of
    dealt = folds.deal(job.targets, of, np.random.default_rng(seed).random(len(job)))
    fitted = linear.fit(
        job.features, job.targets, len(job.classes), None, seed, threads=1, folds=dealt
    )
    head = deciding(as_head(fitted, job.classes), job.targets, ARGMAX)
    answers = fitted.out_of_fold
    if answers is None or (there := ~np.isnan(answers[:, 0])).sum() == 0:
        return head, None
    part, rounds = Part((), (), job.targets[there]), len(np.unique(dealt[dealt >= 0]))
    return head, Measured("cross_validation", part, of[there], answers[there], rounds=rounds)


def section(outcomes: Sequence[Outcome]) -> Section:
    """Writes down recalls and balanced accuracies of both rules, and what reports made of them."""
    found = Section("Decisions where classes are imbalanced")
    found.say(
        f"Heads on frozen features that learned from {RATIO} images of one class for each of "
        f"another ({_FEWEST} to {_MOST} of the rare one), pairs of each set in turn, and from sets "
        "as they came; a third of each class was held out, in whole scenes. Recall of the rarest "
        "class, balanced accuracy, and accuracy where classes are as frequent as in the training, "
        "percent, by argmax and by balanced, and the change in points: means over jobs, with the "
        "standard error over jobs, in the last row over sets. *Recommended*: reports that say "
        "`balanced`, and in how many of them it was no worse on the images held out."
    )
    rows: list[tuple[str, ...]] = []
    by_set: list[list[Outcome]] = []
    for is_pair in (True, False):
        for name in dict.fromkeys(o.name for o in outcomes if o.is_pair == is_pair):
            own = [o for o in outcomes if (o.name, o.is_pair) == (name, is_pair)]
            rows.append(_row(name if is_pair else f"{name} as it came", own, [[o] for o in own]))
            by_set += [own] if is_pair else []
    pairs = [o for own in by_set for o in own]
    if pairs:
        rows.append(_row("*all pairs*", pairs, by_set))
    found.table(
        (
            "set", "jobs", "rare images asked", "recall of the rarest", "balanced accuracy",
            "accuracy", "recommended, and rightly",
        ),
        rows,
    )  # fmt: skip
    told = [(o.gain, o.told) for o in pairs if o.told is not None]
    held = sum(ends.low <= gain <= ends.high for gain, ends in told)
    found.bound(
        "the gain in balanced accuracy on the images held out lies in the report's 95 % interval "
        f"in at least 90 % of pairs: {share(held, len(told))}",
        held >= _HELD * len(told),
    )
    gains = [float(np.mean([o.gain for o in own])) for own in by_set]
    found.bound(
        "pairs gain balanced accuracy in every set: "
        + ", ".join(f"{100 * gain:+.1f}" for gain in gains),
        min(gains, default=0.0) > 0,
    )
    return found


def _row(name: str, own: Sequence[Outcome], units: Sequence[Sequence[Outcome]]) -> tuple[str, ...]:
    advised = [o for o in own if o.is_advised]
    rightly = sum(o.gain >= 0 for o in advised)
    return (
        name,
        str(len(own)),
        str(sum(o.rare_images for o in own)),
        _change(units, lambda o, recalls: recalls[o.rare]),
        _change(units, lambda _, recalls: recalls.mean()),
        _change(units, lambda o, recalls: float(o.prior @ recalls)),
        f"{share(len(advised), len(own))}; {rightly} of {len(advised)}",
    )


def _change(units: Sequence[Sequence[Outcome]], figure: Callable[[Outcome, Doubles], float]) -> str:
    """Returns a figure by both rules and its change, with the standard error over units."""
    before = [float(np.mean([figure(o, o.argmax) for o in unit])) for unit in units]
    after = [float(np.mean([figure(o, o.balanced) for o in unit])) for unit in units]
    change = mean([b - a for a, b in zip(before, after, strict=True)], 0.01, 1)
    return f"{100 * np.mean(before):.1f} -> {100 * np.mean(after):.1f}, {change}"
