"""Learns what a model's training images look like, see `service.engine.outliers`.

Scores are in units of images that what scores them did not see: each training image is scored by
what the others look like and by a head that learned from others, or images that were held out
set the measure. The threshold is where all but the part of them lie below that may be taken for
out of distribution by mistake.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from service.engine.outliers import Outliers, energies, normalised
from trainer.arrays import Bools, Floats, Ints, Singles

FALSE_ALARMS = 0.05
"""Where the request names no other."""
_FLOOR = 0.1
"""Added to each variance, times their mean: a feature that a few training images never show
must not decide alone. 0.03 to 0.3 did as well."""
_LEAST = 1e-3
"""Of a deviation, and of the way from the most familiar image to the threshold: where all images
are alike, none is to divide by 0."""
_TINY = 1e-38
"""Of a probability: float32 has none below."""
_KEPT = 256
_MOST = 5000
"""More tell no more of means and variances, and cost the scoring of each fold."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images of the kind that a model is for: what they look like, and what its head says."""

    features: Singles
    """float32 [n, d], of the last layer."""
    log_probabilities: Singles
    """float32 [n, classes], at the head's temperature, by a head that did not learn from the
    image; NaN where there is none."""

    def __len__(self) -> int:
        return len(self.features)

    def at(self, places: "Ints | Bools") -> "Images":
        """Returns the images at `places`, in that order."""
        return Images(self.features[places], self.log_probabilities[places])


@dataclass(frozen=True, eq=False)
class Fitted:
    """What tells outliers, and what it is set by."""

    outliers: Outliers
    scores: Singles
    """float32 [m], of images that what scores them did not see: the held-out ones, else those
    that were learned from; a sample is kept, to compare live ones with."""
    references: int
    """Images that the threshold is set by."""
    false_alarms: float
    """The part of the model's own kind of images that is meant to lie above it."""

    @property
    def warning(self) -> str:
        """Says for people that so few images tell no false alarm so rare; "" where they do.

        The threshold is then the strangest of them, or little below.
        """
        if self.references * self.false_alarms >= 1:
            return ""
        return (
            f"{self.references} images set the threshold of outliers, too few for a false-alarm "
            f"rate of {self.false_alarms:.3g}: about one image in {self.references + 1} may lie "
            f"above it; {math.ceil(1 / self.false_alarms):,} images tell so rare ones"
        )


def logarithms(probabilities: Floats) -> Singles:
    """Returns the logarithms of probabilities [n, classes], float32; NaN stays NaN."""
    found: Singles = np.log(np.maximum(probabilities, _TINY), dtype=np.float64).astype(np.float32)
    return found


def sample(targets: Ints, seed: int) -> Ints:
    """Returns places of enough images to fit to, by classes [n]: all, or many and each class."""
    rng = np.random.default_rng([seed % 2**64, 0x007D])
    chosen = rng.permutation(len(targets))[:_MOST]
    rare = np.setdiff1d(targets, targets[chosen])
    found: Ints = np.union1d(chosen, np.flatnonzero(np.isin(targets, rare)))
    return found


def fit(
    train: Images,
    targets: Ints,
    folds: Ints,
    held_out: Images,
    *,
    false_alarms: float,
    is_trained: bool = False,
) -> Fitted | None:
    """Fits to images with classes int64 [n] that all occur; None where too few tell anything.

    `folds` int64 [n] deals them (see `trainer.folds`); none of -1 is held out. `held_out` are
    images that are not among the first, and may be none. `false_alarms` is the part of the
    model's own kind of images that may be taken for out of distribution. A backbone that was
    trained on the images (`is_trained`) draws them together: there the measure is the held-out
    images', where there are any.
    """
    raw = _estimated(train.features, targets)
    held = raw.distances(held_out.features), energies(held_out.log_probabilities)
    own = _cross_validated(train, targets, folds)
    references = held if len(held_out) and (is_trained or not len(own[0])) else own
    if not len(references[0]):
        return None
    # Each in units of its deviation, and the sum again: from the least, 0, to the threshold, 1.
    far, near = (_unit(part) for part in references)
    measure = references[0] / far + references[1] / near
    least, threshold = float(measure.min()), float(np.quantile(measure, 1 - false_alarms))
    scale = max(threshold - least, _LEAST)
    floor = float(references[1].min())
    distances, energy = held if len(held_out) else own
    joined = distances / far + np.maximum(energy, floor) / near
    scores: Singles = np.maximum((joined - least) / scale, 0)
    kept = np.sort(scores)
    if len(kept) > _KEPT:
        kept = kept[np.linspace(0, len(kept) - 1, _KEPT).round().astype(int)]
    outliers = replace(
        raw,
        inverse_variance=(raw.inverse_variance / (far * scale) ** 2).astype(np.float32),
        validation=kept.astype(np.float16),
        energy_weight=1 / (near * scale),
        energy_floor=floor,
        offset=-least / scale,
    )
    return Fitted(outliers, scores, len(measure), false_alarms)


def _unit(values: Singles) -> float:
    """Returns the deviation of values [n]; 1 where they do not differ."""
    deviation = float(values.std(dtype=np.float64))
    return deviation if deviation > _LEAST * abs(float(values.mean())) + _TINY else 1.0


def _estimated(train: Singles, targets: Ints) -> Outliers:
    """Estimates means and variances of features [n, d]; distances are in units of the latter."""
    unit = normalised(train)
    labels, places = np.unique(targets, return_inverse=True)
    means = np.stack([unit[places == place].mean(axis=0) for place in range(len(labels))])
    deviations = unit - means[places]
    freedom = max(1, len(unit) - len(labels))
    variance = np.einsum("nd,nd->d", deviations, deviations) / freedom
    floor = max(_FLOOR * float(variance.mean()), 1e-12)
    inverse_variance = (1 / (variance + np.float32(floor))).astype(np.float32)
    return Outliers(means.astype(np.float16), inverse_variance, np.zeros(0, np.float16))


def _cross_validated(train: Images, targets: Ints, folds: Ints) -> tuple[Singles, Singles]:
    """Returns distances and energies [m] of the images that a fold holds out and a head answered.

    Each distance is by means and variances without its fold.
    """
    known = (folds >= 0) & ~np.isnan(train.log_probabilities[:, 0])
    distances: Singles = np.zeros(len(train), dtype=np.float32)
    for fold in np.unique(folds[known]):
        own = folds == fold
        distances[own] = _estimated(train.features[~own], targets[~own]).distances(
            train.features[own]
        )
    return distances[known], energies(train.log_probabilities[known])
