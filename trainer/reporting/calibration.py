"""Whether a confidence of 0.8 is right four times in five; NumPy and SciPy alone.

Of the most probable class, whatever a version's decision answers: a decision changes no
probability.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from scipy.special import softmax

from trainer import intervals
from trainer.arrays import Bools, Doubles, Floats, Ints

MOST_BINS = 15
LEAST_BINS = 5
_BIN_IMAGES = 20
LEAST_TELLING = 50
"""Lone images, or groups that tell as much: of fewer that are all right one in ten may be wrong."""
TOO_FEW = 0.1
"""Where chance alone allows a larger error, so few images show nothing."""
MARGIN = 0.02
"""Error beyond chance's mean from which on it matters."""
_MOST_SIMULATIONS, _LEAST_SIMULATIONS = 1000, 200
_DRAWS = 2**23
"""Answers that are drawn in all, about: of many images fewer simulations show the same."""
_AT_ONCE = 2**18
"""Random numbers in memory at once."""
_ROWS = 4096
_TINY = 1e-12

Verdict = Literal["off", "not_shown", "too_few_images"]


class Bin(msgspec.Struct, frozen=True):
    """Images whose answers were about equally confident."""

    low: float
    """Least confidence among them."""
    high: float
    """The largest."""
    count: int
    """Images."""
    confidence: float
    """Mean probability of the answers."""
    accuracy: float
    """Fraction of them that are classified correctly."""
    accuracy_low: float
    """Of the 95 % interval, by groups of images that belong together."""
    accuracy_high: float


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Confidence against accuracy, with the head's temperature and without."""

    temperature: float
    """Of the head that answered."""
    confidence: float
    """Mean largest probability; above the accuracy the model is too sure."""
    accuracy: float
    """Part of the images whose most probable class is right, whatever the version's decision."""
    error: float
    """Expected calibration error over bins of as many images, see `expected_error`."""
    error_before: float
    """The same at temperature 1."""
    mean_error_by_chance: float
    """How large it is on so many images on average, were the model perfectly calibrated."""
    error_by_chance: float
    """A perfectly calibrated model stays below this on so many images, 95 times in 100."""
    brier: float
    """Mean squared distance to the truth, summed over the classes, 0 to 2 (Brier 1950)."""
    brier_before: float
    """The same at temperature 1."""
    bins: list[Bin]
    """The reliability diagram; none is empty."""
    bins_before: list[Bin]
    """The same at temperature 1."""
    verdict: Verdict
    """`off`: more than a perfectly calibrated model has 99 times in 100, by a margin.
    `not_shown`: no more than that, which does not prove that the probabilities are right.
    `too_few_images`: nothing could be shown, since chance alone explains errors above 0.1."""


def measure(
    probabilities: Floats,
    targets: Ints,
    temperature: float,
    seed: int = 0,
    groups: Ints | None = None,
) -> Calibration:
    """From probabilities [n, classes] as served, true classes [n] and groups [n].

    What they were before the temperature follows from them: softmax(T log p). `groups`
    None means that each image stands alone.
    """
    right = probabilities.argmax(axis=1) == targets
    confidence, brier = _of_rows(probabilities, targets, 1.0)
    before, brier_before = _of_rows(probabilities, targets, temperature)
    error, chance, _, verdict = _judged(confidence, right, groups, seed)
    return Calibration(
        temperature=temperature,
        confidence=float(confidence.mean()),
        accuracy=float(right.mean()),
        error=error,
        error_before=_error(before, right),
        mean_error_by_chance=chance.mean,
        error_by_chance=chance.usual,
        brier=brier,
        brier_before=brier_before,
        bins=_bins(confidence, right, groups),
        bins_before=_bins(before, right, groups),
        verdict=verdict,
    )


def judge(
    probabilities: Floats, targets: Ints, groups: Ints | None = None, seed: int = 0
) -> tuple[Verdict, str]:
    """Judges probabilities [n, classes], and says for people why they are not shown to be right.

    They are shown to be right, `not_shown` to be wrong, where so many images tell that chance
    alone explains an error of 0.1 at most, and there is no more than that.
    """
    n = len(targets)
    right = probabilities.argmax(axis=1) == targets
    confidence = probabilities.max(axis=1).astype(np.float64)
    error, chance, telling, verdict = _judged(confidence, right, groups, seed)
    if verdict == "not_shown":
        return verdict, ""
    images = f"{n} image{'s' if n > 1 else ''}"
    if groups is not None and (alone := intervals.group_count(groups)) < n:
        images += f" in {alone} group{'s' if alone > 1 else ''}"
    if verdict == "too_few_images":
        if telling >= LEAST_TELLING:
            return verdict, (
                f"on {images} chance alone explains an error of {chance.usual * 100:.1f} points, "
                "so it is not shown that the probabilities are correct"
            )
        return verdict, (
            f"only {images} could be measured on, too few to show that the "
            "probabilities are correct"
        )
    side = "higher" if confidence.mean() > right.mean() else "lower"
    return verdict, (
        f"on {images} the probabilities differ from the accuracy by {error * 100:.1f} points, "
        f"mostly {side}, where chance explains {chance.usual * 100:.1f}"
    )


def expected_error(probabilities: Floats, targets: Ints) -> float:
    """Mean over images of |accuracy - confidence| of their bin.

    Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", by
    5 to 15 bins of as many images each, which are less biased than bins of equal width
    (Roelofs et al. 2022, "Mitigating Bias in Calibration Error Estimation").
    """
    right = probabilities.argmax(axis=1) == targets
    return _error(probabilities.max(axis=1).astype(np.float64), right)


