"""Accuracy against images a class: the served head beside scikit-learn's logistic regression.

Both learn from the same images of the same draw, and answer all others of the set. That is
`LogisticRegressionCV` with ten strengths and five folds (as many as a class has images, where those
are fewer), ranked by log loss, on the last layer's features as they are and standardised:
whichever of the two is better on the images that are asked, so in its favour.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV

from bench.quality import frozen_job
from bench.quality.document import Section, half_width, interval
from bench.quality.frozen_job import Cost, Stopwatch
from bench.quality.images import ImageSet
from bench.quality.measuring import Measuring, Sets
from trainer.arrays import Doubles
from trainer.evaluate import cross_entropy

ASKED = (2, 5, 10, 20, 50)
"""Images of each class; of a set whose smallest class is small, half of that class at most."""
FOLDS = 5
HEADLINE = 20
FLATTERING = "tiles-small"
"""A set of long images, of which the crop alone shows little."""
LEAST_GAIN, LEAST_WITHOUT, MOST_LOST = 0.02, 0.01, 0.01
"""At `HEADLINE`: of the mean, of the mean without `FLATTERING`, and of any set."""


@dataclass(frozen=True)
class Side:
    """One of the two compared, or a mean of such."""

    accuracy: float
    loss: float
    """Nats."""
    cost: Cost


@dataclass(frozen=True)
class Outcome:
    """One draw."""

    name: str
    most: int
    """Half of the set's smallest class."""
    drawn: int
    """Images of each class that were learned from."""
    ours: Side
    theirs: Side


Cell = tuple[str, int]
"""A set, and how many images of each class were drawn."""


def most(images: ImageSet) -> int:
    """Returns how many images of each class may be drawn: half of the smallest."""
    return int(np.bincount(images.targets).min()) // 2


