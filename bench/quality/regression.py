"""The head as shipped against scikit-learn's cross-validated logistic regression.

Both learn from the same images of the same draw, and answer the same held-out ones. The other side
is `LogisticRegressionCV` with ten strengths and five folds, ranked by log loss, on features as
they are and standardised: whichever of the two is better on the held-out images, so in its favour.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV

from bench.quality import frozen_job
from bench.quality.document import Section
from bench.quality.frozen_job import Doubles
from bench.quality.images import Floats, ImageSet, Ints

PER_CLASS = (5, 20, 50)
_HELD_OUT = 5
"""Images of each class that are never drawn, at least."""
_MOST_HELD_OUT = 1000


@dataclass(frozen=True)
class Pair:
    """Ours less theirs, of one draw."""

    name: str
    per_class: int
    accuracy: float
    loss: float
    """Nats."""


def compare(images: ImageSet, per_class: int, seed: int) -> Pair | None:
    """Compares one draw of `per_class` images; None where fewer than two classes have so many."""
    rng = np.random.default_rng([seed, per_class])
    counts = np.bincount(images.targets)
    kept = np.flatnonzero(counts >= per_class + _HELD_OUT).tolist()
    if len(kept) < 2:
        return None
    pool = images.of_classes(kept)
    order = rng.permutation(len(pool))
    learned, held_out = [], []
    for k in range(len(kept)):
        own = order[pool.targets[order] == k]
        learned.append(own[:per_class])
        held_out.append(own[per_class:][: _MOST_HELD_OUT // len(kept)])
    train, test = pool.at(np.concatenate(learned)), pool.at(np.concatenate(held_out))
    job = frozen_job.run(train, seed)
    ours = job.probabilities(test)
    theirs = min(
        (
            _scikit_learn(train, test, is_standardised=is_standardised)
            for is_standardised in (False, True)
        ),
        key=lambda p: _loss(p, test.targets),
    )
    accuracy = _accuracy(ours, test.targets) - _accuracy(theirs, test.targets)
    loss = _loss(ours, test.targets) - _loss(theirs, test.targets)
    return Pair(images.name, per_class, accuracy, loss)


def _scikit_learn(train: ImageSet, test: ImageSet, *, is_standardised: bool) -> Doubles:
    mean = train.features.mean(axis=0, dtype=np.float64)
    scale = train.features.std(axis=0, dtype=np.float64) if is_standardised else np.ones(len(mean))
    scale[scale == 0] = 1
    x, asked = ((s.features - mean) / scale for s in (train, test))
    # The solution lies in the span of the rows, whichever images a fold leaves out: a rotation
    # onto it changes nothing but the time.
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    model = LogisticRegressionCV(Cs=10, cv=5, scoring="neg_log_loss", max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model.fit(x @ axes.T, train.targets)
    answered: Doubles = model.predict_proba(asked @ axes.T)
    return answered


def _accuracy(p: Floats, targets: Ints) -> float:
    return float((p.argmax(axis=1) == targets).mean())


def _loss(p: Floats, targets: Ints) -> float:
    return float(-np.log(np.maximum(p[np.arange(len(targets)), targets], 1e-12)).mean())


def section(pairs: Sequence[Pair]) -> Section:
    """Writes down the differences with their t-intervals over draws."""
    found = Section("Against scikit-learn's logistic regression")
    cells = list(dict.fromkeys((p.name, p.per_class) for p in pairs))
    found.say(
        "The head as it is served, learned from all images, less `LogisticRegressionCV(Cs=10, "
        'cv=5, scoring="neg_log_loss")` on the better of raw and standardised features, chosen '
        "for it by the held-out loss. Paired by draw, with 95 % t-intervals over draws; the draws "
        f"of a set share its images. Of {len(cells)} comparisons one in forty falls below by "
        "chance, so the bound is on intervals that hold for all at once (Bonferroni)."
    )
    rows, below, nominally = [], [], []
    for name, per_class in cells:
        own = [p for p in pairs if (p.name, p.per_class) == (name, per_class)]
        accuracy = [100 * p.accuracy for p in own]
        loss = [p.loss for p in own]
        half = _half(accuracy, 0.05)
        rows.append((
            name, str(per_class), str(len(own)),
            f"{np.mean(accuracy):+.2f} ±{half:.2f}",
            f"{np.mean(loss):+.3f} ±{_half(loss, 0.05):.3f}",
        ))  # fmt: skip
        if np.mean(accuracy) + half < 0:
            nominally.append(f"{name} at {per_class}")
        if np.mean(accuracy) + _half(accuracy, 0.05 / len(cells)) < 0:
            below.append(f"{name} at {per_class} a class ({np.mean(accuracy):+.2f} points)")
    found.table(("set", "images a class", "draws", "accuracy, points", "log loss, nats"), rows)
    every = [float(np.mean([100 * p.accuracy for p in pairs if p.name == n])) for n, _ in cells]
    losses = [float(np.mean([p.loss for p in pairs if p.name == n])) for n, _ in cells]
    if pairs:
        found.say(
            f"Below by its own interval: {', '.join(nominally) or 'none'}. "
            f"Mean over all: accuracy {np.mean(every):+.2f} points, loss {np.mean(losses):+.3f}."
        )
    found.bound(
        f"on no set below, beyond noise: {'; '.join(below) or 'none is'}", bool(pairs) and not below
    )
    return found


def _half(values: Sequence[float], alpha: float) -> float:
    n = len(values)
    if n < 2:
        return math.inf
    return float(stats.t.ppf(1 - alpha / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