def _of_rows(probabilities: Floats, targets: Ints, temperature: float) -> tuple[Doubles, float]:
    """Confidence [n] before the temperature, and the Brier score, without a copy of all."""
    n = len(targets)
    confidence, distance = np.empty(n), 0.0
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        p = _untempered(probabilities[rows], temperature)
        confidence[rows] = p.max(axis=1)
        true = p[np.arange(len(p)), targets[rows]]
        distance += float(np.einsum("ij,ij->", p, p) + (1 - 2 * true).sum())
    return confidence, distance / n


def _untempered(probabilities: Floats, temperature: float) -> Doubles:
    if temperature == 1:
        return probabilities.astype(np.float64)
    logits = temperature * np.log(np.maximum(probabilities.astype(np.float64), _TINY))
    before: Doubles = softmax(logits, axis=1)
    return before


def _bins(confidence: Doubles, right: Bools, groups: Ints | None) -> list[Bin]:
    where = _bin_of(confidence)
    found = []
    for i in np.unique(where):
        inside = where == i
        of, those = confidence[inside], None if groups is None else groups[inside]
        accuracy, low, high = intervals.of_share(right[inside], those)
        found.append(
            Bin(
                low=float(of.min()),
                high=float(of.max()),
                count=len(of),
                confidence=float(of.mean()),
                accuracy=accuracy,
                accuracy_low=low,
                accuracy_high=high,
            )
        )
    return found


def _bin_of(confidence: Doubles) -> Ints:
    """The bin [n] of each image; those of the same confidence share one."""
    n = len(confidence)
    bins = min(MOST_BINS, max(LEAST_BINS, n // _BIN_IMAGES))
    rising = np.sort(confidence)
    rank = np.searchsorted(rising, confidence, "left") + np.searchsorted(
        rising, confidence, "right"
    )
    return (rank - 1) * bins // (2 * n)


def _error(confidence: Doubles, right: Bools) -> float:
    surplus = np.bincount(_bin_of(confidence), weights=right - confidence)
    return float(np.abs(surplus).sum() / len(confidence))


@dataclass(frozen=True)
class _Chance:
    """The error of a perfectly calibrated model: its mean, 95th and 99th percentile."""

    mean: float
    usual: float
    rare: float


def _by_chance(confidence: Doubles, right: Bools, groups: Ints | None, seed: int) -> _Chance:
    """The error when each answer is right as often as it says, by simulation.

    Few images make the error of any model look large (Brocker and Smith 2007, "Increasing the
    Reliability of Reliability Diagrams"). In a part of the groups, as large as makes answers as
    alike within groups as they were, all images have one fate.
    """
    n, where = len(confidence), _bin_of(confidence)
    rng = np.random.default_rng([seed % 2**64, 0xECE])
    numbers = None if groups is None else intervals.numbered(groups)
    alike = 0.0 if numbers is None else _alikeness(right - confidence, confidence, numbers)
    groups_drawn = int(numbers.max()) + 1 if numbers is not None and alike > 0 else 0
    width = n + 2 * groups_drawn
    errors = np.empty(min(_MOST_SIMULATIONS, max(_LEAST_SIMULATIONS, _DRAWS // n)))
    for start in range(0, len(errors), together := max(1, _AT_ONCE // width)):
        drawn = rng.random((len(errors[start : start + together]), width))
        fate = drawn[:, :n]
        if groups_drawn:
            is_shared, shared = np.split(drawn[:, n:], 2, axis=1)
            fate = np.where(is_shared[:, numbers] < alike, shared[:, numbers], fate)
        surplus = (fate < confidence) - confidence
        bins = where + MOST_BINS * np.arange(len(drawn))[:, None]
        sums = np.bincount(bins.ravel(), surplus.ravel(), MOST_BINS * len(drawn))
        errors[start : start + together] = np.abs(sums).reshape(-1, MOST_BINS).sum(axis=1) / n
    usual, rare = np.quantile(errors, [0.95, 0.99])
    return _Chance(float(errors.mean()), float(usual), float(rare))


def _alikeness(surplus: Doubles, confidence: Doubles, groups: Ints) -> float:
    """Correlation of the surplus within groups, 0 to 1, as large as it may well be.

    That is two standard errors more than was found, the mean surplus taken away.
    """

    def of_pairs(values: Doubles) -> Doubles:
        sums = np.bincount(groups, weights=values)
        pairs: Doubles = np.square(sums) - np.bincount(groups, weights=np.square(values))
        return pairs

    found = of_pairs(surplus - surplus.mean())
    most = of_pairs(np.sqrt(confidence * (1 - confidence)))
    if most.sum() <= 0:
        return 0.0
    part = found.sum() / most.sum()
    error = np.sqrt(np.square(found - part * most).sum()) / most.sum()
    return float(np.clip(part + 2 * error, 0, 1))


def _judged(
    confidence: Doubles, right: Bools, groups: Ints | None, seed: int
) -> tuple[float, _Chance, float, Verdict]:
    """Returns the error, that by chance, how many lone images would tell as much, the verdict."""
    error, chance = _error(confidence, right), _by_chance(confidence, right, groups, seed)
    where = np.arange(len(right)) if groups is None else groups
    share = float(right.mean())
    se = intervals.clustered_se(right - share, where)
    telling = intervals.effective_count(share, se, where)
    verdict: Verdict = "not_shown"
    if error > chance.rare and error - chance.mean > MARGIN:
        verdict = "off"
    # A model that is sure leaves little to chance, by its own word; few images cannot check that.
    elif chance.usual > TOO_FEW or telling < LEAST_TELLING:
        verdict = "too_few_images"
    return error, chance, telling, verdict
