"""Whether a confidence of 0.8 is right four times in five; NumPy alone."""

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15
TOO_FEW = 0.1
"""Where chance alone allows a larger error, so few images show nothing."""
_SIMULATIONS = 200
_TINY = 1e-12


class Bin(msgspec.Struct, frozen=True):
    """Validation images whose answers were about equally confident."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean probability of the answers; nothing for an empty bin."""
    accuracy: float | None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Confidence against accuracy, with the head's temperature and without."""

    temperature: float
    confidence: float
    """Mean probability of the answers; above the accuracy the model is too sure."""
    error: float
    """Expected calibration error over 15 bins (Naeini et al. 2015)."""
    error_before: float
    """The same at temperature 1."""
    error_by_chance: float
    """A perfectly calibrated model stays below this on so many images, 95 times in 100."""
    brier: float
    """Mean squared distance to the truth, summed over the classes, 0 to 2 (Brier 1950)."""
    brier_before: float
    bins: list[Bin]
    """The reliability diagram."""
    bins_before: list[Bin]
    verdict: Literal["off", "not_shown", "too_few_images"]
    """`off`: more than chance explains. `not_shown`: no more than chance explains, which does
    not show that the probabilities are right. `too_few_images`: nothing could be shown, since
    chance alone explains errors above 0.1."""

    @property
    def is_worse_than_before(self) -> bool:
        """Tells whether the temperature made the error larger."""
        return self.temperature != 1 and self.error > self.error_before


def measure(probabilities: Floats, targets: Ints, temperature: float, seed: int = 0) -> Calibration:
    """From probabilities [n, classes] as served and true classes [n].

    What they were before the temperature follows from them: softmax(T log p).
    """
    before = untempered(probabilities, temperature)
    error, by_chance = expected_error(probabilities, targets), _error_by_chance(probabilities, seed)
    verdict: Literal["off", "not_shown", "too_few_images"] = "not_shown"
    if error > by_chance:
        verdict = "off"
    elif by_chance > TOO_FEW:
        verdict = "too_few_images"
    return Calibration(
        temperature=temperature,
        confidence=float(probabilities.max(axis=1).mean()),
        error=error,
        error_before=expected_error(before, targets),
        error_by_chance=by_chance,
        brier=brier_score(probabilities, targets),
        brier_before=brier_score(before, targets),
        bins=reliability(probabilities, targets),
        bins_before=reliability(before, targets),
        verdict=verdict,
    )


def untempered(probabilities: Floats, temperature: float) -> Doubles:
    """What the probabilities would be at temperature 1."""
    logits = temperature * np.log(np.maximum(probabilities.astype(np.float64), _TINY))
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    before: Doubles = raised / raised.sum(axis=1, keepdims=True)
    return before


def expected_error(probabilities: Floats, targets: Ints) -> float:
    """Mean over images of |accuracy - confidence| of their bin."""
    bins = reliability(probabilities, targets)
    return sum(
        b.count * abs(b.accuracy - b.confidence)
        for b in bins
        if b.accuracy is not None and b.confidence is not None
    ) / len(targets)


def brier_score(probabilities: Floats, targets: Ints) -> float:
    """Mean of the squared distance to the one-hot truth."""
    distance = probabilities.astype(np.float64)
    distance[np.arange(len(targets)), targets] -= 1
    return float((distance**2).sum(axis=1).mean())


def reliability(probabilities: Floats, targets: Ints) -> list[Bin]:
    """15 bins of equal width by the probability of the answer."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == targets
    where = _bin_of(confidence)
    counts = np.bincount(where, minlength=BINS)
    sums = np.bincount(where, weights=confidence, minlength=BINS)
    hits = np.bincount(where, weights=right, minlength=BINS)
    return [
        Bin(
            low=i / BINS,
            high=(i + 1) / BINS,
            count=int(counts[i]),
            confidence=float(sums[i] / counts[i]) if counts[i] else None,
            accuracy=float(hits[i] / counts[i]) if counts[i] else None,
        )
        for i in range(BINS)
    ]


def _bin_of(confidence: Doubles) -> Ints:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def _error_by_chance(probabilities: Floats, seed: int) -> float:
    """95th percentile of the error when each answer is right as often as it says.

    Few images make the error of any model look large (Brocker and Smith 2007,
    "Increasing the Reliability of Reliability Diagrams").
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    n = len(confidence)
    rng = np.random.default_rng([seed % 2**64, 0xECE])
    surplus = (rng.random((_SIMULATIONS, n)) < confidence) - confidence
    in_bin = np.eye(BINS)[_bin_of(confidence)]
    errors = np.abs(surplus @ in_bin).sum(axis=1) / n
    return float(np.quantile(errors, 0.95))
