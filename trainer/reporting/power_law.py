"""A power law through the errors at several amounts of data, and what it says of twice as much.

`error(n) = a n^-b + c` (Hestness et al. 2017, "Deep Learning Scaling is Predictable,
Empirically"; Viering and Loog 2021, "The Shape of Learning Curves: a Review").
NumPy alone.
"""

import msgspec
import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

MIN_VALIDATION = 30
"""Fewer validation images cannot tell one size from the next."""
MIN_SIZES = 4
MIN_TRAIN = 20
LITTLE = 0.005
"""A gain that is not worth the images."""
_VISIBLE = 0.001
_WIDE = 0.05
_FINE = 0.01
"""In a narrower interval, tenths of a point mean something."""
_RESAMPLES = 200
_EXPONENTS = np.linspace(0.1, 1.0, 19)
"""What has been seen lies between; without the bound, noise would find any exponent."""
_PARAMETERS = 3
_DRAWN = 32


class Point(msgspec.Struct, frozen=True):
    """Accuracy at one amount of data, with the middle 95 % of resamples."""

    images: int
    accuracy: float
    low: float
    high: float


class LearningCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy over images to learn from, on cached features with a quick classifier."""

    points: list[Point]
    """As measured."""
    fitted: list[Point] = []
    """The power law, from the smallest size to twice all; empty when it cannot be said."""
    gain: float | None = None
    """What twice the images would add to accuracy; None when it cannot be said."""
    gain_low: float | None = None
    """Of the 95 % interval."""
    gain_high: float | None = None
    verdict: str
    """`more_helps`, `little` or `unknown`."""
    words: str
    served_accuracy: float | None = None
    """Accuracy of what serves, which is another classifier than the curve's."""


def extrapolate(
    right: dict[int, Flags], seed: int, served_accuracy: float | None = None
) -> LearningCurve:
    """Extrapolates from which of m validation images were answered right, [repeats, m] a size.

    The interval is of resampled validation images (the same for all sizes), repeats
    and misfit. It is the expected gain's: what one lot of new images brings varies more.
    """
    sizes = sorted(right)
    n, m = sizes[-1], right[sizes[-1]].shape[1]
    errors = np.array([1 - right[size].mean() for size in sizes])
    resampled = _resampled([right[size] for size in sizes], seed)
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    points = [
        Point(size, float(1 - errors[i]), float(1 - high[i]), float(1 - low[i]))
        for i, size in enumerate(sizes)
    ]
    if problem := _problem(sizes, n, m, float(errors[-1])):
        return LearningCurve(
            points=points, verdict="unknown", words=problem, served_accuracy=served_accuracy
        )
    relative = np.array(sizes) / n
    best = _fit(relative, errors[None])
    spread = _fit(relative, _with_misfit(resampled, errors, best[0], relative))
    gains = _gain(spread)
    gain = float(_gain(best)[0])
    gain_low, gain_high = (float(q) for q in np.quantile(gains, (0.025, 0.975)))
    gain_low, gain_high = min(gain, gain_low), max(gain, gain_high)
    verdict, words = _judged(n, m, gain, gain_low, gain_high)
    return LearningCurve(
        points=points,
        fitted=_drawn(best, spread, float(relative[0]), n),
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        verdict=verdict,
        words=words,
        served_accuracy=served_accuracy,
    )


def _problem(sizes: list[int], n: int, m: int, error: float) -> str:
    if m < MIN_VALIDATION:
        return (
            f"what more images would bring cannot be said from {m} validation images: "
            f"it takes {MIN_VALIDATION}"
        )
    if len(sizes) < MIN_SIZES or n < MIN_TRAIN:
        return (
            f"what more images would bring cannot be said from {n} images to learn from: "
            "they cannot be divided often enough"
        )
    if error == 0:
        return "no validation image is answered wrong: more images to learn from cannot show here"
    return ""


def _resampled(right: list[Flags], seed: int) -> Doubles:
    """Errors [resamples, sizes]."""
    rng = np.random.default_rng([seed % 2**64, 0xB007])
    m = right[0].shape[1]
    images = rng.multinomial(m, np.full(m, 1 / m), _RESAMPLES) / m
    columns = []
    for flags in right:
        repeats = len(flags)
        share = rng.multinomial(repeats, np.full(repeats, 1 / repeats), _RESAMPLES) / repeats
        columns.append(((images @ (1.0 - flags).T) * share).sum(axis=1))
    return np.stack(columns, axis=1)