def draw(images: ImageSet, per_class: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Draws `per_class` images of each class to learn from; the others are asked.

    A draw of more images holds those of the same seed of fewer.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    owned = [order[images.targets[order] == k] for k in range(len(images.classes))]
    learned = np.concatenate([own[:per_class] for own in owned])
    return images.at(learned), images.at(np.concatenate([own[per_class:] for own in owned]))


def measure(images: ImageSet, per_class: int, seed: int) -> Outcome:
    """Measures both on one draw."""
    train, test = draw(images, per_class, seed)
    job = frozen_job.run(train, seed)
    ours = _side(job.probabilities(test), test, job.cost)
    both = (_theirs(train, test, is_standardised=standardised) for standardised in (False, True))
    return Outcome(
        images.name, most(images), per_class, ours, min(both, key=lambda side: side.loss)
    )


def _side(p: Doubles, test: ImageSet, cost: Cost) -> Side:
    right = p.argmax(axis=1) == test.targets
    return Side(float(right.mean()), cross_entropy(p, test.targets), cost)


def _theirs(train: ImageSet, test: ImageSet, *, is_standardised: bool) -> Side:
    stopwatch = Stopwatch()
    mean = train.features.mean(axis=0, dtype=np.float64)
    scale = train.features.std(axis=0, dtype=np.float64) if is_standardised else np.ones(len(mean))
    scale[scale == 0] = 1
    x = (train.features - mean) / scale
    # The solution lies in the span of the rows, whichever images a fold leaves out: a rotation
    # onto it changes nothing but the time.
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    folds = min(FOLDS, int(np.bincount(train.targets).min()))
    model = LogisticRegressionCV(Cs=10, cv=folds, scoring="neg_log_loss", max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(x @ axes.T, train.targets)
    cost = stopwatch.cost()
    return _side(model.predict_proba((test.features - mean) / scale @ axes.T), test, cost)


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Measures every set at every number of images."""
    tasks = [
        (name, per_class, seed)
        for seed in range(arguments.draws)
        for name, images in measuring.sets.whole.items()
        for per_class in sorted({min(asked, most(images)) for asked in ASKED})
        if per_class > 1
    ]
    return section(measuring.all(_measured, tasks)[0])


def _measured(sets: Sets, name: str, per_class: int, seed: int) -> Outcome:
    return measure(sets.whole[name], per_class, seed)


def section(outcomes: Sequence[Outcome]) -> Section:
    """Writes down the comparison at `HEADLINE` images a class, the others, and the bounds."""
    found = Section("Accuracy against images a class")
    found.say(
        "The served head beside scikit-learn's `LogisticRegressionCV(Cs=10, cv=5, "
        'scoring="neg_log_loss")` on the last layer\'s features of the same images (on the better '
        "of raw and standardised ones, chosen for it by the loss on the images that are asked; "
        "fewer folds where a class has fewer images). *Drawn*: images of each class, never more "
        "than half of the set's smallest class; all others are asked. Accuracy in percent, log "
        "loss in nats, *seconds* of the fit on one core of a machine that has other work (and of "
        "processor time), without features; scikit-learn's are of the better fit alone. Paired by "
        "draw, with half the width of 95 % t-intervals: of a set over its draws, which share its "
        "images, and of a mean over the sets, each counted once."
    )
    cells: dict[Cell, list[Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault((outcome.name, outcome.drawn), []).append(outcome)
    halves = {o.name: o.most for o in outcomes}
    at = {asked: [(n, min(asked, half)) for n, half in halves.items()] for asked in ASKED}
    head = (
        *("set", "drawn", "draws", "served", "scikit-learn", "difference, points"),
        *("loss", "scikit-learn's", "difference", "seconds", "scikit-learn's"),
    )
    headline = at[HEADLINE]
    found.say(f"At {HEADLINE} images a class:")
    others = [cell for cell in headline if cell[0] != FLATTERING]
    rows = [_row(*cell, cells[cell]) for cell in headline]
    rows.append(_pooled("*mean*", headline, cells))
    if len(others) < len(headline):
        rows.append(_pooled(f"*mean without {FLATTERING}*", others, cells))
    found.table(head, rows)
    found.say("At every number:")
    rows = [
        _pooled(f"*mean at {asked} a class*", some, cells)
        for asked, some in at.items()
        if all(cell in cells for cell in some)
    ]
    found.table(head, [*rows, *(_row(*cell, cells[cell]) for cell in sorted(cells))])
    for called, some, least in (
        ("", headline, LEAST_GAIN),
        (f" without {FLATTERING}", others, LEAST_WITHOUT),
    ):
        gains = [_gain(_mean(cells[cell])) for cell in some]
        found.bound(
            f"at {HEADLINE} a class, mean gain of accuracy{called}, points, at least "
            f"{100 * least:.0f}: {interval(gains, 0.01)} over {len(some)} sets",
            bool(gains) and float(np.mean(gains)) >= least,
        )
    below = [_told(cell, cells) for cell in headline if _high(cells[cell], 0.05) < -MOST_LOST]
    found.bound(
        f"at {HEADLINE} a class, on no set an interval wholly below -{100 * MOST_LOST:.0f} point: "
        f"{'; '.join(below) or 'none is'}",
        bool(outcomes) and not below,
    )
    below = [_told(c, cells) for c in cells if _high(cells[c], 0.05 / len(cells)) < 0]
    found.bound(
        f"on no set below, beyond the noise of {len(cells)} comparisons (Bonferroni): "
        f"{'; '.join(below) or 'none is'}",
        bool(outcomes) and not below,
    )
    return found


def _gain(outcome: Outcome) -> float:
    return outcome.ours.accuracy - outcome.theirs.accuracy


def _high(draws: Sequence[Outcome], alpha: float) -> float:
    gains = [_gain(outcome) for outcome in draws]
    return float(np.mean(gains)) + half_width(gains, alpha)


def _told(cell: Cell, cells: dict[Cell, list[Outcome]]) -> str:
    gains = [_gain(outcome) for outcome in cells[cell]]
    return f"{cell[0]} at {cell[1]} ({interval(gains, 0.01)})"


def _mean(draws: Sequence[Outcome]) -> Outcome:
    def mean(sides: Sequence[Side]) -> Side:
        count = len(sides)
        return Side(
            math.fsum(s.accuracy for s in sides) / count,
            math.fsum(s.loss for s in sides) / count,
            Cost(
                math.fsum(s.cost.seconds for s in sides) / count,
                math.fsum(s.cost.processor_s for s in sides) / count,
            ),
        )

    first = draws[0]
    ours, theirs = mean([o.ours for o in draws]), mean([o.theirs for o in draws])
    return Outcome(first.name, first.most, first.drawn, ours, theirs)


def _pooled(called: str, some: Sequence[Cell], cells: dict[Cell, list[Outcome]]) -> tuple[str, ...]:
    least, largest = min(n for _, n in some), max(n for _, n in some)
    _, _, draws, *rest = _row("", 0, [_mean(cells[cell]) for cell in some])
    drawn = str(least) if least == largest else f"{least} to {largest}"
    return (called, drawn, f"{draws} sets", *rest)


def _row(called: str, drawn: int, some: Sequence[Outcome]) -> tuple[str, ...]:
    ours, theirs = [o.ours for o in some], [o.theirs for o in some]
    mean = _mean(some)
    return (
        called,
        str(drawn),
        str(len(some)),
        interval([s.accuracy for s in ours], 0.01, ".1f"),
        interval([s.accuracy for s in theirs], 0.01, ".1f"),
        interval([_gain(o) for o in some], 0.01),
        interval([s.loss for s in ours], 1, ".3f"),
        interval([s.loss for s in theirs], 1, ".3f"),
        interval([o.ours.loss - o.theirs.loss for o in some], 1, "+.3f"),
        f"{mean.ours.cost.seconds:.2f} ({mean.ours.cost.processor_s:.2f})",
        f"{mean.theirs.cost.seconds:.2f} ({mean.theirs.cost.processor_s:.2f})",
    )
