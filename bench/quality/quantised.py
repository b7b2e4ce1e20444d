"""Heads fitted to features in int8 against those fitted to the same images' in fp32.

Each image is answered by the two heads of a cross-validation that did not learn from it, in the
same folds. Decides whether int8 may be what a job takes where nobody chose.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from bench.quality import frozen_job
from bench.quality.document import Section, half_width, interval
from bench.quality.images import ImageSet, Kept, data_root, find
from bench.quality.measuring import Measuring, Sets
from service.domain import Framing
from trainer import folds, groups
from trainer.arrays import Bools, Doubles, Floats, Ints
from trainer.gate import non_inferiority
from trainer.intervals import Z_95, clustered_se
from trainer.reporting.comparisons import Measured, compare

MOST_LOST = 0.01
"""Of accuracy: the one-sided 95 % bound of the loss, over all images, must lie below."""
MOST_LOSS = 0.02
"""Nats that the mean log loss may rise by."""
_LEAST_ERROR = 1e-6
_SEED = 0

Views = dict[Framing, Floats]


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers of the two heads to the n images of a set that were asked."""

    name: str
    right: Bools
    """[n], by the head of int8."""
    float_right: Bools
    loss: Doubles
    """[n], of the head of int8, nats."""
    float_loss: Doubles
    groups: Ints
    """[n], equal for images that belong together."""
    features_error: float
    """Root of the mean square by which last-layer features in int8 differ from those in fp32, over
    that by which images of the set differ from their mean; a constant difference not counted."""


def answer(images: ImageSet, quantised: Views) -> Answered:
    """Answers a set's images by both heads; `quantised` are features float32 [n, d] by framing."""
    targets = images.targets
    of = groups.find(images.features, images.looks, targets, [""] * len(images)).of
    dealt = folds.deal(targets, of, np.random.default_rng(_SEED).random(len(images)))
    floating = frozen_job.fit(images, dealt, _SEED)
    # Images are framed as the head in float chose, as in a job.
    rows = quantised[floating.framing]
    width = images.features.shape[1]
    other = replace(images, features=rows[:, :width], views={"crop": rows}, aspects=np.empty(0))
    fitted = frozen_job.fit(other, dealt, _SEED)
    assert floating.out_of_fold is not None
    assert fitted.out_of_fold is not None
    there = ~np.isnan(floating.out_of_fold[:, 0])
    targets = targets[there]

    def side(out_of_fold: Floats) -> tuple[Bools, Doubles]:
        p = out_of_fold[there].astype(np.float64)
        own = p[np.arange(len(p)), targets]
        return p.argmax(axis=1) == targets, -np.log(np.maximum(own, _LEAST_ERROR))

    right, loss = side(fitted.out_of_fold)
    float_right, float_loss = side(floating.out_of_fold)
    plain = images.seen(floating.framing)[:, :width].astype(np.float64)
    error = rows[:, :width] - plain
    error -= error.mean(axis=0)
    spread = plain - plain.mean(axis=0)
    return Answered(
        images.name, right, float_right, loss, float_loss, of[there],
        math.sqrt(float(np.square(error).mean() / np.square(spread).mean())),
    )  # fmt: skip


def run(measuring: Measuring, arguments: argparse.Namespace) -> Section:
    """Answers the images of all sets."""
    kept = Kept(arguments.keep, precision="int8")
    files = find(arguments.folder or data_root())
    tasks = [(name, kept.views(name, files[name])) for name in measuring.sets.whole]
    return section(measuring.all(_answered, tasks)[0])


def _answered(sets: Sets, name: str, quantised: Views) -> Answered:
    return answer(sets.whole[name], quantised)


def holds(answered: Sequence[Answered]) -> bool:
    """Returns whether int8 loses little enough for jobs to take it where nobody chose."""
    pooled = _pooled(answered)
    found = non_inferiority(pooled.right, pooled.float_right, pooled.groups, MOST_LOST)
    return found.low > -MOST_LOST and float((pooled.loss - pooled.float_loss).mean()) <= MOST_LOSS


def section(answered: Sequence[Answered]) -> Section:
    """Writes down what int8 costs, by set and pooled, and whether it may be the default."""
    found = Section("What int8 costs")
    found.say(
        "Heads on features of the backbone in int8 against heads on those in fp32, fitted to the "
        "same images in the same folds; each image is answered by heads that did not learn from "
        "it or its group. The backbone is quantised once, by ranges of generated images; its "
        "first and last layers stay in float. *Error*: that of last-layer features over their "
        "spread between images. Accuracy in percent; the difference in points with its 95 % "
        "interval, Tango's for paired answers with the groups as the unit; *bound*: its lower "
        "end, one-sided 95 %. Log loss in nats; its difference with half the width of its 95 % "
        "interval, by groups."
    )
    rows = [_row(each) for each in answered]
    pooled = _pooled(answered)
    rows.append(_row(pooled))
    lost = [float(a.right.mean() - a.float_right.mean()) for a in answered]
    rise = [float((a.loss - a.float_loss).mean()) for a in answered]
    low = float(np.mean(lost)) - _one_sided(lost)
    rows.append((
        "*mean, sets as the unit*", f"{len(answered)} sets", "", "", "",
        interval(lost, 0.01), f"{100 * low:+.2f}", "", "", interval(rise, 1, "+.3f"),
    ))  # fmt: skip
    found.table(
        (
            "set", "images (groups)", "error", "int8", "fp32", "difference, points",
            "bound", "loss", "fp32's", "difference",
        ),
        rows,
    )  # fmt: skip
    found.bound(
        f"over all images, int8 loses less than {100 * MOST_LOST:.0f} point, one-sided 95 %: "
        f"{rows[-2][6]}; and log loss rises by at most {MOST_LOSS} nats: {rows[-2][9]}",
        holds(answered),
    )
    return found


def _one_sided(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    scale = stats.t.ppf(0.95, len(values) - 1) / stats.t.ppf(0.975, len(values) - 1)
    return half_width(values) * float(scale)


def _pooled(answered: Sequence[Answered]) -> Answered:
    first, of = 0, []
    for each in answered:
        _, numbered = np.unique(each.groups, return_inverse=True)
        of.append(numbered + first)
        first += numbered.max() + 1
    return Answered(
        "*all images*",
        np.concatenate([a.right for a in answered]),
        np.concatenate([a.float_right for a in answered]),
        np.concatenate([a.loss for a in answered]),
        np.concatenate([a.float_loss for a in answered]),
        np.concatenate(of),
        float(np.mean([a.features_error for a in answered])),
    )


def _row(a: Answered) -> tuple[str, ...]:
    one_sided = non_inferiority(a.right, a.float_right, a.groups, MOST_LOST)
    both = compare(
        Measured("fp32", np.where(a.float_right, 0, 1)),
        np.where(a.right, 0, 1),
        np.zeros(len(a.right), np.int64),
        a.groups,
    )
    rise = a.loss - a.float_loss
    half = Z_95 * clustered_se(rise - rise.mean(), a.groups)
    return (
        a.name,
        f"{len(a.right)} ({one_sided.groups})",
        f"{a.features_error:.3f}",
        f"{100 * a.right.mean():.2f}",
        f"{100 * a.float_right.mean():.2f}",
        f"{100 * both.difference:+.2f} [{100 * both.difference_low:+.2f}, "
        f"{100 * both.difference_high:+.2f}]",
        f"{100 * one_sided.low:+.2f}",
        f"{a.loss.mean():.3f}",
        f"{a.float_loss.mean():.3f}",
        f"{rise.mean():+.4f} ±{half:.4f}",
    )