def _with_misfit(resampled: Doubles, errors: Doubles, law: Doubles, relative: Doubles) -> Doubles:
    """Adds noise as large as what the law leaves unexplained.

    All sizes are measured on the same images and the largest once, so resampling
    alone would be too sure of the differences.
    """
    a, b, c = law
    left = errors - (a * relative**-b + c)
    deviation = float(np.sqrt((left**2).sum() / max(1, len(errors) - _PARAMETERS)))
    noise = np.random.default_rng(0x0FF5).normal(0, deviation, resampled.shape)
    noisy: Doubles = np.clip(resampled + noise, 0, 1)
    return noisy


def _fit(relative: Doubles, errors: Doubles) -> Doubles:
    """Least squares with a, c >= 0: rows of (a, b, c) for errors [rows, sizes].

    `relative` is the size as a part of all, so that a is what all the data leaves
    to be gained. For each exponent the other two are in closed form.
    """
    powers = relative[None] ** -_EXPONENTS[:, None]
    count = len(relative)
    mean_p, mean_e = powers.mean(axis=1), errors.mean(axis=1)
    both = errors @ powers.T
    variance = (powers**2).mean(axis=1) - mean_p**2
    a = (both / count - mean_e[:, None] * mean_p) / variance
    c = mean_e[:, None] - a * mean_p
    without_c = both / (powers**2).sum(axis=1)
    a, c = np.where(c < 0, without_c, a), np.maximum(c, 0)
    # Errors that grow with the data: no gain to be seen.
    a, c = np.where(a < 0, 0, a), np.where(a < 0, mean_e[:, None], c)
    misfit = ((a[:, :, None] * powers + c[:, :, None] - errors[:, None]) ** 2).sum(axis=2)
    best = misfit.argmin(axis=1)
    rows = np.arange(len(errors))
    return np.stack([a[rows, best], _EXPONENTS[best], c[rows, best]], axis=1)


def _gain(laws: Doubles) -> Doubles:
    """What error twice the data takes away."""
    a, b = laws[:, 0], laws[:, 1]
    gain: Doubles = a * (1 - 2.0**-b)
    return gain


def _drawn(best: Doubles, spread: Doubles, start: float, n: int) -> list[Point]:
    at = np.geomspace(start, 2, _DRAWN)

    def accuracy(laws: Doubles) -> Doubles:
        a, b, c = (column[:, None] for column in laws.T)
        values: Doubles = np.clip(1 - (a * at ** (-b) + c), 0, 1)
        return values

    middle = accuracy(best)[0]
    low, high = np.quantile(accuracy(spread), (0.025, 0.975), axis=0)
    return [
        Point(
            round(float(at[i]) * n),
            float(middle[i]),
            float(min(low[i], middle[i])),
            float(max(high[i], middle[i])),
        )
        for i in range(_DRAWN)
    ]


def _judged(n: int, m: int, gain: float, low: float, high: float) -> tuple[str, str]:
    twice = f"twice the images ({2 * n} instead of {n})"
    if gain < LITTLE and high < 2 * LITTLE:
        at_most = max(high, _VISIBLE) * 100
        return "little", f"{twice} would bring little: at most {at_most:.1f} points of accuracy"
    # A gain of less than one image is not measured on these images, whatever a fit says.
    if low < _VISIBLE or high - low > _WIDE or gain * m < 1:
        return "unknown", (
            f"what {twice} would bring cannot be said from {m} validation images, of which one "
            f"is {_points(1 / m)}: between {_rounded(low, high)} of accuracy"
        )
    return "more_helps", (
        f"{twice} would bring about {_about(gain, high - low)} of accuracy "
        f"(between {_rounded(low, high)}) to the quick classifier that it was measured with"
    )


def _digits(width: float) -> int:
    """Returns how many decimals of points mean something in an interval so wide."""
    return 1 if width < _FINE else 0


def _about(value: float, width: float) -> str:
    text = f"{value * 100:.{_digits(width)}f}"
    return f"{text} point{'s' * (text != '1')}"


def _points(value: float) -> str:
    return _about(value, 0.0)


def _rounded(low: float, high: float) -> str:
    digits = _digits(high - low)
    return f"{low * 100:.{digits}f} and {high * 100:.{digits}f} points"
