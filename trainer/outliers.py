"""Learns what a model's training images look like, see `service.inference.outliers`.

The threshold is where 19 of 20 training images lie below when each is scored
by what the others look like.
"""

import numpy as np
import numpy.typing as npt

from service.inference.outliers import Outliers, normalised

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FALSE_ALARMS = 0.05
"""Part of the training's own kind of images that is taken for out of distribution."""
_FLOOR = 0.1
"""Added to each variance, times their mean: a feature that a few training images never show
must not decide alone. 0.03 to 0.3 did as well."""
_FOLDS = 5
_LEAST = 1e-3
"""Of a distance that can be a threshold: where all images are alike, none is to divide by 0."""
_KEPT = 256
MAX_TRAIN = 5000
"""More tell no more of means and variances, and cost the scoring of each fold."""


def fit(
    train: Floats,
    targets: Ints,
    held_out: Floats,
    seed: int,
    *,
    is_trained: bool = False,
    looked_at: int | None = None,
) -> tuple[Outliers, Floats] | None:
    """From features float32 [n, d] with classes int64 [n] that all occur; None for too few.

    `held_out` float32 [m, d] belong to images that are not among the first, and may be none.
    Returns the scores of images beside it, float32, that what scores them did not see: the
    held-out ones, else the training images by cross-validation; a sample of them is kept, to
    compare live ones with. A backbone that was trained on the images (`is_trained`) draws them
    together: there the threshold is the held-out images' own. `looked_at` bounds the
    features that count, from the first.
    """
    rng = np.random.default_rng([seed % 2**64, 0x007D])
    if len(train) > MAX_TRAIN:
        chosen = rng.permutation(len(train))[:MAX_TRAIN]
        rare = np.setdiff1d(targets, targets[chosen])
        chosen = np.union1d(chosen, np.flatnonzero(np.isin(targets, rare)))
        train, targets = train[chosen], targets[chosen]
    means, inverse_variance = _estimated(train, targets, looked_at)
    raw = Outliers(means.astype(np.float16), inverse_variance, np.zeros(0, np.float16))
    own = _cross_validated(train, targets, rng, looked_at)
    asked = raw.scores(held_out) if len(held_out) else own
    references = asked if is_trained or not len(own) else own
    if not len(references):
        return None
    threshold = max(float(np.quantile(references, 1 - FALSE_ALARMS)), _LEAST)
    scaled = (inverse_variance / threshold**2).astype(np.float32)
    scores: Floats = (asked / threshold).astype(np.float32)
    kept = np.sort(scores)
    if len(kept) > _KEPT:
        kept = kept[np.linspace(0, len(kept) - 1, _KEPT).round().astype(int)]
    return Outliers(means.astype(np.float16), scaled, kept.astype(np.float16)), scores


def _estimated(train: Floats, targets: Ints, looked_at: int | None) -> tuple[Floats, Floats]:
    unit = normalised(train)
    labels, places = np.unique(targets, return_inverse=True)
    means = np.stack([unit[places == place].mean(axis=0) for place in range(len(labels))])
    deviations = unit - means[places]
    freedom = max(1, len(unit) - len(labels))
    variance = np.einsum("nd,nd->d", deviations, deviations) / freedom
    floor = max(_FLOOR * float(variance.mean()), 1e-12)
    inverse_variance = 1 / (variance + np.float32(floor))
    if looked_at is not None:
        inverse_variance[looked_at:] = 0
    return means, inverse_variance


def _cross_validated(
    train: Floats, targets: Ints, rng: np.random.Generator, looked_at: int | None
) -> Floats:
    """Scores of training images, each by means and variances without its fold.

    Those of classes with one image are left out: no other could stand for it.
    """
    fold = np.empty(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        own = rng.permutation(np.flatnonzero(targets == label))
        # A class of one stays in every fold's estimate.
        fold[own] = np.arange(len(own)) % _FOLDS if len(own) > 1 else -1
    scores: Floats = np.zeros(len(targets), dtype=np.float32)
    for held in range(_FOLDS):
        inside = fold == held
        if not inside.any():
            continue
        means, inverse_variance = _estimated(train[~inside], targets[~inside], looked_at)
        scores[inside] = Outliers(
            means.astype(np.float16), inverse_variance.astype(np.float32), np.zeros(0, np.float16)
        ).scores(train[inside])
    return scores[fold >= 0]
